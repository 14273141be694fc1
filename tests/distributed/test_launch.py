"""examples/train_processes.py under torchrun: it goes on in another number of processes, and leaves an adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adaptc
from tests.distributed.models import batch, grouped_llama, llama

SCRIPT = Path(__file__).parents[2] / "examples/train_processes.py"


def torchrun(processes: int, *options: str | Path) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(SCRIPT), "--device=cpu", *map(str, options)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.mark.long
def test_the_script_goes_on_either_way(tmp_path: Path) -> None:
    llama(dtype=torch.float32).save_pretrained(tmp_path / "model")
    known = ("--model", tmp_path / "model", "--out", tmp_path / "run", "--save-every", "2", "--rank", "3")
    first = torchrun(2, *known, "--how", "pipeline", "--steps", "2")
    assert [line.partition(":")[0] for line in first.splitlines()] == ["step 1", "step 2"]
    rest = torchrun(1, *known, "--how", "shards", "--steps", "4")
    assert [line.partition(":")[0] for line in rest.splitlines()] == ["step 3", "step 4"]
    config = adaptc.load_adapter(tmp_path / "run/adapter").config
    assert config.base_model_name_or_path == str(tmp_path / "model")
    trained = adaptc.compile(llama(dtype=torch.float32), tmp_path / "run/adapter", training=True)
    loss = trained(**batch()).loss
    assert loss.isfinite()
    assert loss != trained.base(**batch()).loss


@pytest.mark.long
def test_the_script_divides_layers(tmp_path: Path) -> None:
    """Two processes have the losses of one, and go on from a state of shards."""
    grouped_llama().float().save_pretrained(tmp_path / "model")

    def run(processes: int, how: str, steps: int, folder: str) -> list[str]:
        known = ("--model", tmp_path / "model", "--out", tmp_path / folder, "--save-every", "2", "--rank", "3")
        return torchrun(processes, *known, "--how", how, "--steps", str(steps)).splitlines()

    assert [line.partition(":")[0] for line in run(2, "shards", 2, "two")] == ["step 1", "step 2"]
    two = run(2, "tensors", 4, "two")
    assert [line.partition(":")[0] for line in two] == ["step 3", "step 4"]
    losses = [float(line.rpartition(" ")[2]) for line in run(1, "tensors", 4, "one")]
    assert [float(line.rpartition(" ")[2]) for line in two] == pytest.approx(losses[2:], abs=2e-5)
    adaptc.compile(grouped_llama().float(), tmp_path / "two/adapter")
