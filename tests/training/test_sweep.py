"""Configs that train side by side do as each in a run of its own; runs stop early, go on, and keep the best."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc import LoraConfig
from adaptc.training import sweep
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
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(adaptc.CheckpointError, match="damaged"):
        sweep(base(), CONFIGS, rows(5, 0), steps=4, directory=tmp_path, **options)


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
        ({"stepps": 1}, "stepps"),
        ({"learning_rate": {"r2": 1e-3}}, "learning_rate of 'r5'"),
        ({"patience": -1}, "patience=-1"),
    ):
        with pytest.raises(adaptc.ConfigError, match=match):
            sweep(base(), CONFIGS, good, **{"steps": 1, **wrong})
    for data, match in (([], "must be a list"), ([3], r"dataset\[0\]"), ([{"input_ids": [1]}], "at least two")):
        with pytest.raises(adaptc.AdaptcError, match=match):
            sweep(base(), CONFIGS, data, steps=1)
    with pytest.raises(adaptc.ConfigError, match="dict of configs"):
        sweep(base(), {}, good, steps=1)
    with pytest.raises(adaptc.ConfigError, match="dropout"):
        sweep(base(), {"a": LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)}, good, steps=1)


@pytest.mark.parametrize("name", ["../r2", "a/b", ".hidden", "sweep.json", "state-1"])
def test_a_name_that_is_no_directory_of_a_config_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(adaptc.AdaptcError, match=re.escape(repr(name))):
        sweep(base(), {name: CONFIGS["r2"]}, rows(2, 0), steps=1, directory=tmp_path / "run")
    assert not [*tmp_path.iterdir()]
