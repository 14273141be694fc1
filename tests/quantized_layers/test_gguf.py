"""Layers with blocks of GGUF files are captured with the codes and scales of their blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn
from transformers.integrations.gguf.utils import GgufLinear

from adaptc import CaptureError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.gguf_blocks import block_type, rewrite_blocks
from adaptc.quantized_layers.replace_layers import plain_layers
from tests.support.gguf_files import blocks
from tests.support.quantized_models import (
    Net,
    adapters,
    check_adapted,
    check_close,
    check_refused,
    plain_twin,
    replaced,
)

KINDS = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K]
SIZES = (256, 512, 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "count"), [(7, 3), (1, 1), (32, 2)])
def test_blocks_have_the_values_of_the_gguf_package(kind: Kind, rows: int, count: int) -> None:
    columns = 256 * count
    data = blocks(kind, rows, columns)
    scheme, stored = rewrite_blocks(torch.from_numpy(data), kind)
    scheme.check(stored, rows, columns)
    expected = torch.from_numpy(gguf.quants.dequantize(data, kind))
    assert torch.equal(scheme.dequantize(stored, rows, columns), expected)


def test_a_row_may_have_an_odd_number_of_blocks() -> None:
    data = blocks(Kind.Q8_0, 5, 96)
    scheme, stored = rewrite_blocks(torch.from_numpy(data), Kind.Q8_0)
    expected = torch.from_numpy(gguf.quants.dequantize(data, Kind.Q8_0))
    assert torch.equal(scheme.dequantize(stored, 5, 96), expected)


@pytest.mark.parametrize("kind", [k for k in Kind if k not in KINDS])
def test_other_types_are_refused_by_name(kind: Kind) -> None:
    with pytest.raises(CaptureError, match=rf"type {kind.name}, and Q8_0, Q4_0, Q4_1, Q4_K, Q6_K are read"):
        block_type(kind)


def of_diffusers(layer: nn.Linear, kind: Kind = Kind.Q8_0, compute: Any = torch.float32) -> Any:
    made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute)
    data = torch.from_numpy(blocks(kind, layer.out_features, layer.in_features))
    made.weight, made.bias = GGUFParameter(data, quant_type=kind), layer.bias
    return made


def of_transformers(layer: nn.Linear, kind: Kind = Kind.Q8_0) -> Any:
    made = GgufLinear(layer.in_features, layer.out_features, int(kind), layer.bias is not None)
    made.weight.copy_(torch.from_numpy(blocks(kind, layer.out_features, layer.in_features)))
    made.bias = layer.bias
    return made


def values(layer: Any) -> Tensor:
    """Return the weight of a layer as the ``gguf`` package reads it."""
    if isinstance(layer, GGUFLinear):
        return torch.from_numpy(gguf.quants.dequantize(layer.weight.as_tensor().numpy(), layer.weight.quant_type))
    return torch.from_numpy(gguf.quants.dequantize(layer.weight.numpy(), Kind(layer.ggml_type)))


@pytest.mark.parametrize("make", [of_diffusers, of_transformers])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_the_librarys_values(make: Any, kind: Kind) -> None:
    model = replaced(Net(SIZES), partial(make, kind=kind))
    with plain_layers(model) as plain:
        weights = [plain.up.weight, plain.down.weight]
    for layer, weight in zip((model.up, model.down), weights, strict=True):
        assert isinstance(weight, QuantizedTensor)
        assert torch.equal(weight.dequantize(), values(layer))
        if make is of_diffusers:  # the library computes in float16, rounding every step
            check_close(weight.dequantize(), dequantize_gguf_tensor(layer.weight), 2e-3)


@pytest.mark.parametrize("make", [of_diffusers, of_transformers])
def test_models_are_adapted_as_peft_adapts_them(make: Any, tmp_path: Path) -> None:
    model, x = replaced(Net(SIZES), partial(make, kind=Kind.Q4_K)), torch.randn(3, SIZES[0])
    with torch.no_grad():
        twin = plain_twin(model, values)
        if make is of_diffusers:
            check_close(twin(x), model(x), 2e-3)
    check_adapted(model, adapters(lambda: plain_twin(model, values), tmp_path), (x,), 1e-5)


def test_a_layer_of_diffusers_computes_in_its_compute_dtype() -> None:
    model = replaced(Net(SIZES).bfloat16(), partial(of_diffusers, compute=torch.bfloat16))
    x = torch.randn(3, SIZES[0], dtype=torch.bfloat16)
    with plain_layers(model) as plain, torch.no_grad():
        assert plain.up.weight.dtype == torch.bfloat16
        found = plain(x)
    with torch.no_grad():
        check_close(found, model(x), 2 * torch.finfo(torch.bfloat16).eps)


def cut(layer: nn.Linear) -> Any:
    made = of_diffusers(layer)
    made.weight = GGUFParameter(made.weight.as_tensor()[:, :-34], quant_type=Kind.Q8_0)
    return made


def with_nan(layer: nn.Linear) -> Any:
    made = of_diffusers(layer)
    data = made.weight.as_tensor().clone()
    data[1, :2] = 255
    made.weight = GGUFParameter(data, quant_type=Kind.Q8_0)
    return made


def of_other_type(layer: nn.Linear) -> Any:
    made = of_transformers(layer)
    made.ggml_type = int(Kind.Q5_K)
    return made


def permuted(layer: nn.Linear) -> Any:
    made = of_transformers(layer)
    made.input_permutation = torch.arange(layer.in_features)
    return made


REFUSED: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "cut": (
        cut,
        r"layer 'up', a diffusers.*GGUFLinear.*'weight' must be torch.uint8 \(512, 272\), and is .*\(512, 238\)",
    ),
    "nan": (with_nan, r"'weight' has values that are not finite"),
    "type": (of_other_type, r"layer 'up', a .*GgufLinear.*type number 13, and Q8_0, Q4_0, Q4_1, Q4_K, Q6_K are read"),
    "permuted": (permuted, "input_permutation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str) -> None:
    make, said = REFUSED[name]
    check_refused(replaced(Net(SIZES), make), said, SIZES[0])


def test_columns_that_are_no_whole_number_of_blocks_are_refused() -> None:
    model = replaced(Net((256, 96, 7)), of_transformers)
    model.down.ggml_type = int(Kind.Q4_K)
    with (
        pytest.raises(CaptureError, match=r"'down'.*its rows have 96 elements, and blocks of Q4_K have 256"),
        plain_layers(model),
    ):
        pass
