"""Runs of Trainer that are killed at any moment go on from the last checkpoint that was finished, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import adaptc
from adaptc import CheckpointError, training
from tests.support.training import module, train

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.long
@pytest.mark.parametrize(("seed", "count"), [(1, 3), pytest.param(2, 30, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on(seed: int, count: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.ecosystem.killed_runs",
        str(tmp_path),
        str(seed),
        str(count),
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(set(found["whole"])) == 8
    assert len(found["runs"]) == count
    for run in found["runs"]:
        assert run["losses"] == found["whole"], run
        assert run["refused"] is None or not run["refused"].startswith("went on"), run
    assert any(run["refused"] for run in found["runs"]), "no checkpoint was left unfinished"
    assert any(run["last"] for run in found["runs"]), "no run went on from a checkpoint"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    train(module(), folder, save_strategy="steps", save_steps=2, max_steps=4)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.long
def test_what_a_killed_process_left_is_passed_over(run: Path) -> None:
    older, newer = str(run / "checkpoint-2"), run / "checkpoint-4"
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-99").write_text("no folder")
    (run / "checkpoint-x").mkdir()
    assert training.last_checkpoint(run) == str(newer)
    (newer / "trainer_state.json").write_text("")
    assert training.last_checkpoint(run) == older
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    assert training.last_checkpoint(run) is None
    assert training.last_checkpoint(run / "nothing") is None
    with pytest.raises(CheckpointError, match="cannot look for checkpoints"):
        training.last_checkpoint(newer / "README.md")


@pytest.mark.long
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_in_a_checkpoint_is_named(name: str, run: Path) -> None:
    file = run / "checkpoint-4" / name
    # Not cut in place: the weights have two names.
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])
    for read in (
        lambda: training.last_checkpoint(run),
        lambda: adaptc.swap(module().owner, run / "checkpoint-4"),
    ):
        with pytest.raises(CheckpointError, match="checkpoint-4"):
            read()


def test_trainer_does_not_go_on_from_damaged_weights(run: Path, tmp_path: Path) -> None:
    file = run / "checkpoint-4" / "model.safetensors"
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size // 2)
    trained: Any = module()
    before = {k: t.clone() for k, t in trained.state_dict().items()}
    with pytest.raises(SafetensorError, match=r"safetensors|deserializ"):
        train(trained, tmp_path / "other", resume=str(run / "checkpoint-4"), max_steps=8)
    assert all((t == before[k]).all() for k, t in trained.state_dict().items())
