"""dora_norm and dora_epilogue as kernels, against float64, with what float32 and one rounding may cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaptc.kernels._launch import INTERPRETED
from adaptc.kernels.dora_linear import dora_epilogue, dora_norm, reference_dora_epilogue, reference_dora_norm
from tests.kernels.matrices import (
    DTYPES,
    LAYOUTS,
    RANKS,
    SCALES,
    SIZES,
    TYPES,
    far_rows,
    matrix,
    product_error,
    rounding,
    whole,
)

LAYOUT3 = st.tuples(LAYOUTS, LAYOUTS, LAYOUTS)
EPS = torch.finfo(torch.float32).eps


def test_interpreted() -> None:
    assert INTERPRETED


@given(rows=SIZES, cols=SIZES, rank=RANKS, types=TYPES, layouts=LAYOUT3, scale=SCALES)
def test_lengths(rows, cols, rank, types, layouts, scale) -> None:
    W = matrix(rows, cols, types[0], layouts[0], 1)
    A, B = matrix(rank, cols, types[1], layouts[1], 2), matrix(rows, rank, types[2], layouts[2], 3)
    s = torch.tensor(scale).double()
    turned = W.double() + s * (B.double() @ A.double())
    exact = turned.norm(dim=1)
    entries = s.abs() * product_error(B, A) + EPS * (turned.abs() + W.double().abs())
    allowed = entries.norm(dim=1) + EPS * (cols / 4 + 4) * exact
    found = dora_norm(W, A, B, scale)
    assert found.dtype == torch.float32
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=SIZES, rank=RANKS, layouts=LAYOUT3)
def test_lengths_of_rows_that_nearly_cancel(dtype, rows, rank, layouts) -> None:
    cols = 65
    A, B = whole(rank, cols, dtype, layouts[0], 2), whole(rows, rank, dtype, layouts[1], 3)
    # A weight that is exact in float32 alone.
    left = matrix(rows, cols, torch.float32, seed=4).sign() * 2.0**-10
    W = left - B.float() @ A.float()
    exact = left.double().norm(dim=1)
    found = dora_norm(W, A, B, 1.0)
    assert ((found.double() - exact).abs() <= EPS * (cols / 4 + 4) * exact).all()


def test_the_sum_of_three_products_would_not_do() -> None:
    """What dora_norm does not compute, on a case of the test above."""
    A, B = whole(16, 65, torch.float32, seed=2), whole(33, 16, torch.float32, seed=3)
    left = matrix(33, 65, torch.float32, seed=4).sign() * 2.0**-10
    W = left - B @ A
    square = W.square().sum(1) + 2 * (B * (W @ A.T)).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
    exact = left.double().square().sum(1)
    assert ((square.double() - exact).abs() > 0.1 * exact).any()


def test_lengths_of_a_weight_beyond_what_int32_can_count() -> None:
    W = far_rows(3, 37)
    W += torch.tensor([[1.0], [2.0], [4.0]])
    A, B = torch.ones(1, 37, dtype=W.dtype), torch.ones(3, 1, dtype=W.dtype)
    torch.testing.assert_close(dora_norm(W, A, B, -1.0), torch.tensor([0.0, 1.0, 3.0]) * 37**0.5)


def test_lengths_that_are_zero_or_of_nothing() -> None:
    W, A, B = (
        whole(5, 7, torch.bfloat16, seed=1),
        whole(3, 7, torch.bfloat16, seed=2),
        whole(5, 3, torch.bfloat16, seed=3),
    )
    W = (B.float() @ A.float()).neg()
    assert torch.equal(dora_norm(W, A, B, 1.0), torch.zeros(5))
    none = torch.empty(0, 7), torch.empty(5, 0)
    assert torch.equal(dora_norm(W, *none, 1.0), reference_dora_norm(W, *none, torch.tensor(1.0)))
    assert dora_norm(torch.empty(0, 7), A.float(), torch.empty(0, 3), 1.0).shape == (0,)
    assert torch.equal(dora_norm(torch.empty(5, 0), torch.empty(3, 0), B.float(), 1.0), torch.zeros(5))


@st.composite
def _epilogues(draw):
    """y0, h, B, g, scale and bias or None."""
    rows, cols, rank = draw(SIZES), draw(SIZES), draw(RANKS)
    kinds, layouts = [draw(TYPES) for _ in range(2)], draw(LAYOUT3)
    y0, h = matrix(rows, cols, kinds[0][0], layouts[0], 1), matrix(rows, rank, kinds[0][1], layouts[1], 2)
    B = matrix(cols, rank, kinds[0][2], layouts[2], 3)
    g = matrix(2, cols, kinds[1][0], draw(LAYOUTS), 4)[1]
    b = matrix(2, cols, kinds[1][1], draw(LAYOUTS), 5)[1] if draw(st.booleans()) else None
    return y0, h, B, g, draw(SCALES), b


@given(case=_epilogues())
def test_epilogue_is_one_rounding_from_the_exact_value(case) -> None:
    y0, h, B, g, scale, b = case
    s, gain, base = torch.tensor(scale).double(), g.double(), y0.double()
    inner = base + s * (h.double() @ B.double().T)
    exact = gain * inner + (0 if b is None else b.double())
    # Of the product, of its multiple and the sum; of the gain; of the bias; then of what is stored.
    wide = gain.abs() * (s.abs() * product_error(h, B.T) + EPS * (base.abs() + 2 * inner.abs())) + EPS * exact.abs()
    found = dora_epilogue(*case)
    assert found.is_contiguous()
    assert found.dtype == y0.dtype
    assert ((found.double() - exact).abs() <= rounding(exact, y0.dtype) * (1 + 2**-10) + wide).all()


@given(rows=SIZES, cols=SIZES, rank=RANKS, types=TYPES, layouts=LAYOUT3, bias=st.booleans())
def test_epilogue_equals_the_reference_bit_by_bit_where_sums_are_exact(rows, cols, rank, types, layouts, bias) -> None:
    y0, h = whole(rows, cols, types[0], layouts[0], 1), whole(rows, rank, types[1], layouts[1], 2)
    B, g = whole(cols, rank, types[2], layouts[2], 3), whole(1, cols, torch.float32, seed=4)[0]
    b = whole(1, cols, types[1], seed=5)[0] if bias else None
    expected = reference_dora_epilogue(y0, h, B, g, torch.tensor(0.5), b)
    assert torch.equal(dora_epilogue(y0, h, B, g, 0.5, b), expected)


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 1, 3), (0,), (3, 0)])
def test_epilogue_of_inputs_with_more_axes(lead) -> None:
    y0, h = torch.randn(*lead, 4, 33), torch.randn(*lead, 4, 5)
    B, g = torch.randn(33, 5), torch.randn(33)
    found = dora_epilogue(y0, h, B, g, 0.5)
    assert found.shape == y0.shape
    flat = dora_epilogue(y0.reshape(-1, 33), h.reshape(-1, 5), B, g, 0.5)
    assert torch.equal(found.reshape(-1, 33), flat)
    # Leading axes that no view can make one of.
    turned = y0.transpose(0, -2).contiguous().transpose(0, -2)
    assert torch.equal(dora_epilogue(turned, h, B, g, 0.5), found)


def test_epilogue_of_rank_zero_is_the_gain_alone() -> None:
    y0, g, b = torch.randn(3, 5), torch.randn(5), torch.randn(5)
    assert torch.equal(dora_epilogue(y0, torch.empty(3, 0), torch.empty(5, 0), g, 1.0, b), g * y0 + b)


def test_epilogue_has_gradients() -> None:
    values: list[Tensor] = [torch.randn(s).requires_grad_() for s in ((3, 5), (3, 2), (5, 2), (5,), (), (5,))]
    found = torch.autograd.grad(dora_epilogue(*values).square().sum(), values)
    expected = torch.autograd.grad(reference_dora_epilogue(*values).square().sum(), values)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
