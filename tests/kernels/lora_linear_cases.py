"""LoRA's kernels against sums in float64, within the rounding that they are allowed, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptc.kernels import lora_epilogue
from adaptc.kernels._launch import INTERPRETED
from adaptc.kernels.lora_epilogue import lora_down, lora_up_add
from tests.kernels.matrices import DTYPES, LAYOUTS, RANKS, SCALES, SIZES, matrix, product_error, rounding, whole
from tests.support.cover import examples

#: the module: the package's own name is the op's
lora_linear = import_module("adaptc.kernels.lora_linear")

#: a type for the base and one for the adapter
TYPES = st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)) | st.sampled_from([(t, t) for t in DTYPES])
#: lengths of sums: ragged, of one tile, of several, and split over programs
LENGTHS = st.sampled_from([1, 3, 17, 31, 32, 33, 127, 128, 129, 257, 512, 521, 1031])
#: one, few, the most that one kernel takes, and more
ROWS = st.sampled_from([1, 2, 5, 15, 16, 17, 33, 67])
LAYOUT4 = st.tuples(LAYOUTS, LAYOUTS, LAYOUTS, LAYOUTS)
Call = Callable[..., Tensor]
ALMOST_ONE = 1 + 2**-10
EPS = torch.finfo(torch.float32).eps


def test_interpreted() -> None:
    assert INTERPRETED


def _close(result: Tensor, exact: Tensor, wide: Tensor) -> None:
    """``wide`` is what float32 may cost before the one rounding to the type of the result."""
    assert result.is_contiguous()
    allowed = rounding(exact.abs() + wide, result.dtype) * ALMOST_ONE + wide
    excess = (result.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"beyond what rounding allows by {excess.max()}, values up to {exact.abs().max()}"


def _exact_down(x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(A.dtype)
    return x.double() @ A.double().T, product_error(x, A.T)


@given(rows=SIZES, length=LENGTHS, rank=RANKS, types=TYPES, layouts=LAYOUT4, scale=SCALES | st.none())
def test_down_is_one_rounding_from_the_exact_sum(rows, length, rank, types, layouts, scale) -> None:
    x, A = matrix(rows, length, types[0], layouts[0], 1), matrix(rank, length, types[1], layouts[1], 2)
    h = lora_down(x, A, None if scale is None else torch.tensor(scale))
    assert h.dtype == A.dtype
    exact, wide = _exact_down(x, A)
    s = 1.0 if scale is None else torch.tensor(scale).double()
    _close(h, s * exact, abs(s) * (wide + EPS * exact.abs()))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=examples(6))
@given(rows=st.integers(1, 40), length=st.integers(1024, 2500), rank=st.integers(1, 20))
def test_down_adds_every_part_of_a_split_sum_once(dtype, rows, length, rank) -> None:
    x, A = whole(rows, length, dtype, seed=1), whole(rank, length, dtype, seed=2)
    blocks = lora_epilogue.down_blocks(dtype, dtype)
    assert lora_epilogue.split_count(rows, length, rank, blocks) > 1
    assert torch.equal(lora_down(x, A), (x.float() @ A.float().T).to(dtype))


def test_a_sum_is_split_only_for_want_of_programs_and_if_it_is_long() -> None:
    t = {"BLOCK_M": 32, "BLOCK_R": 16, "BLOCK_K": 128}
    assert lora_epilogue.split_count(32, 8192, 16, t) == 16
    assert lora_epilogue.split_count(32, 1024, 16, t) == 2
    assert lora_epilogue.split_count(32, 511, 16, t) == 1
    assert lora_epilogue.split_count(32 * 64, 8192, 16, t) == 4
    assert lora_epilogue.split_count(32 * 256, 8192, 16, t) == 1
    assert lora_epilogue.split_count(32 * 64, 8192, 64, t) == 1


@given(rows=st.integers(1, 20000), programs=st.sampled_from([32, 256]))
def test_one_row_more_never_costs_a_gpu_half_of_its_programs(rows, programs) -> None:
    t = {"BLOCK_M": 64, "BLOCK_R": 64, "BLOCK_K": 64}
    parts = lora_epilogue.split_count(rows, 4096, 16, t, programs)
    assert parts == lora_epilogue.MAX_PARTS or -(-rows // 64) * parts >= programs


@given(rows=SIZES, cols=SIZES, rank=RANKS, types=TYPES, layouts=LAYOUT4, scale=SCALES)
def test_up_is_one_rounding_from_the_exact_sum(rows, cols, rank, types, layouts, scale) -> None:
    y = matrix(rows, cols, types[0], layouts[0], 1)
    h, B = matrix(rows, rank, types[1], layouts[1], 2), matrix(cols, rank, types[1], layouts[2], 3)
    before = y.clone()
    result = lora_up_add(y, h, B, torch.tensor(scale))
    assert result.dtype == y.dtype
    assert torch.equal(y, before)
    _close(result, *_exact_up(y, h, B, scale))


def _exact_up(y: Tensor, h: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    s = torch.tensor(scale).double()
    exact = y.double() + s * (h.double() @ B.double().T)
    return exact, s.abs() * product_error(h, B.T) + EPS * (exact.abs() + y.double().abs())


@settings(max_examples=examples(40))
@given(
    rows=ROWS, cols=SIZES, length=LENGTHS, rank=RANKS, types=TYPES, layouts=LAYOUT4, scale=SCALES, bias=st.booleans()
)
def test_a_layer_is_exact_but_for_its_roundings(rows, cols, length, rank, types, layouts, scale, bias) -> None:
    base, adapter = types
    # More rows are torch's product, for which oneDNN reads beyond the rows of x on processors with AMX, times zeros
    # (https://github.com/uxlfoundation/oneDNN/issues/5717): NaN there would be in the sum.
    between = torch.nan if rows <= lora_linear.FEW_ROWS else 1.0
    x, W = matrix(rows, length, base, layouts[0], 1, between), matrix(cols, length, base, layouts[1], 2)
    A, B = matrix(rank, length, adapter, layouts[2], 3), matrix(cols, rank, adapter, layouts[3], 4)
    b = matrix(3, cols, base, "strided", 5)[1] if bias else None
    s = torch.tensor(scale).double()
    y = lora_linear.lora_linear(x, W, b, A, B, scale)
    assert y.dtype == base
    plain = x.double() @ W.double().T
    h, h_wide = _exact_down(x, A)
    h_wide = h_wide + rounding(h.abs() + h_wide, adapter) * ALMOST_ONE
    exact = plain + s * (h @ B.double().T) + (0 if b is None else b.double())
    update_wide = h_wide @ B.double().abs().T + product_error(h.abs() + h_wide, B.T)
    wide = product_error(x, W.T) + s.abs() * update_wide + 2 * EPS * (exact.abs() + plain.abs())
    _close(y, exact, wide + rounding((exact - plain).abs() + wide, base))


@pytest.mark.parametrize("types", [(base, adapter) for base in DTYPES for adapter in DTYPES])
@settings(max_examples=examples(8))
@given(rows=st.integers(1, 40), cols=SIZES, length=st.integers(1, 300), rank=RANKS)
def test_a_layer_equals_the_reference_bit_by_bit_where_sums_are_exact(types, rows, cols, length, rank) -> None:
    base, adapter = types
    # Rows that pick one column each: neither h nor the layer's own product then needs rounding.
    x = torch.eye(rows, length, dtype=base)
    W, bias = whole(cols, length, base, seed=2), whole(1, cols, base, seed=5)[0]
    A, B = whole(rank, length, adapter, seed=3), whole(cols, rank, adapter, seed=4)
    args = x, W, bias, A, B, torch.tensor(0.5)
    assert torch.equal(lora_linear.lora_linear(*args), lora_linear.reference_lora_linear(*args))


@pytest.mark.parametrize("rows", [0, 1, 16, 17])
@pytest.mark.parametrize(("cols", "length", "rank"), [(5, 7, 0), (5, 0, 3), (0, 7, 3)])
def test_empty_layers(rows, cols, length, rank) -> None:
    x, W = torch.randn(rows, length), torch.randn(cols, length)
    A, B = torch.randn(rank, length), torch.randn(cols, rank)
    torch.testing.assert_close(lora_linear.lora_linear(x, W, None, A, B, 2.0), x @ W.T + 2 * x @ A.T @ B.T)


# Gradients: kernels in the backward, against autograd on the reference in float64.


def _gradients(call: Call, tensors: Sequence[Tensor], g: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(call(*leaves), leaves, g))


def _check_gradients(call: Call, reference: Call, tensors: Sequence[Tensor], g: Tensor, n_terms: int) -> None:
    """``reference`` must have no negative factor of its own: with the signs gone it tells how large the terms are."""
    found = _gradients(call, tensors, g)
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in tensors]
    exact = _gradients(reference, [t.double() for t in tensors], g.double())
    terms = _gradients(reference, [t.double().abs() for t in tensors], g.double().abs())
    # A rounding each of x or g, h or what comes back through B, the layer's own part, and the whole.
    error = 4 * max(torch.finfo(t.dtype).eps for t in tensors) / 2 + 32 * EPS
    # Below the normal numbers, which float16 reaches, a rounding costs the same whatever the size: one of the result,
    # and one of each of what it is a sum of over rows or ranks, times another factor.
    floor = max(torch.finfo(t.dtype).smallest_normal * torch.finfo(t.dtype).eps for t in tensors)
    floor *= 1 + 4 * max(n_terms, 1)
    for i, (f, e, t) in enumerate(zip(found, exact, terms, strict=True)):
        excess = (f.double() - e).abs() - error * t - floor
        assert (excess <= 0).all(), f"gradient {i}: beyond what rounding allows by {excess.max()} of {t.max()}"


@settings(max_examples=examples(20))
@given(rows=ROWS, cols=SIZES, length=LENGTHS, rank=RANKS, types=TYPES, has_bias=st.booleans())
def test_gradients_of_a_layer(rows, cols, length, rank, types, has_bias) -> None:
    base, adapter = types
    x, W = matrix(rows, length, base, seed=1), matrix(cols, length, base, seed=2)
    A, B = matrix(rank, length, adapter, seed=3), matrix(cols, rank, adapter, seed=4)
    bias = [matrix(1, cols, base, seed=5)[0]] if has_bias else []
    s = torch.tensor(0.3)

    def with_bias(op: Call) -> Call:
        return lambda x, W, A, B, *bias: op(x, W, *(bias or [None]), A, B, s)

    op, reference = with_bias(lora_linear._lora_linear_op), with_bias(lora_linear.reference_lora_linear)
    _check_gradients(op, reference, [x, W, A, B, *bias], matrix(rows, cols, base, seed=6), max(rows, rank))


@given(rows=SIZES, cols=SIZES, length=LENGTHS, rank=RANKS, types=TYPES)
def test_gradients_of_down_and_up(rows, cols, length, rank, types) -> None:
    base, adapter = types
    x, A = matrix(rows, length, base, seed=1), matrix(rank, length, adapter, seed=2)
    y, h = matrix(rows, cols, base, seed=3), matrix(rows, rank, adapter, seed=4)
    B = matrix(cols, rank, adapter, seed=5)
    s = torch.tensor(0.3)

    def scaled(op: Call) -> Call:
        return lambda *tensors: op(*tensors, s)

    down, up = lora_epilogue.reference_lora_down, lora_epilogue.reference_lora_up_add
    _check_gradients(scaled(lora_down), scaled(down), [x, A], matrix(rows, rank, adapter, seed=6), max(rows, rank))
    _check_gradients(scaled(lora_up_add), scaled(up), [y, h, B], matrix(rows, cols, base, seed=6), max(rows, rank))
