"""Configs that train side by side do as each in a run of its own; runs stop early, go on, and keep the best."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import adaptc
from adaptc import LoraConfig
from adaptc.joint_training.sweep_batches import row_indices
from adaptc.joint_training.sweep_directory import SweepDirectory
from adaptc.joint_training.sweep_report import SweepPoint, SweepReport, SweepResult
from adaptc.pictures.curve_picture import Panel, draw_curves
from adaptc.pictures.themes import LIGHT, THEMES
from adaptc.training import sweep
from tests.pictures.test_pictures import hexadecimal, overlaps, texts
from tests.support.training import VOCABULARY
from tests.training.test_service import base

CONFIGS: dict[str, Any] = {
    "r2": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "r5": LoraConfig(r=5, lora_alpha=9, target_modules=["q_proj"]),
    "loha": adaptc.LoHaConfig(r=3, target_modules=["v_proj"]),
}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(0, VOCABULARY, (4 + i % 5,), generator=draw)
        labels = ids.clone()
        labels[: i % 3] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


@pytest.mark.long
def test_losses_are_those_of_a_run_alone() -> None:
    rates = {"r2": 1e-2, "r5": 3e-3, "loha": 1e-2}
    options: dict[str, Any] = {"steps": 4, "batch_size": 3, "eval_steps": 2, "eval_dataset": rows(5, 1)}
    seen = []
    together = sweep(base(), CONFIGS, rows(8, 0), learning_rate=rates, on_step=lambda r: seen.append(r.step), **options)
    assert seen == [1, 2, 3, 4]
    for name, config in CONFIGS.items():
        alone = sweep(base(), {name: config}, rows(8, 0), learning_rate=rates[name], **options).results[name]
        own = together.results[name]
        assert own.loss == pytest.approx(alone.loss, rel=1e-9)
        assert own.eval_loss == pytest.approx(alone.eval_loss, rel=1e-9)
        assert own.steps == alone.steps == 4
        assert own.bytes > 0
    assert together.best in CONFIGS
    assert all(name in str(together) for name in CONFIGS)
    assert together.to_dict()["configs"]["r5"]["best"] == together.results["r5"].best


@pytest.mark.long
def test_a_run_goes_on_from_its_directory(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "eval_steps": 1, "eval_dataset": rows(3, 1), "learning_rate": 1e-2}
    whole = sweep(base(), CONFIGS, rows(5, 0), steps=4, **options)
    first = sweep(base(), CONFIGS, rows(5, 0), steps=2, directory=tmp_path, **options)
    assert first.step == 2
    again = sweep(base(), CONFIGS, rows(5, 0), steps=4, directory=tmp_path, **options)
    for name, result in whole.results.items():
        assert again.results[name].loss == pytest.approx(result.loss, rel=1e-9)
        assert again.results[name].best == pytest.approx(result.best, rel=1e-9)
        assert again.results[name].steps == 4
        assert adaptc.compile(base(), tmp_path / name).binding.methods
    assert [p.name for p in tmp_path.glob("state-*")] == ["state-4"]
    assert sweep(base(), CONFIGS, rows(5, 0), steps=4, directory=tmp_path, **options).step == 4
    with pytest.raises(adaptc.CheckpointError, match="other configs"):
        sweep(base(), {"r2": CONFIGS["r5"]}, rows(5, 0), steps=4, directory=tmp_path, **options)
    with pytest.raises(adaptc.CheckpointError, match="other dataset"):
        sweep(base(), CONFIGS, rows(5, 9), steps=4, directory=tmp_path, **options)


def test_a_config_that_gets_no_better_stops_and_the_others_go_on(tmp_path: Path) -> None:
    rates = {"r2": 0.0, "r5": 1e-2}
    configs = {n: CONFIGS[n] for n in rates}
    found = sweep(
        base(), configs, rows(4, 0), steps=5, learning_rate=rates, eval_dataset=rows(4, 0), eval_steps=1, patience=2,
        directory=tmp_path,
    )  # fmt: skip
    assert found.results["r2"].stopped
    assert found.results["r2"].steps == 3
    assert (found.results["r5"].stopped, found.results["r5"].steps) == (False, 5)
    assert found.best == "r5"
    assert "stopped early" in str(found)


def test_wrong_options_and_rows_are_refused() -> None:
    good = rows(2, 0)
    for wrong, match in (
        ({"steps": 0}, "steps=0"),
        ({"stepps": 1}, "no option 'stepps'; nearest are 'steps'"),
        ({"learning_rate": dict.fromkeys([*CONFIGS, "r22"], 1e-3)}, "'r22', which is no config; nearest are 'r2'"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"packing": 1}, "packing must be True or False"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type must be .* got .cosin."),
        ({"learning_rate": {"r2": 1e-3}}, "learning_rate of 'r5'"),
        ({"patience": -1}, "patience=-1"),
    ):
        with pytest.raises(adaptc.ConfigError, match=match):
            sweep(base(), CONFIGS, good, **{"steps": 1, **wrong})
    for data, match in (
        ([], "must be a list"),
        ([3], r"dataset\[0\]"),
        ([{"input_ids": [1]}], "at least two"),
        ([{"input_ids": [1, "x"]}], r"dataset\[0\] cannot be read"),
        ([{"input_ids": [1, 97]}], "input_ids up to 97; the model has 97"),
        ([{"input_ids": [1, 2], "labels": [1, -3]}], "has labels up to 1"),
    ):
        with pytest.raises(adaptc.AdaptcError, match=match):
            sweep(base(), CONFIGS, data, steps=1)
    with pytest.raises(adaptc.ConfigError, match="dict of configs"):
        sweep(base(), {}, good, steps=1)
    with pytest.raises(adaptc.ConfigError, match="dropout"):
        sweep(base(), {"a": LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)}, good, steps=1)


@pytest.mark.parametrize("name", ["../r2", "a/b", ".hidden", "sweep.json", "state-1", "curves.svg"])
def test_a_name_that_is_no_directory_of_a_config_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(adaptc.AdaptcError, match=re.escape(repr(name))):
        sweep(base(), {name: CONFIGS["r2"]}, rows(2, 0), steps=1, directory=tmp_path / "run")
    assert not [*tmp_path.iterdir()]


class Interrupted:
    """An ``on_step`` that is interrupted after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, report: Any) -> None:
        if report.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.long
