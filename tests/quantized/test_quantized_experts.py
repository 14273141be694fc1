"""Grouped matmuls with a quantised stack of experts give what they give with its values, and read no other experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # makes torch know its op
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import adaptc
from adaptc import LoraConfig
from adaptc.errors import ConfigError, TargetError
from adaptc.passes.quantized.all_schemes import SCHEME_NAMES, choose_scheme
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.quantized.table_scheme import TableScheme
from tests.support.custom_models import Experts, Mixture

FLOATS = [torch.float64, torch.float32, torch.bfloat16]


def fallback(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offs)


def grouped(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(x, weight, offs=offs)


@given(
    scheme=st.sampled_from(SCHEME_NAMES),
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    is_transposed=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_are_those_of_the_values(
    scheme: str, counts: list[int], sizes: tuple[int, int], is_transposed: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    out, into = sizes
    shape = (len(counts), into, out) if is_transposed else (len(counts), out, into)
    weight = torch.randn(shape)
    q = QuantizedTensor.quantize(weight, choose_scheme(scheme, None, into), is_transposed, 2).to(dtype)
    assert q.matrix_shape == (len(counts) * out, into)
    assert q.shape == shape
    offs = torch.tensor(counts).cumsum(0).int()
    x = torch.randn(sum(counts), into, dtype=dtype, requires_grad=True)
    weights = q if is_transposed else q.mT
    y = fallback(x, weights, offs)
    g = torch.randn(sum(counts), out, dtype=dtype)
    check_rounding(y, q.scheme.round_input(x), weights, offs)
    check_rounding(*torch.autograd.grad(y, x, g), g, weights.mT, offs)


def check_rounding(found: Tensor, x: Tensor, weights: Any, offs: Tensor) -> None:
    """``found`` is x times the weights of each group, but for rounding: of products, of sums of them, and of results.

    Together these are three units of the sum of all absolute products, at the most.
    """
    assert found.dtype == x.dtype
    exact, values = x.detach().double(), weights.dequantize().double()
    expected, largest = (fallback(a, w.contiguous(), offs) for a, w in ((exact, values), (exact.abs(), values.abs())))
    assert found.shape == expected.shape
    assert bool(((found.detach() - expected).abs() <= 3 * torch.finfo(x.dtype).eps * largest).all())


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_the_grouped_matmul_of_torch_is_the_same(scheme: str) -> None:
    torch.manual_seed(0)
    q = QuantizedTensor.quantize(torch.randn(3, 24, 64), choose_scheme(scheme, None, 64), row_axes=2).to(torch.bfloat16)
    offs = torch.tensor([2, 2, 7], dtype=torch.int32)
    x = torch.randn(7, 64, dtype=torch.bfloat16, requires_grad=True)
    y = grouped(x, q.mT, offs)
    g = torch.randn_like(y)
    check_rounding(y, q.scheme.round_input(x), q.mT, offs)
    check_rounding(*torch.autograd.grad(y, x, g), g, q, offs)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of elements that were dequantised at once."""
    from adaptc.passes.quantized import bitsandbytes_kernels, quantized_linear, quantized_tensor

    sizes: list[int] = []
    own = bitsandbytes_kernels.dequantize_matrix

    def count(scheme: Any, stored: Any, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        sizes.append(rows * columns)
        return own(scheme, stored, rows, columns, dtype)

    for module in (quantized_linear, quantized_tensor):
        monkeypatch.setattr(module, "dequantize_matrix", count)
    return sizes


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_only_experts_with_tokens_are_read(scheme: str, read: list[int]) -> None:
    q = QuantizedTensor.quantize(torch.randn(9, 5, 64), choose_scheme(scheme, None, 64), row_axes=2)
    offs = torch.tensor([0, 0, 2, 2, 2, 2, 3, 3, 3], dtype=torch.int32)
    x = torch.randn(3, 64, requires_grad=True)
    y = fallback(x, q.mT, offs)
    assert read == [5 * 64] * 2
    y.sum().backward()
    assert read == [5 * 64] * 4


def test_blocks_that_span_two_experts_give_the_same() -> None:
    torch.manual_seed(0)
    q = QuantizedTensor.quantize(torch.randn(3, 5, 7), TableScheme("nf4", 64), row_axes=2)
    assert q.scheme.select_rows(q.stored, q.matrix_shape, slice(5, 10)) is None
    x, offs = torch.randn(6, 7), torch.tensor([1, 4, 6])
    torch.testing.assert_close(fallback(x, q.mT, offs), fallback(x, q.dequantize().mT, offs))
    assert torch.equal(fallback(x[:, :5].contiguous(), q, offs), fallback(x[:, :5].contiguous(), q.dequantize(), offs))


@pytest.mark.parametrize(("block_size", "scale_block"), [(64, 4), (32, 3), (33, 0), (8, 256)])
def test_rows_of_tables_have_the_values_of_the_matrix(block_size: int, scale_block: int) -> None:
    torch.manual_seed(0)
    scheme = TableScheme("fp4", block_size, scale_block)
    matrix = torch.randn(10, 2 * 3 * 64 if block_size != 33 else 66)
    stored = scheme.quantize(matrix)
    values = scheme.dequantize(stored, *matrix.shape)
    for rows in (slice(0, 3), slice(3, 10), slice(None), torch.tensor([7, 0, 7])):
        found = scheme.select_rows(stored, matrix.shape, rows)
        assert found is not None
        picked = values[rows]
        assert torch.equal(found[0].dequantize(found[1], *picked.shape), picked)
    assert scheme.select_rows(stored, (20, matrix.shape[1] // 2), slice(0, 1)) is None or not (
        matrix.shape[1] // 2 % block_size
    )


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_model_and_a_program_know_stacked_experts(is_transposed: bool) -> None:
    torch.manual_seed(0)
    net, x = Mixture(is_transposed), torch.randn(5, 7)
    config = LoraConfig(r=3, target_modules=["gate"], init_lora_weights=False)
    program = adaptc.compile(net, config, example_inputs=(x,))
    small = adaptc.quantize(program, "int8")
    rows = {w.fqn: w for w in small.quantize_report.weights}
    assert {"experts.up", "experts.down"} <= rows.keys()
    weight = small.state_dict["experts.up"]
    assert (weight.is_transposed, weight.row_axes, weight.matrix_shape) == (is_transposed, 2, (33, 7))
    assert weight.stored["scales"].numel() == 33  # one for each output of each expert
    own = adaptc.quantize(net, "int8")
    assert own.experts.up.has_same_values(weight)


def test_targets_name_the_parameters_of_experts() -> None:
    net = Mixture(False)
    adaptc.quantize(net, "int8", target_modules=["experts.up"])
    assert [w.fqn for w in net.quantize_report.weights] == ["experts.up"]
    adaptc.quantize(net, "int8", exclude=["up", "gate"])
    assert [w.fqn for w in net.quantize_report.weights] == ["experts.down"]
    with pytest.raises(TargetError, match=r"experts\.sideways"):
        adaptc.quantize(Mixture(False), "int8", target_modules=["experts.sideways"])
    with pytest.raises(ConfigError, match=r"'experts\.up': group_size=4 does not divide"):
        adaptc.quantize(Mixture(False), "int4", group_size=4, target_modules=["experts.up"])


def test_stacks_without_the_flag_stay_as_they_are() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 5))
            self.gate = nn.Linear(4, 4)

    net = Other()
    adaptc.quantize(net, "int8")
    assert [w.fqn for w in net.quantize_report.weights] == ["gate.weight"]
    assert isinstance(Experts(False).up, nn.Parameter)
