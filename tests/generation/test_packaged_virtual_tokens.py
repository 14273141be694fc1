"""Packages of what generates behind prompts and prefixes: the tokens of PEFT and of the program, with any number of
tokens in front."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

import adaptc
from adaptc.errors import AdaptcError, BackendError, CheckpointError, ConfigError, SwapError
from tests.generation.models import generated
from tests.generation.packaged import tokenizer
from tests.generation.test_prefixes import continued
from tests.generation.test_prompted_encoders import said as said_across
from tests.generation.test_virtual_tokens import HOWS, METHODS, TASKS, peft_said, said
from tests.support.archives import MANIFEST, read_records, with_right_hashes, write_records
from tests.support.families import FAMILIES
from tests.support.oracle import Oracle
from tests.support.prompts import prompt_oracle, text

CARTRIDGE = {"num_virtual_tokens": 9, "num_frozen_tokens": 1}
FAMILY = {"PromptTuningConfig": "llama", "PrefixTuningConfig": "gpt2"}


@cache
def generator(cls: str) -> Any:
    """Behind three tokens. Tests that swap it give them back."""
    config = getattr(adaptc, cls)(num_virtual_tokens=3)
    made = torch.Generator().manual_seed(2)
    model = FAMILIES[FAMILY[cls]].build()
    return adaptc.compile_for_generation(model, config, max_batch=12, max_length=60, generator=made)


@cache
def written(cls: str) -> Path:
    return adaptc.package(generator(cls), Path(mkdtemp()) / "package.pt2", tokenizer=tokenizer())


@cache
def packaged(cls: str) -> Any:
    return adaptc.load_package(written(cls))


@cache
def oracle(cls: str, count: int) -> Oracle:
    return prompt_oracle(FAMILY[cls], Path(mkdtemp()), cls, num_virtual_tokens=count, seed=count)


@pytest.mark.long
def test_prompts_say_what_peft_says() -> None:
    """As packaged, and swapped to other numbers of tokens: greedy, drawn, in beams, with padding."""
    cls, gen, package = "PromptTuningConfig", generator("PromptTuningConfig"), packaged("PromptTuningConfig")
    adaptc.swap(package, gen)  # as packaged
    for inputs in (text(3, 7, "left"), text(1, 1, None)):
        for how in HOWS:
            assert torch.equal(said(package, inputs, **how), said(gen, inputs, **how))
    plain = said(gen.base, text(3, 7, "left"))
    for count in (7, 1, 13):
        theirs = oracle(cls, count)
        adaptc.swap(package, theirs.path)
        for inputs in (text(3, 7, "left"), text(2, 4, None)):
            for how in HOWS:
                assert torch.equal(said(package, inputs, **how), peft_said(theirs.model, inputs, **how))
        assert torch.equal(said(package.base, text(3, 7, "left")), plain)
        assert not torch.equal(said(package, text(3, 7, "left")), plain)
    bound = package.bind(oracle(cls, 7).path)
    adaptc.swap(package, oracle(cls, 1).path)
    assert torch.equal(said(bound, inputs), peft_said(oracle(cls, 7).model, inputs))
    assert torch.equal(said(package, inputs), peft_said(oracle(cls, 1).model, inputs))


@pytest.mark.long
def test_prefixes_say_what_peft_says() -> None:
    cls, gen, package = "PrefixTuningConfig", generator("PrefixTuningConfig"), packaged("PrefixTuningConfig")
    adaptc.swap(package, gen)
    ids = text(2, 5, None)["input_ids"]
    for how in HOWS:
        assert torch.equal(generated(package, text(3, 7, "left"), **how), generated(gen, text(3, 7, "left"), **how))
    for count in (5, 1, 13):
        theirs = oracle(cls, count)
        adaptc.swap(package, theirs.path)
        assert torch.equal(generated(package, ids, new=6), continued(theirs.model, ids, 6))
        assert torch.equal(generated(package.base, ids, new=6), continued(FAMILIES["gpt2"].build(), ids, 6))
    past = package.prefill(ids[:, :3])
    assert (past.prefix_length, past.length) == (13, 16)
    for one in (past.copy(), past):
        assert torch.equal(generated(package, ids, new=6, past_key_values=one), continued(theirs.model, ids, 6))


@pytest.mark.long
def test_reports_and_refusals(tmp_path: Path) -> None:
    """Tokens in front count among positions; a prompt of another width, or that is not finite, changes nothing."""
    cls, gen, package = "PromptTuningConfig", generator("PromptTuningConfig"), packaged("PromptTuningConfig")
    adaptc.swap(package, oracle(cls, 13).path)
    inputs = text(2, 7, None)
    before = said(package, inputs)
    with pytest.raises(AdaptcError, match=r"6[34] positions, 13 of them of tokens that the adapter has in front"):
        said(package, inputs, 44)
    for bad, message in (
        (torch.randn(5, 23), r"prompt_embeddings.*\(5, 23\)"),
        (torch.full((5, 24), float("nan")), "120 values that are NaN or infinite"),
    ):
        with pytest.raises(AdaptcError, match=message):
            adaptc.swap(package, {"prompt_embeddings": bad})
    assert torch.equal(said(package, inputs), before)
    adaptc.swap(package, {"prompt_embeddings": torch.randn(60, 24)})
    with pytest.raises(AdaptcError, match=r"puts 60 tokens in front, which leaves no room"):
        said(package, inputs)
    adaptc.swap(package, gen)
    result = adaptc.verify(package, gen)
    assert result.ok
    assert [c.passed for c in result.checks] == [True, True, None]
    assert "prompt_tuning" in str(adaptc.report(package))
    with pytest.raises(ConfigError, match="no site of the program has a rank to pad"):
        adaptc.package(gen, tmp_path / "other.pt2", max_rank=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_damage_and_forgery(tmp_path: Path) -> None:
    """A manifest that says otherwise of what the code reads is refused, and so is one that lacks the prompt."""
    records = read_records(written("PromptTuningConfig"))
    data = json.loads(records[MANIFEST])
    assert [r["unread"] for r in data["rooms"].values()] == [True]
    name = next(iter(data["rooms"]))
    for change, error, message in (
        ({"unread": 3}, CheckpointError, "unread"),
        ({"shape": [4, 24]}, CheckpointError, "of another shape"),
        ({"unread": False}, BackendError, "has no constant 'prompt_encoder"),
    ):
        changed = {**data, "rooms": {name: {**data["rooms"][name], **change}}}
        forged = with_right_hashes({**records, MANIFEST: json.dumps(changed).encode()})
        with pytest.raises(error, match=message):
            adaptc.load_package(write_records(tmp_path / "forged.pt2", forged))
    tensors = next(n for n in records if n.endswith(".safetensors"))
    records[tensors] = records[tensors][:-1] + bytes([records[tensors][-1] ^ 1])
    with pytest.raises(CheckpointError, match="does not have the hash"):
        adaptc.load_package(write_records(tmp_path / "damaged.pt2", records))


FRESH = """
import sys, torch, adaptc
path, other, out = sys.argv[1:]
gen = adaptc.load_package(path)
text = gen.tokenizer("w5 w17 w9", return_tensors="pt")
how = dict(do_sample=False, max_new_tokens=7, eos_token_id=None, pad_token_id=0)
found = [gen.generate(**text, **how)]
adaptc.swap(gen, other)
found += [gen.generate(**text, **how), gen.generate(**text, **how, num_beams=3), gen.base.generate(**text, **how)]
torch.save(found, out)
strange = [n for n in sys.modules if ".modeling_llama" in n]
assert not strange, strange
"""


@pytest.mark.long
def test_in_a_fresh_process(tmp_path: Path) -> None:
    """None of the model's code is there."""
    cls, gen, out = "PromptTuningConfig", generator("PromptTuningConfig"), tmp_path / "out.pt"
    theirs = oracle(cls, 7)
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(written(cls)), str(theirs.path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[5, 17, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = [
        said(gen, inputs),
        *(peft_said(theirs.model, inputs, **how) for how in ({}, {"num_beams": 3})),
        said(gen.base, inputs),
    ]
    assert [t.tolist() for t in torch.load(out)] == [t.tolist() for t in expected]


@pytest.mark.slow
@pytest.mark.parametrize("cls", ["CPTConfig", "MultitaskPromptTuningConfig", "CartridgeConfig"])
def test_all_kinds(cls: str, tmp_path: Path) -> None:
    """In layers with rings, too. A cartridge's tokens are those of the program: PEFT has no windows there."""
    own = {"MultitaskPromptTuningConfig": {"num_virtual_tokens": 9, **TASKS}, "CartridgeConfig": CARTRIDGE}
    options: dict[str, Any] = {**METHODS, **own}[cls]
    first = options if cls == "CPTConfig" else {**options, "num_virtual_tokens": 3}
    gen = adaptc.compile_for_generation(
        FAMILIES["gemma3_text"].build(),
        getattr(adaptc, cls)(**first, task_type="CAUSAL_LM"),
        max_batch=12,
        max_length=60,
    )
    package = adaptc.load_package(adaptc.package(gen, tmp_path / "package.pt2"))
    theirs = prompt_oracle("gemma3_text", tmp_path / "peft", cls, **options)
    for one in (gen, package):
        adaptc.swap(one, theirs.path)
    inputs: dict[str, Any] = text(3, 7, "left")
    if cls == "MultitaskPromptTuningConfig":
        inputs["task_ids"] = torch.tensor([2, 0, 1])
        with pytest.raises(AdaptcError, match="task_ids has 7, and the adapter has tasks from 0 to 2"):
            said(package, {**inputs, "task_ids": torch.tensor([2, 7, 1])})
    for how in HOWS:
        expected = said(gen, inputs, **how) if cls == "CartridgeConfig" else peft_said(theirs.model, inputs, **how)
        assert torch.equal(said(package, inputs, **how), expected)


@pytest.mark.slow
def test_a_model_with_a_state(tmp_path: Path) -> None:
    config = adaptc.PromptTuningConfig(num_virtual_tokens=3)
    gen = adaptc.compile_for_generation(FAMILIES["mamba"].build(), config, max_length=60)
    package = adaptc.load_package(adaptc.package(gen, tmp_path / "package.pt2"))
    theirs = prompt_oracle("mamba", tmp_path / "peft", num_virtual_tokens=5, num_attention_heads=1)
    adaptc.swap(package, theirs.path)
    ids = text(2, 5, None)["input_ids"]
    assert torch.equal(generated(package, ids, new=6), continued(theirs.model, ids, 6))


@pytest.mark.slow
def test_encoders(tmp_path: Path) -> None:
    """The encoder's code reads the tokens in front, whose number is that of the package."""
    cls, options = "MultitaskPromptTuningConfig", {"task_type": "SEQ_2_SEQ_LM", **TASKS}
    config = adaptc.MultitaskPromptTuningConfig(num_virtual_tokens=3, **options)
    gen = adaptc.compile_for_generation(FAMILIES["bart"].build(), config, max_batch=12, max_length=40)
    package = adaptc.load_package(adaptc.package(gen, tmp_path / "package.pt2"))
    same, longer = (
        prompt_oracle("bart", tmp_path / str(n), cls, num_virtual_tokens=n, seed=n, **options) for n in (3, 5)
    )
    adaptc.swap(package, same.path)
    tasks = {"task_ids": torch.tensor([2, 0, 1])}
    for inputs in (text(3, 7, "left"), text(3, 5, "right"), text(3, 4, None)):
        for how in HOWS:
            expected = said_across(same.model, {**inputs, **tasks}, **how)
            assert torch.equal(said_across(package, {**inputs, **tasks}, **how), expected)
    with pytest.raises(SwapError, match=r"3, 24.* alone; package the program with this adapter"):
        adaptc.swap(package, longer.path)
    with pytest.raises(SwapError, match="the package does not know which 'prompt_embeddings'"):
        _ = package.base
    # The model has 64 positions, and compiled code would end the process for more.
    with pytest.raises(AdaptcError, match="62 tokens are more than the 61 that the encoder is for"):
        said_across(package, {**text(3, 62, None), **tasks})
    with pytest.raises(AdaptcError, match="'task_ids' has 7"):
        said_across(package, {**text(3, 5, None), "task_ids": torch.tensor([0, 7, 0])})
    adaptc.swap(gen, same.path)
    assert adaptc.verify(package, gen).ok