def test_an_interrupted_run_goes_on_with_the_same_losses_and_curves(tmp_path: Path) -> None:
    configs = {"r2": CONFIGS["r2"]}
    options: dict[str, Any] = {
        "steps": 5,
        "batch_size": 2,
        "eval_dataset": rows(3, 1),
        "eval_steps": 2,
        "save_steps": 4,
    }
    options |= {"lr_scheduler_type": "linear", "warmup_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
    whole = sweep(base(), configs, rows(5, 0), **options)
    with pytest.raises(KeyboardInterrupt):
        sweep(base(), configs, rows(5, 0), directory=tmp_path, on_step=Interrupted(3), **options)
    assert [p.name for p in tmp_path.glob("state-*")] == ["state-3"]
    (tmp_path / "state-5").mkdir()  # as if a later state had not been finished
    (tmp_path / "state-5" / "rest").touch()
    again = sweep(base(), configs, rows(5, 0), directory=tmp_path, **options)
    assert again.points == {
        "r2": tuple((s, pytest.approx(a, rel=1e-9), e and pytest.approx(e, rel=1e-9)) for s, a, e in whole.points["r2"])
    }
    assert [p.eval_loss is None for p in again.points["r2"]] == [True, False, True, False, False]
    assert [p.name for p in tmp_path.glob("state-*")] == ["state-5"]
    with pytest.raises(adaptc.CheckpointError, match="other steps"):  # the learning rate would have fallen otherwise
        sweep(base(), configs, rows(5, 0), directory=tmp_path, **{**options, "steps": 6})


@pytest.mark.long
@pytest.mark.parametrize("call", [6, 8], ids=["in training", "in evaluation"])
def test_a_run_that_is_interrupted_inside_a_step_keeps_the_state_before(call: int, tmp_path: Path) -> None:
    """Of two programs, one has taken the step, or was evaluated, that is interrupted in the other."""
    configs, calls = {n: CONFIGS[n] for n in ("r2", "loha")}, list[int]()
    options: dict[str, Any] = {"steps": 3, "batch_size": 2, "save_steps": 1, "learning_rate": 1e-2}
    options |= {"eval_dataset": rows(2, 1), "eval_steps": 1}

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == call:  # the second program in the second step
            raise KeyboardInterrupt
        return outputs.logits.square().mean()

    with pytest.raises(KeyboardInterrupt):
        sweep(base(), configs, rows(5, 0), directory=tmp_path, loss=loss, **options)
    assert [p.name for p in tmp_path.glob("state-*")] == ["state-1"]
    again, whole = (sweep(base(), configs, rows(5, 0), directory=d, loss=loss, **options) for d in (tmp_path, None))
    assert again.points == whole.points


@pytest.mark.long
def test_damaged_states_are_named(tmp_path: Path) -> None:
    configs = {"r2": CONFIGS["r2"]}
    options: dict[str, Any] = {"steps": 2, "batch_size": 2, "directory": tmp_path}
    sweep(base(), configs, rows(3, 0), **options)
    file = tmp_path / "sweep.json"
    good = json.loads(file.read_text())
    damaged: list[Any] = [{k: v for k, v in good.items() if k != key} for key in good]
    damaged += [{**good, key: value} for key in good for value in (3.5, [], {"r2": None}, None)]
    damaged += [
        {**good, "step": -1},
        {**good, "states": "../x"},
        {**good, "results": {"r2": {"name": "r2", "steps": "x"}}},
    ]
    for wrong in ["", "{", "[]", "3", '{"a": [[[', *map(json.dumps, damaged)]:
        file.write_text(wrong)
        with pytest.raises(adaptc.CheckpointError, match=r"sweep.json|state"):
            sweep(base(), configs, rows(3, 0), **options)
    file.write_text(json.dumps({**good, "states": "state-7"}))
    with pytest.raises(adaptc.CheckpointError, match="does not exist"):
        sweep(base(), configs, rows(3, 0), **options)
    file.write_text(json.dumps(good))
    (tmp_path / "state-2" / "r2" / "training_state.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(adaptc.CheckpointError, match="is damaged"):
        sweep(base(), configs, rows(3, 0), **options)


@pytest.mark.long
def test_accumulated_gradients_and_schedules_are_those_of_pefts_trainer(tmp_path: Path) -> None:
    """Each step has all rows, in two batches, so that the order of the rows does not matter."""
    data = rows(6, 0)
    made = adaptc.compile(base(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]), training=True)
    bank: Any = made.bank(training=True)  # the first values of the sweep's adapter, for PEFT's
    config: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}
    bank.add("a", LoraConfig(**config), seed=4)
    bank.save_adapter("a", tmp_path / "first")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base()), tmp_path / "first", is_trainable=True)

    def collated(batch: list[Any]) -> Any:
        padded = {n: [r[n].tolist() for r in batch] for n in ("input_ids", "labels")}
        longest = max(map(len, padded["input_ids"]))
        mask = [[1] * len(r) + [0] * (longest - len(r)) for r in padded["input_ids"]]
        fill = {"input_ids": 0, "labels": -100}
        found = {n: torch.tensor([r + [fill[n]] * (longest - len(r)) for r in rows_]) for n, rows_ in padded.items()}
        return {**found, "attention_mask": torch.tensor(mask)}

    schedule: dict[str, Any] = {"lr_scheduler_type": "linear", "warmup_steps": 1, "weight_decay": 0.1}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        learning_rate=2e-2, logging_steps=1, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=3,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", remove_unused_columns=False, **schedule,
    )  # fmt: skip
    trainer = transformers.Trainer(
        theirs,
        args,
        train_dataset=data,
        eval_dataset=rows(5, 1),
        data_collator=collated,  # type: ignore[arg-type]
    )
    trainer.train()
    log = trainer.state.log_history
    for packing in (True, False):
        report = sweep(
            base(), {"a": LoraConfig(**config)}, data, steps=4, batch_size=3, gradient_accumulation_steps=2, seed=4,
            learning_rate=2e-2, eval_dataset=rows(5, 1), eval_steps=1, packing=packing, **schedule,
        )  # fmt: skip
        # Trainer logs rounded values of what it adds up.
        assert [p.loss for p in report.points["a"]] == pytest.approx([e["loss"] for e in log if "loss" in e], abs=1e-4)
        assert [p.eval_loss for p in report.points["a"]] == pytest.approx(
            [e["eval_loss"] for e in log if "eval_loss" in e], rel=1e-6
        )


