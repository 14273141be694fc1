"""GPTQ and AWQ layers are captured with every code, zero and scale.

Their packages are not installed. The layers here are classes with the names and attributes of theirs, and are packed
code by code after the description of the layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptc import CaptureError
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
GROUP = 16


class Packed(nn.Module):
    """A layer with random codes, and what a library would compute of them in ``values``."""

    def __init__(self, layer: nn.Linear, bits: int = 4, group: int = GROUP, symmetric: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        self.group_size = group
        groups = self.in_features // (self.in_features if group == -1 else group)
        draw = torch.Generator().manual_seed(layer.in_features)
        self.codes = torch.randint(0, 2**bits, (self.in_features, self.out_features), generator=draw)
        self.zeros = torch.randint(1, 2**bits, (groups, self.out_features), generator=draw)
        if symmetric:
            self.zeros = torch.full_like(self.zeros, 2 ** (bits - 1))
        self.register_buffer("scales", (torch.rand(groups, self.out_features, generator=draw) / 64 + 0.01).half())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().half())
        self.index = torch.arange(self.in_features) // (self.in_features // groups)

    def values(self) -> Tensor:
        scales = self.scales.float()
        return ((self.codes - self.zeros[self.index]) * scales[self.index]).t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        out = x.half().float() @ self.values().half().float().t()
        return (out if self.bias is None else out + self.bias).to(x.dtype)


def as_word(codes: list[int], bits: int) -> int:
    """Return a signed word of 32 bits that holds ``codes`` from its lowest bits on."""
    word = sum(c << (bits * i) for i, c in enumerate(codes))
    return word - 2**32 if word >= 2**31 else word


def words_down(codes: Tensor, bits: int) -> Tensor:
    """Pack the codes of each column of ``codes``, from the first row down."""
    per_word = 32 // bits
    rows = [
        [as_word(codes[i : i + per_word, j].tolist(), bits) for j in range(codes.shape[1])]
        for i in range(0, codes.shape[0], per_word)
    ]
    return torch.tensor(rows, dtype=torch.int32)


def words_across(codes: Tensor, bits: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack the codes of each row of ``codes``, each word in ``order``."""
    per_word = 32 // bits
    rows = [
        [as_word([int(row[j + o]) for o in order[:per_word]], bits) for j in range(0, len(row), per_word)]
        for row in codes
    ]
    return torch.tensor(rows, dtype=torch.int32)


class QuantLinear(Packed):
    """AutoGPTQ's layer: the first version of the format."""

    __module__ = "auto_gptq.nn_modules.qlinear.qlinear_cuda"

    def __init__(self, layer: nn.Linear, act_order: bool = False, **options: Any) -> None:
        super().__init__(layer, **options)
        self.infeatures, self.outfeatures = self.in_features, self.out_features
        del self.in_features, self.out_features
        if act_order:
            self.index = self.index[torch.randperm(len(self.index), generator=torch.Generator().manual_seed(1))]
        self.register_buffer("g_idx", self.index.int())
        if self.bits in (4, 8):
            self.register_buffer("qweight", words_down(self.codes, self.bits))
            self.register_buffer("qzeros", words_across(self.zeros - 1, self.bits))
        else:
            self.register_buffer("qweight", torch.zeros(1, dtype=torch.int32))
            self.register_buffer("qzeros", torch.zeros(1, dtype=torch.int32))


class TorchQuantLinear(Packed):
    """GPTQModel's layer: the second version of the format."""

    __module__ = "gptqmodel.nn_modules.qlinear.torch"

    def __init__(self, layer: nn.Linear, **options: Any) -> None:
        super().__init__(layer, **options)
        self.register_buffer("g_idx", self.index.int())
        self.register_buffer("qweight", words_down(self.codes, self.bits))
        self.register_buffer("qzeros", words_across(self.zeros, self.bits))
        self.adapter = None

    def qzero_format(self) -> int:
        return 2


class WQLinear_GEMM(Packed):
    """AutoAWQ's layer."""

    __module__ = "awq.modules.linear.gemm"

    def __init__(self, layer: nn.Linear, **options: Any) -> None:
        super().__init__(layer, **options)
        self.w_bit = self.bits
        del self.bits
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        self.register_buffer("qweight", words_across(self.codes, 4, order))
        self.register_buffer("qzeros", words_across(self.zeros, 4, order))


class AwqTorchQuantLinear(WQLinear_GEMM):
    """GPTQModel's layer for AWQ."""

    __module__ = "gptqmodel.nn_modules.qlinear.torch_awq"


LAYERS: dict[str, Callable[[nn.Linear], Packed]] = {
    "gptq": QuantLinear,
    "gptq, symmetric": partial(QuantLinear, symmetric=True),
    "gptq, 8 bits": partial(QuantLinear, bits=8),
    "gptq, 8 bits, symmetric": partial(QuantLinear, bits=8, symmetric=True),
    "gptq, act order": partial(QuantLinear, act_order=True),
    "gptq, one group": partial(QuantLinear, group=-1),
    "gptq v2": TorchQuantLinear,
    "gptq v2, 8 bits": partial(TorchQuantLinear, bits=8),
    "awq": WQLinear_GEMM,
    "awq, one group": partial(WQLinear_GEMM, group=-1),
    "awq, symmetric": partial(WQLinear_GEMM, symmetric=True),
    "awq of gptqmodel": AwqTorchQuantLinear,
}


def net(name: str) -> Any:
    return replaced(Net(SIZES), LAYERS[name])


