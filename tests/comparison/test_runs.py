"""Runs: what is run again and what is not, and what a failure leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import adaptc
from tests.comparison import run_method, runs
from tests.comparison.__main__ import main, parse
from tests.comparison.compared import COMPARED
from tests.comparison.results import Run, applies, make_run, new_result, read_all, read_result, write_result
from tests.comparison.task import RATES, SEARCH, TASKS, Plan, Scores, Task

METHODS = ["LoRA", "IA3", "LN tuning"]
#: compared on the text task alone
NEEDS_TOKENS = "Prompt tuning"


class Recorder:
    """A runner that writes a result for each run, and counts them; it is stopped at the run ``stop_at``."""

    def __init__(self, stop_at: int = -1) -> None:
        self.seen: list[tuple[str, str]] = []
        self.stop_at = stop_at

    def __call__(self, run: Run, folder: Path, threads: int, progress: Callable[[int], None]) -> None:
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append((run.task, run.method))
        progress(3)
        losses = {f"{rate:g}": abs(rate - 0.01) for rate in RATES}
        write_result(run.path(folder), new_result(run, {"validation_losses": losses, "accuracy": 0.5}))


def run(recorder: Recorder, folder: Path, tasks: tuple[str, ...] = (SEARCH, "vision"), steps: int = 5) -> None:
    runs.run_all(tasks, [*METHODS, NEEDS_TOKENS], folder, 1, steps, recorder)


def test_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    run(first, tmp_path)
    assert first.seen == [(task, method) for task in (SEARCH, "vision") for method in METHODS]
    run(second, tmp_path)
    assert second.seen == []


def test_other_settings_are_run(tmp_path: Path) -> None:
    run(Recorder(), tmp_path)
    again = Recorder()
    run(again, tmp_path, ("vision",), steps=7)
    assert again.seen == [("vision", method) for method in METHODS]


def test_an_interrupt_loses_the_run_under_way_alone(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Recorder(stop_at=4), tmp_path)
    assert len(read_all(tmp_path)) == 4
    rest = Recorder()
    run(rest, tmp_path)
    assert rest.seen == [("vision", "IA3"), ("vision", "LN tuning")]


@pytest.mark.parametrize("text", ["", "{", '{"task": "vision"', "[]", '{"task": "vision"}', "\x00\xff"])
def test_a_damaged_result_is_run_again(text: str, tmp_path: Path) -> None:
    run(Recorder(), tmp_path)
    path = make_run("vision", "IA3", tmp_path, 5).path(tmp_path)
    whole = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="latin-1")
    assert read_result(path) is None
    assert len(read_all(tmp_path)) == 5
    again = Recorder()
    run(again, tmp_path)
    assert again.seen == [("vision", "IA3")]
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(whole)


def test_a_failed_run_is_run_again(tmp_path: Path) -> None:
    run(Recorder(), tmp_path)
    failed = make_run("vision", "LoRA", tmp_path, 5)
    write_result(failed.path(tmp_path), new_result(failed, {"error": "MethodError: no"}))
    again = Recorder()
    run(again, tmp_path)
    assert again.seen == [("vision", "LoRA")]


def test_a_write_that_fails_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vision-lora.json"
    write_result(path, {"task": "vision", "method": "LoRA", "settings": {}})
    old = path.read_bytes()
    with pytest.raises(TypeError):
        write_result(path, {"task": object()})
    monkeypatch.setattr(os, "fsync", lambda handle: int("no room"))
    with pytest.raises(ValueError, match="no room"):
        write_result(path, {"task": "vision"})
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_learning_rate_is_the_best_of_the_search(tmp_path: Path) -> None:
    with pytest.raises(adaptc.ConfigError, match=r"no learning rate for LoRA: run the task 'rates' first"):
        make_run("vision", "LoRA", tmp_path)
    search = make_run(SEARCH, "LoRA", tmp_path)
    assert search.settings["learning_rate"] == list(RATES)
    losses = {f"{rate:g}": loss for rate, loss in zip(RATES, (0.7, 0.2, 0.7), strict=True)}
    write_result(search.path(tmp_path), new_result(search, {"validation_losses": losses}))
    assert make_run("vision", "LoRA", tmp_path).settings["learning_rate"] == RATES[1]
    factor = TASKS["text"][0].rate_factor
    assert make_run("text", "LoRA", tmp_path).settings["learning_rate"] == pytest.approx(RATES[1] * factor)
    own = COMPARED["Prefix tuning"].learning_rate
    assert own is not None
    assert make_run("text", "Prefix tuning", tmp_path).settings["learning_rate"] == own


def test_a_run_that_cannot_begin_is_a_failed_one(tmp_path: Path) -> None:
    recorder = Recorder()
    run(recorder, tmp_path, ("vision",))
    assert recorder.seen == []
    assert ["no learning rate" in r["error"] for r in read_all(tmp_path)] == [True] * 3


def test_methods_of_a_whole_program_are_not_on_the_vision_task() -> None:
    assert [applies(task, NEEDS_TOKENS) for task in TASKS] == [False, False, True]
    assert all(applies(task, "LoRA") for task in TASKS)


# -- a method in its process -------------------------------------------------------------------------------------------


def tiny_task(targets: list[str]) -> Task:
    """A task with one layer that is adapted, of no transformers model, so it cannot be captured without inputs."""
    return Task(
        name="vision",
        model=nn.Sequential(nn.Linear(5, 7)),
        layers=1,
        small_model=lambda layers: nn.Sequential(nn.Linear(5, 7)),
        targets={"layers": targets, "norms": targets},
        options={},
        train_rows=[],
        collate=lambda rows: {},
        score=lambda logits, part: Scores(0.0, 0.0, 0.0),
    )


def test_a_method_that_fails_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, SEARCH, (Plan(5, 2, 100), lambda: tiny_task(["0"])))
    failing = make_run(SEARCH, "IA3", tmp_path)
    run_method.run_and_write(failing, tmp_path)
    (found,) = read_all(tmp_path)
    assert found["error"].startswith("CaptureError: ")
    assert found["settings"] == failing.settings
    assert {"torch", "transformers", "adaptc"} <= found["versions"].keys()
    assert found["date"][:2] == "20"
    assert failing.stored(tmp_path) is None


def test_a_process_that_dies_is_a_result(tmp_path: Path) -> None:
    dying = make_run(SEARCH, "LoRA", tmp_path)
    runs.run_apart(dying, tmp_path, 1, worker="tests.comparison.no_such_module")
    (found,) = read_all(tmp_path)
    assert found["error"].startswith("the process ended with 1: ")
    assert "no_such_module" in found["error"]


ENDLESS = """
import os, sys, time
open(os.environ["PID_FILE"], "w").write(str(os.getpid()))
print(7, flush=True)
time.sleep(20)
open(os.environ["PID_FILE"] + ".ended", "w").close()
"""


def test_an_interrupt_ends_the_process_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(step: int) -> None:
        assert step == 7
        raise KeyboardInterrupt

    (tmp_path / "endless_worker.py").write_text(ENDLESS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    with pytest.raises(KeyboardInterrupt):
        runs.run_apart(make_run(SEARCH, "LoRA", tmp_path), tmp_path, 1, interrupted, worker="endless_worker")
    assert not (tmp_path / "pid.ended").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text(encoding="ascii")), 0)
    assert read_all(tmp_path) == []


@pytest.mark.long
def test_a_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The search with steps that are counted, and the comparison from the command line: all that a result has."""
    steps: list[int] = []
    runs.run_apart(make_run(SEARCH, "LoRA", tmp_path, 2), tmp_path, 1, steps.append)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (
        main(["--task", "vision", "--out", str(tmp_path), "--methods", "lora", "--steps", "2", "--threads", "1"]) == 0
    )
    results: dict[str, Any] = {r["task"]: r for r in read_all(tmp_path)}
    assert results[SEARCH]["validation_losses"].keys() == {f"{rate:g}" for rate in RATES}
    found = results["vision"]
    assert found["option"]["r"] in COMPARED["LoRA"].values
    budget = found["settings"]["budget"]
    assert budget / 1.5 < found["parameters"] < budget * 1.5
    assert found["file_bytes"] > 4 * found["parameters"]
    assert found["base_accuracy"] < 0.1
    assert found["base_known_loss"] < 0.5
    assert min(found[key] for key in ("step_seconds", "swap_seconds", "peak_bytes", "final_loss")) > 0
    assert {"torch", "transformers", "adaptc"} <= found["versions"].keys()
    assert "1 threads" in (tmp_path / "tables.md").read_text(encoding="utf-8")


# -- the command line --------------------------------------------------------------------------------------------------


def test_names_of_methods_are_found_in_any_case() -> None:
    assert parse(["--methods", "lora, ln Tuning"]).methods == ["LoRA", "LN tuning"]
    assert parse([]).methods == [*COMPARED]


def test_unknown_names_end_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--methods", "lora,loraa"], "loraa"),
        (["--task", "sound"], "sound"),
        (["--steps", "0"], "0 is not positive"),
        (["--steps", "3"], "give --out, too"),
    ):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert said in capsys.readouterr().err


def test_stopping_the_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tests.comparison.__main__.run_all", stopped)
    assert main(["--out", str(tmp_path)]) == 130
    assert "goes on from here" in capsys.readouterr().err
