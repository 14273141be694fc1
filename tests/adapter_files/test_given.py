"""State dicts as callers may give them: what is no dense tensor with values of a slot's kind is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, CheckpointError, LoraConfig
from adaptc.adapter_files.directory import read_adapter
from tests.support.custom_models import UpDown
from tests.support.method_table import ENTRIES
from tests.support.subject import FILE, save_random_adapter, subject

A, B = "up.lora_A.weight", "up.lora_B.weight"


class Odd(Tensor):
    pass


def compiled(dtype: torch.dtype = torch.float32, **options: Any) -> adaptc.AdaptedProgram:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    return adaptc.compile(UpDown().to(dtype), config, example_inputs=torch.randn(3, 7, dtype=dtype), **options)


def state() -> dict[Any, Any]:
    g = torch.Generator().manual_seed(5)
    return {A: torch.randn(2, 7, generator=g), B: torch.randn(5, 2, generator=g)}


def given_up(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


def quantised(t: Tensor) -> Tensor:
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


BAD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "None": (lambda t: None, r"'up\.lora_A\.weight' is None"),
    "list": (lambda t: t.tolist(), "is a list"),
    "float": (lambda t: 1.0, "is a float"),
    "numpy": (lambda t: t.numpy(), "NumPy array"),
    "meta": (lambda t: t.to("meta"), "meta, which has no values"),
    "sparse": (lambda t: t.to_sparse(), r"layout torch\.sparse_coo"),
    "csr": (lambda t: t.to_sparse_csr(), r"layout torch\.sparse_csr"),
    "quantised": (quantised, "quantised"),
    "nested": (lambda t: torch.nested.nested_tensor([t[0], t[1]], layout=torch.jagged), "NestedTensor|nested"),
    "subclass": (lambda t: t.as_subclass(Odd), "a Odd, whose values"),
    "uninitialised": (lambda t: nn.UninitializedParameter(), "UninitializedParameter"),
    "given up": (given_up, "memory was given up"),
    "scalar": (lambda t: torch.tensor(1.0), "shape"),
    "empty": (lambda t: t[:0], "shape|rank"),
    "a dimension more": (lambda t: t[None], "shape"),
    "complex": (lambda t: t.to(torch.complex64), "complex numbers"),
    "boolean": (lambda t: t > 0, "boolean numbers"),
    "integers": (lambda t: t.to(torch.int64), "integer numbers"),
    "too large": (lambda t: t.double() * 1e39, r"too large for torch\.float32"),
    "not a number": (lambda t: t * float("nan"), "NaN"),
}


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning", "ignore:.*Sparse:UserWarning", "ignore:.*quantize:")
@pytest.mark.parametrize("key", [A, B])
@pytest.mark.parametrize("kind", list(BAD))
def test_what_cannot_be_bound(kind: str, key: str) -> None:
    program, x = compiled(), torch.randn(3, 7)
    adaptc.swap(program, state())
    current, expected = program.binding, program(x)
    change, message = BAD[kind]
    bad = state()
    bad[key] = change(bad[key])
    for call in (adaptc.swap, lambda p, a: p.bind(a)):
        for config in (None, LoraConfig(r=2, target_modules=["up"])):
            with pytest.raises(AdaptcError, match=message.replace("lora_A", "lora_.")):
                call(program, bad) if config is None else program.bind(bad, config=config)
    assert program.binding is current
    assert torch.equal(program(x), expected)


@pytest.mark.parametrize("key", [3, None, b"up.lora_A.weight", ("up",)])
def test_keys_are_names(key: Any) -> None:
    with pytest.raises(CheckpointError, match="keys are the names PEFT gives"):
        adaptc.swap(compiled(), state() | {key: torch.ones(2, 7)})


def test_two_spellings_of_one_key() -> None:
    tensors = state()
    for order in (list, reversed):
        items = [*tensors.items(), (f"base_model.model.{A}", tensors[A] * 2)]
        with pytest.raises(CheckpointError, match="two spellings of one key"):
            adaptc.swap(compiled(), dict(order(items)))


def test_what_overflows_in_its_slot(tmp_path: Path) -> None:
    program = compiled(torch.float16, autocast_adapter_dtype=False)
    fits = state()
    fits[A][1, 3] = 65_504.0
    for _ in range(2):
        adaptc.swap(program, fits)
    large = {**fits, A: fits[A].clone()}
    large[A][1, 3] = 70_000.0
    wide = compiled(torch.float16)
    adaptc.swap(wide, large)
    where = adaptc.save_adapter(wide, tmp_path)
    assert read_adapter(where).tensors[A].dtype == torch.float32
    for adapter in (large, where, read_adapter(where)):
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"up\.lora_A\.weight.*too large for torch\.float16.*70000"):
                adaptc.swap(program, adapter)
    with pytest.raises(CheckpointError, match=r"too large for torch\.float16"):
        adaptc.compile(UpDown().half(), where, example_inputs=torch.randn(3, 7).half(), autocast_adapter_dtype=False)


def test_a_scale_that_overflows() -> None:
    with pytest.raises(AdaptcError, match=r"alpha"):
        adaptc.swap(compiled(), state(), config=LoraConfig(r=2, lora_alpha=1e39, target_modules=["up"]))  # type: ignore


def test_a_config_beside_a_file_is_used(tmp_path: Path) -> None:
    program, x = compiled(), torch.randn(3, 7)
    file = read_adapter(adaptc.save_adapter(program, tmp_path))
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["up"])
    assert torch.equal(program.bind(file, config=config)(x), program.bind(dict(file.tensors), config=config)(x))


@pytest.mark.few(6)
@pytest.mark.parametrize("entry", [e.name for e in ENTRIES])
def test_no_method_takes_numbers_of_another_kind(entry: str, tmp_path: Path) -> None:
    s = subject(entry, "linear")
    program = s.compile(s.config())
    tensors = load_file(save_random_adapter(s, s.config(), tmp_path, seed=1) / FILE)
    for key, t in tensors.items():
        kinds = [torch.bool, torch.complex64] + ([torch.int32] if t.is_floating_point() else [torch.float64])
        # PEFT writes these as floats, or the method only compares them.
        if "shira_indices" in key or "randlora_" in key or key.endswith(".zeros"):
            kinds = kinds[:2]
        if (
            key.startswith("base_model.model.layer.randlora_") and key[-1] in "AB"
        ):  # another name of a tensor, equal to it
            kinds = kinds[:1]
        for dtype in kinds:
            save_file({**tensors, key: t.to(dtype)}, tmp_path / FILE)
            with pytest.raises(AdaptcError, match=r"numbers|same|differ"):
                adaptc.swap(program, tmp_path)
