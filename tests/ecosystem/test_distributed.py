"""Two processes train what one would train on the same rows, with DistributedDataParallel and with FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.training import batch, module, steps, trainable

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_are_as_one(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.ecosystem.two_processes", how, str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")

    def loss() -> torch.Tensor:
        """The mean over processes is that of their means."""
        rows = batch(4)
        halves = [one(**{k: t[at : at + 2] for k, t in rows.items()}).loss for at in (0, 2)]
        return (halves[0] + halves[1]) / 2

    one = module()
    expected = steps(loss, trainable(one), 4)
    assert len(set(expected)) == 4
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(found["state"], one.state_dict(), rtol=1e-4, atol=1e-6)
    assert found["frozen"] == 0, "frozen parameters have gradients"
