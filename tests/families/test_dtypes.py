"""Half-precision bases under float32 adapters, against PEFT: the same casts in the same order, to a few roundings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from tests.support.families import FAMILIES, Family
from tests.support.oracle import (
    TARGETS,
    Oracle,
    assert_differs,
    assert_same,
    file_tensors,
    gradients,
    load_peft,
    run,
    tensors_of,
)

pytestmark = pytest.mark.few(3)

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ["llama", "gemma2", "gpt2", "bert", "t5", "resnet"]


def in_dtype(family: Family, dtype: torch.dtype) -> Family:
    """The family with float inputs cast, as a half-precision image model takes them."""

    def inputs(batch: int, seq: int) -> dict[str, Tensor]:
        given: Mapping[str, Tensor] = family.inputs(batch, seq)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}

    return replace(family, inputs=inputs)


def model(name: str, dtype: torch.dtype) -> nn.Module:
    return FAMILIES[name].build().to(dtype)


@cache
def half(name: str, dtype: torch.dtype) -> adaptc.AdaptedProgram:
    """The family's half-precision program without an adapter; captured once."""
    example = in_dtype(FAMILIES[name], dtype).inputs(2, 5) if name == "resnet" else None
    config = adaptc.LoraConfig(target_modules=TARGETS.get(name, "all-linear"))
    return adaptc.unload(adaptc.compile(model(name, dtype), config, example_inputs=example))


@pytest.fixture(scope="module", params=[(n, d) for d in HALF for n in NAMES if (n, d) != ("t5", "fp16")], ids="-".join)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Oracle, Family, torch.dtype]:
    name, dtype = request.param[0], HALF[request.param[1]]
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=TARGETS.get(name, "all-linear"))
    oracle = Oracle.wrap_and_save(name, config, tmp_path_factory.mktemp("adapter"), model=model(name, dtype))
    return oracle, in_dtype(FAMILIES[name], dtype), dtype


def equal_but_for_roundings(got: Any, expected: Any, dtype: torch.dtype) -> None:
    """Nearly all values are the very same, none is off by more than a few roundings of the largest."""
    assert_same(got, expected, tol=4 * torch.finfo(dtype).eps)
    for name, want in tensors_of(expected).items():
        assert float((tensors_of(got)[name] == want).double().mean()) > 0.9, name


@pytest.mark.long
def test_outputs(case: tuple[Oracle, Family, torch.dtype]):
    oracle, family, dtype = case
    program = adaptc.compile(half(oracle.name, dtype), oracle.path)
    slots = program.binding.values
    assert {v.dtype for k, v in slots.items() if "lora_" in k} == {torch.float32}
    for batch, seq in ((2, 5), (3, 7)):
        expected = run(oracle.model, family, batch, seq)
        program.fuse = False
        equal_but_for_roundings(run(program, family, batch, seq), expected, dtype)
        # Sums in float32 in another order: where one of them rounds to the other side, all that follows does.
        program.fuse = True
        assert_same(run(program, family, batch, seq), expected, tol=4 * torch.finfo(dtype).eps)
        with oracle.model.disable_adapter():
            assert_differs(expected, run(oracle.model, family, batch, seq), at_least=0.1)


@pytest.mark.long
@pytest.mark.few(2)
def test_gradients_and_files(case: tuple[Oracle, Family, torch.dtype], tmp_path: Path):
    oracle, family, dtype = case
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
    config = adaptc.LoraConfig(target_modules=TARGETS.get(oracle.name, "all-linear"), **options)
    program = adaptc.compile(half(oracle.name, dtype), config)
    module = oracle.module_with_peft_values(program)
    got = gradients(module, module(**family.inputs(3, 7)))
    expected = gradients(oracle.model, oracle.model(**family.inputs(3, 7)))
    assert sorted(got) == sorted(expected)
    for key, want in expected.items():
        assert got[key].dtype == want.dtype == torch.float32
        atol = 8 * torch.finfo(dtype).eps * float(want.abs().max())
        torch.testing.assert_close(got[key], want, rtol=0, atol=atol, msg=lambda m, k=key: f"{k}: {m}")
    saved = adaptc.save_adapter(program, tmp_path / "adapter")
    ours, theirs = file_tensors(saved), file_tensors(oracle.path)
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[k], v) and ours[k].dtype == v.dtype for k, v in theirs.items())
    loaded = load_peft(model(oracle.name, dtype), saved)
    equal_but_for_roundings(run(program, family, 3, 7), run(loaded, family, 3, 7), dtype)


@pytest.mark.few(2)
def test_merged_weights_are_rounded_once(case: tuple[Oracle, Family, torch.dtype]):
    """PEFT rounds the change and then the sum. Here only the sum is, so that weights lie nearer to the exact ones."""
    oracle, family, dtype = case
    merged = adaptc.merge(adaptc.compile(half(oracle.name, dtype), oracle.path))
    theirs, before = oracle.merge_copy().state_dict(), model(oracle.name, dtype).state_dict()
    assert sorted(merged.state_dict) == sorted(theirs)
    exact_model = FAMILIES[oracle.name].build()
    exact_model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in before.items()})
    exact = load_peft(exact_model.double(), oracle.path).merge_and_unload().state_dict()
    adapted = 0
    for key, want in theirs.items():
        got = merged.state_dict[key]
        assert got.dtype == want.dtype
        if not got.is_floating_point() or torch.equal(want, before[key]):
            assert torch.equal(got, want), key
            continue
        adapted += 1
        ours_off, theirs_off = (got.double() - exact[key]).abs(), (want.double() - exact[key]).abs()
        assert bool((ours_off <= exact[key].abs() * torch.finfo(dtype).eps * 0.501 + 1e-7).all()), key
        # Where both round the same sum, its last bit in float32 decides.
        assert float(ours_off.mean()) <= float(theirs_off.mean()) * (1 + 1e-5), key
    assert adapted == len(oracle.adapted_modules())
    out = run(merged, family, 3, 7)
    assert {k: v.dtype for k, v in tensors_of(out).items()} == {
        k: v.dtype for k, v in tensors_of(run(oracle.model, family)).items()
    }


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_adapters_in_the_dtype_of_the_base(name: str, tmp_path: Path):
    dtype = torch.bfloat16
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": TARGETS.get(name, "all-linear")}
    wrapped = peft.get_peft_model(model(name, dtype), peft.LoraConfig(**options), autocast_adapter_dtype=False).eval()
    wrapped.save_pretrained(str(tmp_path))
    program = adaptc.compile(half(name, dtype), tmp_path, autocast_adapter_dtype=False)
    assert {v.dtype for k, v in program.binding.values.items() if "lora_" in k} == {dtype}
    family = in_dtype(FAMILIES[name], dtype)
    expected = run(wrapped, family, 3, 7)
    program.fuse = False
    equal_but_for_roundings(run(program, family, 3, 7), expected, dtype)
    # Fused, what adapters add is not rounded before it is added.
    program.fuse = True
    assert_same(run(program, family, 3, 7), expected, tol=4 * torch.finfo(dtype).eps)
    with wrapped.disable_adapter():
        assert_differs(run(program, family, 3, 7), run(wrapped, family, 3, 7))