@pytest.mark.long
def test_what_is_not_finite_skips_whole_steps_of_its_config() -> None:
    """The loss of one config is NaN in the second batch of a step, whose first batch must leave no gradients."""

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        value = outputs.logits.square().mean()
        return value * float("nan") if batch["input_ids"].eq(11).any() else value

    data = [{"input_ids": torch.tensor(ids)} for ids in ([3, 4, 5], [6, 7], [11, 3], [5, 9, 8])]
    options: dict[str, Any] = {"steps": 4, "batch_size": 1, "gradient_accumulation_steps": 2, "loss": loss, "seed": 3}
    report = sweep(base(), {"r2": CONFIGS["r2"]}, data, learning_rate=1e-2, **options)
    found = report.results["r2"]
    assert (found.steps, found.skipped_steps) == (2, 2)
    bank: Any = adaptc.compile(base(), CONFIGS["r2"], training=True).bank(training=True)
    bank.add("r2", CONFIGS["r2"], seed=3, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0))
    expected: list[Any] = []
    for step in range(4):
        rows_of_step = [data[i]["input_ids"] for i in row_indices(4, 2, 3, step)]
        if any(11 in row.tolist() for row in rows_of_step):
            expected.append(None)
            continue
        losses = [
            bank.forward_backward(
                {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])},
                ["r2"],
                lambda out, _: out.logits.square().mean() / 2,
            )["r2"].value()
            for row in rows_of_step
        ]
        torch.nn.utils.clip_grad_norm_(bank.trainer("r2").parameters.values(), 1.0)
        bank.step()
        expected.append(sum(losses))
    assert [p.loss for p in report.points["r2"]] == [e if e is None else pytest.approx(e, rel=1e-9) for e in expected]
    labels = torch.full((3,), -100)
    none = [{"input_ids": torch.tensor([3, 4, 5]), "labels": labels}]
    alone = sweep(base(), {"r2": CONFIGS["r2"]}, none, steps=1, batch_size=1, eval_dataset=none).results["r2"]
    assert (alone.steps, alone.skipped_steps, alone.best) == (0, 1, None)


