"""``adaptc sweep``: a run from a YAML file, its table and pictures, its end by Ctrl-C, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import adaptc
from tests.support.training import model
from tests.support.words import tokenizer
from tests.test_cli import call, refused


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its tokenizer, a dataset and the description of a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": f"w{i} w2", "completion": f"w{i + 1} w4 w{i}"}) for i in range(5)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "eval.txt").write_text("w3 w2 w4\nw5 w2 w6 w4\n")
    (folder / "sweep.yaml").write_text(
        "configs:\n  small: {r: 2}\n  loha: {peft_type: LOHA, r: 3, learning_rate: 2e-3}\n"
        "defaults: {target_modules: [q_proj]}\n"
        "dataset: train.jsonl\neval_dataset: eval.txt\nsteps: 3\nbatch_size: 2\neval_steps: 1\nlearning_rate: 1e-2\n"
    )
    return folder


@pytest.mark.long
def test_a_sweep_from_a_file(made: Path, tmp_path: Path) -> None:
    words = ["sweep", made / "model", made / "sweep.yaml", "-o", tmp_path / "run"]
    out = call(*words).stdout
    found = json.loads(call(*words, "--json").stdout)  # it goes on, and has nothing left to do
    assert (found["step"], found["wrote"]) == (3, str(tmp_path / "run"))
    assert {n: c["steps"] for n, c in found["configs"].items()} == {"small": 3, "loha": 3}
    assert found["best"] in ("small", "loha")
    assert f"the best adapter is {tmp_path / 'run' / found['best']}" in out.replace("\n", "")
    assert "2 configs after step 3 of 3" in out
    # A lock on the directory may leave its file there.
    assert {p.name for p in (tmp_path / "run").iterdir()} - {".lock"} == {
        "curves.svg", "curves-dark.svg", "loha", "small", "state-3", "sweep.json",
    }  # fmt: skip
    for name in ("small", "loha"):
        assert adaptc.compile(model(), tmp_path / "run" / name).binding.methods
    rows: Any = [{"input_ids": [i, 2, i + 1, 4, i, 95], "labels": [-100, -100, i + 1, 4, i, 95]} for i in range(5)]
    held_out: Any = [{"input_ids": [3, 2, 4, 95]}, {"input_ids": [5, 2, 6, 4, 95]}]
    alone = adaptc.training.sweep(
        model(), {"small": adaptc.LoraConfig(r=2, target_modules=["q_proj"])}, rows, eval_dataset=held_out, steps=3,
        batch_size=2, eval_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    assert found["configs"]["small"]["eval_loss"] == pytest.approx(alone.results["small"].eval_loss, rel=1e-5)
    longer = made / "longer.yaml"
    longer.write_text((made / "sweep.yaml").read_text().replace("steps: 3", "steps: 4"))
    assert json.loads(call("sweep", made / "model", longer, "-o", tmp_path / "run", "--json").stdout)["step"] == 4


#: runs the command and presses Ctrl-C before its second step; a process of its own, since the signal is for all of it
INTERRUPTED = """
import signal, sys
from adaptc.cli import main
from adaptc.joint_training.sweep import _Sweep
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background processes ignore it
take, seen = _Sweep._take_step, []

def take_interrupted(self, *args):
    if self.step == 1:
        signal.raise_signal(signal.SIGINT)
    take(self, *args)
    seen.append(self.step)

_Sweep._take_step = take_interrupted
try:
    main()
finally:
    assert seen == [1, 2], seen
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


@pytest.mark.long
def test_ctrl_c_ends_a_sweep_after_its_step(made: Path, tmp_path: Path) -> None:
    words = ["sweep", made / "model", made / "sweep.yaml", "-o", tmp_path / "run"]
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert stopped.returncode == 130, stopped.stderr
    assert "the same command goes on" in stopped.stderr
    assert json.loads((tmp_path / "run" / "sweep.json").read_text())["step"] == 2
    assert json.loads(call(*words, "--json").stdout)["step"] == 3


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_curves(made: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    (made / "long.yaml").write_text((made / "sweep.yaml").read_text().replace("steps: 3", "steps: 40"))
    words = ["sweep", made / "model", made / "long.yaml", "-o"]
    call(*words, whole)
    killed = subprocess.Popen(
        [sys.executable, "-m", "adaptc.cli", *map(str, words), str(cut)], stdout=subprocess.DEVNULL
    )
    with killed:
        while killed.poll() is None and not (cut / "sweep.json").exists():
            time.sleep(0.01)
        killed.kill()
    assert json.loads((cut / "sweep.json").read_text())["step"] < 40
    call(*words, cut)
    states = [json.loads((folder / "sweep.json").read_text()) for folder in (whole, cut)]
    assert states[0]["points"] == states[1]["points"]
    assert states[0]["results"]["small"]["best"] == states[1]["results"]["small"]["best"]


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.long
def test_a_terminal_shows_the_table_as_it_grows(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptc.cli.training_commands import _live_table
    from adaptc.joint_training.sweep_report import SweepReport, SweepResult

    shown = Terminal()
    for name in ("TERM", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    with _live_table() as show:
        show(SweepReport({"a": SweepResult("a", 3, 0.5)}, 3, 9))
        show(SweepReport({"a": SweepResult("a", 4, 0.25)}, 4, 9))
    assert "after step 4 of 9" in shown.getvalue()
    monkeypatch.setattr(sys, "stderr", StringIO())
    with _live_table() as show:
        show(SweepReport({}, 0, 9))
    assert not sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_what_a_sweep_refuses(made: Path, tmp_path: Path) -> None:
    output = ["-o", tmp_path / "run"]
    (tmp_path / "wrong.yaml").write_text((made / "sweep.yaml").read_text().replace("batch_size", "batchsize"))
    refused(
        "sweep", made / "model", tmp_path / "wrong.yaml", *output, said="no key 'batchsize'; nearest are 'batch_size'"
    )
    refused("sweep", made / "model", tmp_path / "none.yaml", *output, said="no description of a sweep")
    refused("sweep", made / "none", made / "sweep.yaml", *output, said="there is no model at")
    (tmp_path / "lost.yaml").write_text((made / "sweep.yaml").read_text())
    refused("sweep", made / "model", tmp_path / "lost.yaml", *output, said="train.jsonl cannot be read")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "w1 " * 2100}))
    (tmp_path / "eval.txt").write_text("w1 w2")
    words = ["sweep", made / "model", tmp_path / "lost.yaml", *output]
    assert "has a row of 2101 tokens, and the model takes 2048: cut rows with max_length" in call(*words, code=1).stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    refused(
        "sweep", made / "model", made / "sweep.yaml", "-o", tmp_path / "mine", said="holds no sweep that could go on"
    )
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert "--output" in call("sweep", made / "model", made / "sweep.yaml", code=2).stderr
