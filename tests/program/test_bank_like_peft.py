"""PEFT's ``adapter_names`` and ``set_scale`` as the oracle of rows on adapters of their own, and of their weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adaptc
from tests.support.families import FAMILIES
from tests.support.oracle import assert_same, load_peft, randomize, shared_base_program

ROWS = ["one", "__base__", "two", "one", "two"]


@pytest.fixture(params=["llama", "bert"])
def family(request: Any) -> str:
    return request.param


def saved(family: str, folder: Path) -> dict[str, Path]:
    layers = {"llama": ["q_proj", "down_proj"], "bert": ["query", "dense"]}[family]
    out = {}
    for seed, (name, rank) in enumerate({"one": 3, "two": 5}.items()):
        config = peft.LoraConfig(r=rank, lora_alpha=7, target_modules=layers)
        model = peft.get_peft_model(FAMILIES[family].build(), config)
        randomize(model, seed)
        model.save_pretrained(str(folder / name))
        out[name] = folder / name
    return out


@pytest.mark.long
def test_as_adapter_names(family: str, tmp_path: Path) -> None:
    paths = saved(family, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = load_peft(FAMILIES[family].build(), paths["one"], "one")
        theirs.load_adapter(str(paths["two"]), "two")
        inputs = FAMILIES[family].inputs(len(ROWS), 9)
        with torch.no_grad():
            expected = theirs(**inputs, adapter_names=ROWS)
    program = adaptc.compile(shared_base_program(family), [paths["two"], paths["one"]])
    bank = program.bank(paths)
    ours = [None if n == "__base__" else n for n in ROWS]
    with torch.no_grad():
        assert_same(bank(**inputs, adapters=ours), expected)
        # A weight is a factor on the adapter's own scale.
        for layer in theirs.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_scale("one", 0.3)
                layer.set_scale("two", -2.0)
        weights = {"one": 0.3, "two": -2.0}
        mixes = [None if n is None else {n: weights[n]} for n in ours]
        assert_same(bank(**inputs, adapters=mixes), theirs(**inputs, adapter_names=ROWS))


@pytest.mark.long
def test_a_call_with_peft_s_keyword_says_what_is_there(tmp_path: Path) -> None:
    program = adaptc.compile(shared_base_program("llama"), adaptc.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(adaptc.AdaptcError, match=r"'adapter_names' is not taken: rows.*prog\.bank"):
        program(**FAMILIES["llama"].inputs(2, 5), adapter_names=["a", "b"])
