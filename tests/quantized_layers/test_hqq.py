"""Layers of HQQ are captured with every code, zero and scale.

The package is not installed. The layer here is a class with the name and attributes of its ``HQQLinear``, packed after
the description of the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.replace_layers import plain_layers
from tests.support.quantized_models import (
    Net,
    adapters,
    check_adapted,
    check_close,
    check_refused,
    plain_twin,
    replaced,
)

SIZES = (48, 32, 64)


class HQQLinear(nn.Module):
    """A layer with random codes, by groups of its reshaped weight."""

    __module__ = "hqq.core.quantize"

    def __init__(
        self,
        layer: nn.Linear,
        bits: int = 4,
        axis: int = 1,
        group: int | None = 16,
        compute: torch.dtype = torch.float32,
        as_float: bool = False,
    ) -> None:
        super().__init__()
        rows, columns = self.shape = (layer.out_features, layer.in_features)
        size = group or (columns if axis == 1 else rows)
        groups = rows * columns // size
        draw = torch.Generator().manual_seed(columns)
        grouped = (groups, size) if axis == 1 else (size, groups)
        self.codes = torch.randint(0, 2**bits, grouped, generator=draw, dtype=torch.uint8)
        by_group = (groups, 1) if axis == 1 else (1, groups)
        packed = self.codes
        if bits == 4:
            half = grouped[0] // 2
            packed = torch.tensor(
                [
                    [int(a) * 16 + int(b) for a, b in zip(*rs, strict=True)]
                    for rs in zip(packed[:half], packed[half:], strict=True)
                ],
                dtype=torch.uint8,
            )
        self.W_q = nn.Parameter(packed.view(compute) if as_float else packed, requires_grad=False)
        self.meta = {
            "nbits": bits,
            "group_size": group,
            "shape": torch.Size(self.shape),
            "scale": (torch.rand(by_group, generator=draw) / 64 + 0.01).to(compute),
            "zero": (torch.rand(by_group, generator=draw) * 2**bits).to(compute),
            "axis": axis,
            "packing": "4bit_u8" if bits == 4 else "8bit_u8",
            "unpack_view_dtype": torch.uint8,
            "view_as_float": as_float,
            "quant_scale": False,
            "quant_zero": False,
        }
        self.bias = None if layer.bias is None else layer.bias.detach().to(compute)
        self.compute_dtype = compute

    def values(self) -> Tensor:
        grouped = (self.codes.to(self.compute_dtype) - self.meta["zero"]) * self.meta["scale"]
        return grouped.reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.values().t()
        return out if self.bias is None else out + self.bias


LAYERS: dict[str, Callable[[nn.Linear], HQQLinear]] = {
    "4 bits": HQQLinear,
    "8 bits": partial(HQQLinear, bits=8),
    "5 bits": partial(HQQLinear, bits=5),
    "columns": partial(HQQLinear, axis=0),
    "columns, 8 bits": partial(HQQLinear, axis=0, bits=8, group=8),
    "one group": partial(HQQLinear, group=None),
    "one group of columns": partial(HQQLinear, group=None, axis=0),
    "stored as floats": partial(HQQLinear, as_float=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_values_are_the_librarys(name: str) -> None:
    model = replaced(Net(SIZES), LAYERS[name])
    with plain_layers(model) as plain:
        weights = [plain.up.weight, plain.down.weight]
    for layer, weight in zip((model.up, model.down), weights, strict=True):
        assert isinstance(weight, QuantizedTensor)
        assert torch.equal(weight.dequantize(), layer.values())
        assert weight.stored["scales"].numel() == layer.meta["scale"].numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_computes_in_its_compute_dtype(dtype: torch.dtype) -> None:
    model = replaced(Net(SIZES).to(dtype), partial(HQQLinear, compute=dtype))
    x = torch.randn(3, SIZES[0], dtype=dtype)
    with plain_layers(model) as plain, torch.no_grad():
        assert plain.up.weight.dtype == dtype
        # The library rounds every step of its arithmetic to this dtype.
        check_close(plain(x), model(x), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["4 bits", "columns"])
def test_models_are_adapted_as_peft_adapts_their_values(name: str, tmp_path: Path) -> None:
    model, x = replaced(Net(SIZES), LAYERS[name]), torch.randn(3, SIZES[0])
    made = adapters(lambda: plain_twin(model, lambda layer: layer.values()), tmp_path)
    check_adapted(model, made, (x,), 1e-5)


def with_meta(name: str = "4 bits", **changes: Callable[[Any], Any]) -> Callable[[], Any]:
    def build() -> Any:
        model = replaced(Net(SIZES), LAYERS[name])
        for key, change in changes.items():
            model.down.meta[key] = change(model.down.meta[key])
        return model

    return build


def cut() -> Any:
    model = replaced(Net(SIZES), HQQLinear)
    model.down.W_q = nn.Parameter(model.down.W_q[1:], requires_grad=False)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "2 bits": (
        with_meta(nbits=lambda _: 2, packing=lambda _: "2bit_u8"),
        r"layer 'down', a hqq.core.quantize.HQQLinear, .*codes of 2 bits in the packing '2bit_u8'",
    ),
    "3 bits": (with_meta(nbits=lambda _: 3, packing=lambda _: "3bit_32"), "codes of 3 bits in the packing '3bit_32'"),
    "unpacked": (with_meta(packing=lambda _: None), "codes of 4 bits in the packing None"),
    "quantised scales": (with_meta(quant_scale=lambda _: True), "make it with quant_scale=False"),
    "codes": (cut, r"'W_q' must be torch.uint8 \(64, 16\), and is torch.uint8 \(63, 16\)"),
    "scales": (with_meta(scale=lambda t: t[1:]), r"\"meta\['scale'\]\" must be .*\(128, 1\), and is .*\(127, 1\)"),
    "no zeros": (with_meta(zero=lambda _: None), r"\"meta\['zero'\]\" must be .*\(128, 1\), and it has none"),
    "nan": (with_meta(zero=lambda t: t * torch.nan), r"\"meta\['zero'\]\" has values that are not finite"),
    "groups": (with_meta(group_size=lambda _: 24), "groups of 24 along axis 1 go across rows of its weight"),
    "groups of columns": (
        with_meta("columns", group_size=lambda _: 24),
        "groups of 24 along axis 0 go across columns of its weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str) -> None:
    build, said = REFUSED[name]
    check_refused(build(), said, SIZES[0])