def points(count: int, scale: float) -> tuple[Any, ...]:
    return tuple(SweepPoint(i + 1, scale / (i + 1), scale if i % 5 == 4 else None) for i in range(count))


def test_a_picture_has_the_curves_of_all_configs(tmp_path: Path) -> None:
    names = [f"config {i}" for i in range(9)] + ["a name that is much longer than the others are"]
    results = {n: SweepResult(n, 7, 1.0, 2.0, best=float(9 - i)) for i, n in enumerate(names)}
    report = SweepReport(results, 700, 900, {n: points(700, i + 1.0) for i, n in enumerate(names)})
    for theme in THEMES:
        svg = report.draw(tmp_path / f"{theme}.svg", theme).read_bytes()  # type: ignore[arg-type]
        shown = texts(svg)
        assert {"10 configs after 700 of 900 steps", "loss", "eval loss", "step"} <= set(shown)
        assert {*names[:9], "a name that is much longe... (best)"} <= set(shown)
        strokes = re.findall(rb"stroke: (#\w+)", svg)
        for i, colour in enumerate(THEMES[theme].series):
            assert strokes.count(hexadecimal(colour).encode()) == (6 if i < 2 else 3)  # two panels and the legend
        assert svg.count(b"stroke-dasharray") >= 6
    panels = [Panel("loss", {n: [(1.0, 2.0), (2.0, 1.0)] for n in names}), Panel("eval loss", {names[0]: [(2.0, 3.0)]})]
    assert not overlaps(draw_curves("10 configs", panels, names[0], LIGHT))
    with pytest.raises(adaptc.ConfigError, match="theme='grey'"):
        report.draw(tmp_path / "x.svg", "grey")  # type: ignore[arg-type]
    with pytest.raises(adaptc.AdaptcError, match="no step"):
        SweepReport(results, 0, 900).draw(tmp_path / "x.svg")
    assert len([*tmp_path.iterdir()]) == 2


