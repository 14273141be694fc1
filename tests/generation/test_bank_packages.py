"""Packages of banks that generate: each prompt on its own adapters in compiled code, and others put in afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from tests.generation.models import case, generated, generator, prompt
from tests.generation.packaged import tokenizer
from tests.generation.test_bank import NAMES, Mixed
from tests.generation.test_encoder_decoders import read, said


@cache
def further() -> Path:
    """A third adapter, of a rank of its own."""
    gen, folder = generator(), Path(mkdtemp())
    config = adaptc.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(11)
    made = adaptc.compile(case("llama").model, config, example_inputs={"input_ids": prompt(2, 5)["input_ids"]})
    assert {a.module for a in made.adaptation.attachments} == {a.module for a in gen.program.adaptation.attachments}
    return adaptc.save_adapter(made, folder / "third")


@cache
def written(family: str) -> Path:
    path = Path(mkdtemp()) / f"{family}.pt2"
    bank = generator(family).bank(case(family).adapters)
    return adaptc.package(bank, path, capacity=3, max_rank=5, tokenizer=tokenizer())


def loaded(family: str = "llama") -> Any:
    return adaptc.load_package(written(family))


@pytest.mark.long
def test_tokens_are_those_of_the_bank() -> None:
    """Greedy, drawn, in beams, with padding, and a third adapter beside them."""
    bank, packaged = generator().bank(case("llama").adapters), loaded()
    for rows, length, padding in ((4, 6, (0, 2)), (4, 1, ()), (4, 13, (3,))):
        given = prompt(rows, length, padding, seed=length)
        for how in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
            assert torch.equal(
                generated(Mixed(packaged, NAMES), given, **how), generated(Mixed(bank, NAMES), given, **how)
            )
    assert packaged.tokenizer("w7 w2")["input_ids"] == [7, 2]
    for one in (bank, packaged):
        one.add("third", further())
    mixed: list[Any] = ["third", None, {"third": 0.4, "first": 0.8}, "second"]
    given = prompt(4, 6)
    out = generated(Mixed(packaged, mixed), given)
    assert torch.equal(out, generated(Mixed(bank, mixed), given))
    assert not torch.equal(out, generated(Mixed(packaged, NAMES), given))
    cache = packaged.prefill(given["input_ids"][:, :4], adapters=mixed)
    assert torch.equal(generated(Mixed(packaged, mixed), given, past_key_values=cache), out)


@pytest.mark.long
def test_a_generation_keeps_its_adapters() -> None:
    """What is replaced or removed while it goes on stays in its place until it has ended."""
    packaged, dirs, given = loaded(), case("llama").adapters, prompt(4, 6)
    expected = generated(Mixed(packaged, NAMES), given)
    seen: list[str] = []

    def changing(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 8:
            packaged.replace("first", dirs["second"])
            packaged.remove("second")
            with pytest.raises(adaptc.ConfigError, match="that go on keep 2 that are gone"):
                packaged.add("third", further())
            seen.append("changed")
        return scores

    assert torch.equal(generated(Mixed(packaged, NAMES), given, logits_processor=[changing]), expected)
    assert seen == ["changed"]
    gc.collect()
    packaged.add("third", further())
    packaged.add("again", dirs["first"])
    back: list[Any] = ["again", None, "first", {"again": 0.6, "first": -0.4}]
    assert torch.equal(generated(Mixed(packaged, back), given), expected)


def test_refused_by_name(tmp_path: Path) -> None:
    packaged, given = loaded(), prompt(4, 6)
    with pytest.raises(adaptc.ConfigError, match="give a row a weight"):
        generated(Mixed(packaged, NAMES), given, adapter_scale=0.5)
    with pytest.raises(adaptc.ConfigError, match="a tokenizer goes into"):
        adaptc.package(generator().program.bank(), tmp_path / "one.pt2", tokenizer=tokenizer())
    with pytest.raises(adaptc.ConfigError, match="empty"):
        adaptc.package(generator().bank(), tmp_path / "one.pt2")
    with pytest.raises(adaptc.AdaptcError, match="package a bank"):
        packaged.generator.bank()
    with pytest.raises(adaptc.ConfigError, match="of a package already"):
        adaptc.package(packaged, tmp_path / "one.pt2")
    assert not list(tmp_path.iterdir())
    assert packaged.report().data()["adapters"].keys() == {"first", "second"}


FRESH = """
import sys, torch, adaptc
path, third, out = sys.argv[1:]
bank = adaptc.load_package(path)
bank.add("third", third)
text = bank.tokenizer(["w5 w17 w9"] * 3, return_tensors="pt")
how = dict(do_sample=False, max_new_tokens=9, eos_token_id=None, pad_token_id=0)
torch.save(bank.generate(text["input_ids"], adapters=["third", None, {"first": 0.5, "third": 0.5}], **how), out)
strange = [n for n in sys.modules if ".modeling_llama" in n]
assert not strange, strange
"""


@pytest.mark.long
def test_in_a_fresh_process(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(written("llama")), str(further()), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bank = generator().bank({**case("llama").adapters, "third": further()})
    mixed: list[Any] = ["third", None, {"first": 0.5, "third": 0.5}]
    expected = generated(Mixed(bank, mixed), torch.tensor([[5, 17, 9]] * 3))
    assert torch.load(out).tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_models_with_an_encoder(family: str) -> None:
    """Three models of code, of which each takes the coefficients of its rows."""
    bank, packaged, dirs = generator(family).bank(case(family).adapters), loaded(family), case(family).adapters
    given = read(family, 4, 9, (4, 0, 1))
    for how in ({}, {"num_beams": 3}):
        assert torch.equal(said(Mixed(packaged, NAMES), given, **how), said(Mixed(bank, NAMES), given, **how))
    packaged.replace("first", dirs["second"])
    packaged.add("third", dirs["first"])
    turned: list[Any] = ["third", None, "first", {"third": 0.6, "first": -0.4}]
    assert torch.equal(said(Mixed(packaged, turned), given), said(Mixed(bank, NAMES), given))
    with pytest.raises(adaptc.AdaptcError, match="part by part"):
        packaged(**given, adapters=NAMES)
