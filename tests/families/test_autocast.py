"""Programs, banks and generators called under ``torch.autocast``: what PEFT's model computes there, in its dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adaptc
from tests.support.families import FAMILIES
from tests.support.oracle import TARGETS, Oracle, run, shared_base_program, tensors_of

# PEFT's own forward fails for Mamba, and leaves SigLIP's pooling head without its adapter.
NAMES = sorted(FAMILIES.keys() - {"mamba", "siglip_vision"})


def wrap(name: str, path: Path) -> Oracle:
    targets = TARGETS.get(name, "all-linear")
    return Oracle.wrap_and_save(
        name, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False), path
    )


def check_as_near(got: Any, theirs: Any, exact: Any) -> None:
    """Compare with PEFT under autocast: the same dtypes, and values as near to those in float32.

    A model that casts to the dtype of a tensor does so as captured, which keeps more digits. So bits may differ.
    """
    ours, expected, want = tensors_of(got), tensors_of(theirs), tensors_of(exact)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        if not value.is_floating_point():
            assert torch.equal(ours[name], value), name
            continue
        ours_off, theirs_off = ((t[name].double() - want[name].double()).abs().max() for t in (ours, expected))
        rounding = torch.finfo(torch.bfloat16).eps * float(want[name].abs().max())
        assert float(ours_off) <= 1.5 * float(theirs_off) + 4 * rounding, name


@pytest.mark.few(4)
@pytest.mark.parametrize("name", NAMES)
def test_a_call(name: str, tmp_path: Path) -> None:
    oracle = wrap(name, tmp_path)
    program = adaptc.compile(shared_base_program(name), oracle.path)
    exact = run(program, oracle.family, 3, 7)
    for autocast in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            check_as_near(run(program, oracle.family, 3, 7), oracle(3, 7), exact)


@pytest.mark.parametrize("name", ["qwen3", "gpt_neo"])
def test_a_bank(name: str, tmp_path: Path) -> None:
    oracle = wrap(name, tmp_path)
    bank = adaptc.compile(shared_base_program(name), oracle.path).bank({"a": oracle.path})
    inputs = oracle.family.inputs(2, 5)
    exact, base = bank(**inputs, adapters=["a", None]), oracle.base_output(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = bank(**inputs, adapters=["a", None])
        check_as_near(got.logits[:1], oracle(2, 5).logits[:1], exact.logits[:1])
        assert float((got.logits[1] - base.logits[1]).abs().max()) < 0.1 * float(base.logits[1].abs().max())


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "llama", "mixtral"])
def test_logits_of_generated_tokens(name: str, tmp_path: Path) -> None:
    """The cache has the dtype of the program, and autocast another: what is written to it is cast."""
    oracle = wrap(name, tmp_path)
    generator = adaptc.compile_for_generation(oracle.family.build(), oracle.path)
    ids = oracle.family.inputs(2, 5)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out: Any = generator.generate(ids, **options)
        full = oracle.model(input_ids=out.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :]
    found = torch.stack(out.logits, 1)
    assert found.shape == full.shape
    assert float((found.float() - full.float()).abs().max()) < 0.1 * float(full.abs().max())