def test_a_refused_sweep_leaves_the_directory_to_the_first(tmp_path: Path) -> None:
    """Also where that has written nothing yet."""
    first, second, third = (SweepDirectory(tmp_path / "run", ["r2"], {}) for _ in range(3))
    with first.held(True):
        for other in (second, third, second):
            for is_new in (True, False):
                with pytest.raises(adaptc.ConfigError, match="another sweep runs in"), other.held(is_new):
                    pass
    with second.held(True), pytest.raises(adaptc.ConfigError, match="another sweep runs in"), third.held(True):
        pass
    (tmp_path / "run/sweep.json").write_text("{}")  # of a run that began and ended meanwhile
    with pytest.raises(adaptc.ConfigError, match="another sweep runs in"), third.held(True):
        pass
    with third.held(False):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(adaptc.CheckpointError), SweepDirectory(tmp_path / "file", ["r2"], {}).held(True):
        pass


def test_two_sweeps_in_one_directory(tmp_path: Path) -> None:
    refused: list[str] = []

    def another(report: SweepReport) -> None:
        with pytest.raises(adaptc.ConfigError, match="another sweep runs in") as error:
            sweep(base(), {"r2": CONFIGS["r2"]}, rows(4, 0), steps=1, directory=tmp_path / "run")
        refused.append(str(error.value))

    options: dict[str, Any] = {"steps": 2, "directory": tmp_path / "run"}
    sweep(base(), {"r2": CONFIGS["r2"]}, rows(4, 0), on_step=another, **options)
    assert len(refused) == 2
    assert sweep(base(), {"r2": CONFIGS["r2"]}, rows(4, 0), **options).step == 2  # it is free again
    with pytest.raises(adaptc.AdaptcError):
        sweep(base(), {"r2": LoraConfig(target_modules=["nothing"])}, rows(4, 0), steps=2, directory=tmp_path / "new")
    assert not (tmp_path / "new").exists()


RUN = """
import sys, time
from tests.training.test_sweep import CONFIGS, base, rows
from adaptc.training import sweep
def wait(report):
    print(report.step, flush=True)
    if report.step == 2:
        time.sleep(600)
sweep(base(), {"r2": CONFIGS["r2"]}, rows(4, 0), steps=3, eval_steps=1, directory=sys.argv[1], on_step=wait)
"""


@pytest.mark.long
def test_a_killed_sweep_leaves_the_directory_free(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    options: dict[str, Any] = {"steps": 3, "eval_steps": 1, "directory": tmp_path}
    try:
        while killed.stdout.readline().strip() != "2":
            assert killed.poll() is None
        with pytest.raises(adaptc.ConfigError, match="another sweep runs in"):
            sweep(base(), {"r2": CONFIGS["r2"]}, rows(4, 0), **options)
    finally:
        killed.kill()
        killed.communicate()
    steps: list[int] = []
    sweep(base(), {"r2": CONFIGS["r2"]}, rows(4, 0), on_step=lambda r: steps.append(r.step), **options)
    assert steps == [3]