@pytest.mark.parametrize("name", LAYERS)
def test_codes_zeros_and_scales_are_kept(name: str) -> None:
    model = net(name)
    with plain_layers(model) as plain:
        weights = [plain.up.weight, plain.down.weight]
    for layer, weight in zip((model.up, model.down), weights, strict=True):
        assert isinstance(weight, QuantizedTensor)
        assert torch.equal(weight.dequantize(torch.float32), layer.values())
        columns = layer.codes.shape[0]
        codes = weight.scheme.unpack_codes(weight.stored, columns).int()  # type: ignore[attr-defined]
        assert torch.equal(codes.t() + (128 if "8 bits" in name else 0), layer.codes.int())
        assert torch.equal(weight.stored["scales"].t(), layer.scales)
        assert ("zeros" in weight.stored) == ("symmetric" not in name)
        if "zeros" in weight.stored:
            assert torch.equal(weight.stored["zeros"].t().int(), layer.zeros.int())
        assert ("group_index" in weight.stored) == (name == "gptq, act order")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gptq", torch.float16),
        ("gptq v2", torch.float32),
        ("awq", torch.float16),
        ("awq of gptqmodel", torch.float16),
    ],
)
def test_layers_compute_in_the_dtype_of_their_library(name: str, dtype: torch.dtype) -> None:
    model, x = net(name), torch.randn(3, SIZES[0])
    with plain_layers(model) as plain, torch.no_grad():
        assert plain.up.weight.dtype == dtype
        found = plain(x)
    assert found.dtype == torch.float32
    with torch.no_grad():
        check_close(found, model(x), 5e-3)


def test_a_layer_for_awq_computes_in_the_models_bfloat16() -> None:
    model = replaced(Net(SIZES).bfloat16(), AwqTorchQuantLinear)
    with plain_layers(model) as plain:
        assert plain.up.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gptq, act order", "gptq v2", "awq"])
def test_models_are_adapted_as_peft_adapts_their_values(name: str, tmp_path: Path) -> None:
    model, x = net(name), torch.randn(3, SIZES[0])
    made = adapters(lambda: plain_twin(model, lambda layer: layer.values()), tmp_path)
    check_adapted(model, made, (x,), 1e-5 if name == "gptq v2" else 5e-3)


def test_a_layer_is_read_anew_after_its_codes_were_written_to() -> None:
    model, other = net("gptq v2"), replaced(Net(SIZES), partial(TorchQuantLinear, symmetric=True))

    def read() -> Any:
        with plain_layers(model) as plain:
            return plain.up.weight

    before = read()
    assert read().stored["codes"].data_ptr() == before.stored["codes"].data_ptr()
    model.up.load_state_dict(other.up.state_dict())
    assert torch.equal(read().dequantize(), other.up.values())


def damaged(name: str = "gptq", **changes: Callable[[Any], Any]) -> Callable[[], Any]:
    """Return a model whose second layer has other attributes."""

    def build() -> Any:
        model = net(name)
        for attribute, change in changes.items():
            setattr(model.down, attribute, change(getattr(model.down, attribute)))
        return model

    return build


def of_other_kernel() -> Any:
    kind = type("MarlinQuantLinear", (TorchQuantLinear,), {"__module__": "gptqmodel.nn_modules.qlinear.marlin"})
    return replaced(Net(SIZES), kind)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "2 bits": (lambda: replaced(Net(SIZES), partial(QuantLinear, bits=2)), "'up'.*codes of 2 bits, .*4 and 8 bits are"),
    "3 bits": (lambda: replaced(Net(SIZES), partial(QuantLinear, bits=3)), "'up'.*codes of 3 bits, .*4 and 8 bits are"),
    "codes": (
        damaged(qweight=lambda t: t[:-1]),
        r"Net is quantised.*'down', a auto_gptq.*QuantLinear,.*'qweight' must be .*int32 .*\(4, 64\), .*\(3, 64\)",
    ),
    "zeros": (damaged(qzeros=lambda t: t[:, 1:]), r"'qzeros' must be .* \(2, 8\), and is torch.int32 \(2, 7\)"),
    "scales": (damaged(scales=lambda t: t[1:]), r"'scales' must be torch.float16 .*\(2, 64\), and is .*\(1, 64\)"),
    "nan": (damaged(scales=lambda t: t * torch.nan), "'scales' has values that are not finite"),
    "group size": (damaged(group_size=lambda _: 24), "group_size=24 does not divide its 32 inputs"),
    "groups": (damaged(g_idx=lambda t: t + 1), "'g_idx' must be of groups 0 to 1, and is from 1 to 2"),
    "group count": (damaged(g_idx=lambda t: t[1:]), r"'g_idx' must be .* \(32,\), and is torch.int32 \(31,\)"),
    "no size": (damaged(group_size=lambda _: None), "its group_size must be a whole number, and is None"),
    "adapter": (damaged("gptq v2", adapter=lambda _: "eora"), "has an adapter of its library"),
    "awq codes": (damaged("awq", qweight=lambda t: t[:, 1:]), r"'down', a awq.*WQLinear_GEMM,.*'qweight' must be"),
    "awq bits": (damaged("awq", w_bit=lambda _: 3), "codes of 3 bits, and AWQ layers of 4 bits are read"),
    "another kernel": (
        of_other_kernel,
        r"'up' is a gptqmodel.*marlin.MarlinQuantLinear.*quantised ones of .*gptqmodel",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str) -> None:
    build, said = REFUSED[name]
    check_refused(build(), said, SIZES[0])


def test_sizes_that_fill_no_words_are_refused() -> None:
    model = replaced(Net(SIZES), QuantLinear)
    model.up.outfeatures = 31
    with pytest.raises(CaptureError, match="has 31 outputs, and words of 8 codes"), plain_layers(model):
        pass
