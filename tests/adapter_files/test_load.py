"""Adapters in any form are loaded by one function: the same tensors, checked and renamed once, the same refusals."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptc
from adaptc import AdaptcError, CheckpointError, ConfigError
from adaptc.adapter_files.adapter_data import FILE_KEYS, PEFT_KEYS, STATE_DICT_KEYS
from adaptc.adapter_files.directory import read_adapter
from adaptc.adapter_files.load import has_tensors, load
from tests.support.adapter_files import CONFIG as CONFIG_FILE
from tests.support.adapter_files import SAFE, tensors_are_equal
from tests.support.custom_models import UpDown

CONFIG = adaptc.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
IDS = torch.randn(3, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return adaptc.save_adapter(
        adaptc.compile(UpDown(), CONFIG, example_inputs=IDS), tmp_path_factory.mktemp("load") / "a"
    )


FORMS: dict[str, tuple[str, Any]] = {
    "directory": (PEFT_KEYS, lambda folder, lone: folder),
    "text": (PEFT_KEYS, lambda folder, lone: str(folder)),
    "weights beside their config": (PEFT_KEYS, lambda folder, lone: folder / SAFE),
    "file alone": (FILE_KEYS, lambda folder, lone: lone),
    "object": (PEFT_KEYS, lambda folder, lone: adaptc.load_adapter(folder)),
    "loaded": (PEFT_KEYS, lambda folder, lone: read_adapter(folder)),
    "state dict": (STATE_DICT_KEYS, lambda folder, lone: load_file(folder / SAFE)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_tensors(form: str, folder: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone.safetensors"
    save_file(load_file(folder / SAFE), lone)
    keys, make = FORMS[form]
    source = make(folder, lone)
    assert has_tensors(source)
    data = load(source)
    assert data.format == keys
    assert (data.config is None) == (keys != PEFT_KEYS)
    prefix = "" if keys == PEFT_KEYS else "base_model.model."
    expected = {prefix + k: t for k, t in read_adapter(folder).tensors.items()}
    assert tensors_are_equal(data.tensors, expected)
    # An expression that matches its own result would show that keys are renamed twice. No prefix is renamed.
    renamed = load(source, key_mapping={"^(base|up|down)": r"down.\1"}).tensors
    assert renamed.keys() == {f"{prefix}down.{k.removeprefix(prefix)}" for k in expected}
    with pytest.raises(CheckpointError, match="both become"):
        load(source, key_mapping={r"lora_[AB]": "w"})


def test_options_that_do_not_go_with_the_source(folder: Path) -> None:
    for source in (load_file(folder / SAFE), adaptc.load_adapter(folder)):
        with pytest.raises(ConfigError, match="adapter_name='one' chooses from a directory"):
            load(source, adapter_name="one")
    program = adaptc.compile(UpDown(), CONFIG, example_inputs=IDS)
    for source in (folder, adaptc.load_adapter(folder)):
        with pytest.raises(ConfigError, match=r"component=.unet.: .*name no component"):
            adaptc.swap(program, source, component="unet")
    for other in (3, None, CONFIG):
        assert not has_tensors(other)
        with pytest.raises(AdaptcError, match="an adapter is a directory, a file, a state dict"):
            load(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_name": 5}, "adapter_name must be a string or None, got 5"),
        ({"component": ["unet"]}, r"component must be a string or None, got \['unet'\]"),
        ({"key_mapping": ["up"]}, "key_mapping must be a dict of strings or None, got"),
        ({"key_mapping": {"up": 3}}, r"key_mapping\['up'\] must be a string, got 3"),
    ],
)
def test_options_of_another_type(folder: Path, options: dict[str, Any], message: str) -> None:
    program = adaptc.compile(UpDown(), CONFIG, example_inputs=IDS)
    calls: list[Callable[[], Any]] = [lambda: adaptc.swap(program, folder, **options)]
    if "component" not in options:
        calls.append(lambda: load(folder, **options))
    for call in calls:
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.parametrize("form", ["state dict", "object"])
def test_tensors_that_were_compiled_may_be_edited(form: str, folder: Path) -> None:
    tensors = load_file(folder / SAFE)
    source: Any = tensors if form == "state dict" else adaptc.Adapter(CONFIG, tensors)
    config = CONFIG if form == "state dict" else None
    p = adaptc.compile(UpDown(), source, config=config, example_inputs=IDS)
    expected = p(IDS)
    for t in tensors.values():
        t.mul_(3)
    assert torch.equal(p(IDS), expected)


def test_keys_of_a_state_dict_are_renamed_for_combinations(folder: Path) -> None:
    tensors = load_file(folder / SAFE)
    odd = {k.replace(".up.", ".over.").replace(".down.", ".under."): t for k, t in tensors.items()}
    mapping = {"^over": "up", "^under": "down"}
    got = adaptc.combine([(odd, 1.0)], method="cat", config=CONFIG, key_mapping=mapping)
    assert tensors_are_equal(got.tensors, adaptc.combine([(tensors, 1.0)], method="cat", config=CONFIG).tensors)


def test_a_field_that_is_dropped_is_told_once(folder: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(folder, tmp_path / "odd")
    fields = json.loads((odd / CONFIG_FILE).read_text())
    (odd / CONFIG_FILE).write_text(json.dumps({**fields, "field_of_tomorrow": 1}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        program = adaptc.compile(UpDown(), odd, example_inputs=IDS)
        assert ["field_of_tomorrow" in str(w.message) for w in said] == [True]
        adaptc.swap(program, odd)
        assert ["field_of_tomorrow" in str(w.message) for w in said] == [True, True]
