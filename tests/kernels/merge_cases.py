"""merge_ and merge_saving_ as kernels, against sums in float64 and, where no rounding can differ, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaptc.kernels._launch import INTERPRETED
from adaptc.kernels.merge_weight import merge_, merge_saving_, reference_merge, unmerge_
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


def test_interpreted() -> None:
    assert INTERPRETED


def _around(t: Tensor) -> Tensor:
    """All memory behind a view, as bits."""
    flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return flat.view(torch.int32 if t.dtype == torch.float32 else torch.int16).clone()


@given(rows=SIZES, cols=SIZES, rank=RANKS, types=TYPES, layouts=LAYOUT3, scale=st.sampled_from([0.5, 2.0, -1.0, 3.0]))
def test_equals_the_reference_bit_by_bit_where_sums_are_exact(rows, cols, rank, types, layouts, scale) -> None:
    W = whole(rows, cols, types[0], layouts[0], 1)
    A, B = whole(rank, cols, types[1], layouts[1], 2), whole(rows, rank, types[2], layouts[2], 3)
    expected = reference_merge(W, A, B, torch.tensor(scale))
    merge_(W, A, B, scale)
    assert torch.equal(W, expected)


@given(rows=SIZES, cols=SIZES, rank=RANKS, types=TYPES, layouts=LAYOUT3, scale=SCALES, saving=st.booleans())
def test_is_one_rounding_from_the_exact_sum(rows, cols, rank, types, layouts, scale, saving) -> None:
    W = matrix(rows, cols, types[0], layouts[0], 1)
    A, B = matrix(rank, cols, types[1], layouts[1], 2), matrix(rows, rank, types[2], layouts[2], 3)
    s = torch.tensor(scale).double()
    exact = W.double() + s * (B.double() @ A.double())
    # Of the product, of its multiple, and of the sum, all in float32; then of what is stored.
    wide = s.abs() * product_error(B, A) + torch.finfo(torch.float32).eps * (exact.abs() + W.double().abs())
    if saving:
        merge_saving_(W, A, B, scale)
    else:
        merge_(W, A, B, scale)
    assert ((W.double() - exact).abs() <= rounding(exact, types[0]) * (1 + 2**-10) + wide).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(rank=RANKS, seed=st.integers(0, 2**20))
def test_is_at_most_one_unit_from_the_reference_and_rarely_that(dtype, rank, seed) -> None:
    W, A, B = (
        matrix(33, 65, dtype, seed=seed),
        matrix(rank, 65, dtype, seed=seed + 1),
        matrix(33, rank, dtype, seed=seed + 2),
    )
    # An update that takes no weight to zero, where the spacing of numbers is beyond any error of the sum.
    W = W + 64 * torch.sign(W)
    expected = reference_merge(W, A, B, torch.tensor(0.25))
    merge_(W, A, B, 0.25)
    apart = (W.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).sum() <= 2


@given(rows=SIZES, cols=SIZES, rank=RANKS, types=TYPES, layouts=LAYOUT3, scale=SCALES)
def test_saved_values_undo_it_bit_by_bit(rows, cols, rank, types, layouts, scale) -> None:
    W = matrix(rows, cols, types[0], layouts[0], 1)
    W[0, 0], W[-1, -1] = -0.0, torch.inf
    A, B = matrix(rank, cols, types[1], layouts[1], 2), matrix(rows, rank, types[2], layouts[2], 3)
    before, merged = _around(W), W.clone()
    merge_(merged, A, B, scale)
    saved = merge_saving_(W, A, B, scale)
    assert saved.is_contiguous()
    assert saved.dtype == W.dtype
    assert torch.equal(W, merged)
    unmerge_(W, saved)
    assert torch.equal(_around(W), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_nothing_beyond_the_weight(dtype) -> None:
    W, other = matrix(33, 65, dtype, "wider"), matrix(33, 65, dtype, "wider")
    merge_(W, matrix(5, 65, dtype), matrix(33, 5, dtype), 1.0)
    # Nor a value read from there: W has none that is NaN.
    assert torch.equal(W.isfinite(), other.isfinite())
    changed = _around(W) != _around(other)
    assert changed.sum() <= W.numel()
    assert torch.empty(0, dtype=dtype).set_(W.untyped_storage()).isnan().sum() == 33 * 70 - W.numel()


def test_a_rank_of_zero_and_an_empty_weight_change_nothing() -> None:
    W = matrix(3, 5, torch.bfloat16)
    before = W.clone()
    assert torch.equal(merge_saving_(W, torch.empty(0, 5), torch.empty(3, 0), 1.0), before)
    assert torch.equal(W, before)
    merge_(torch.empty(0, 5), torch.empty(2, 5), torch.empty(0, 2), 1.0)


def test_a_weight_beyond_what_int32_can_count() -> None:
    W = far_rows(3, 37)
    A, B = whole(2, 37, torch.bfloat16), whole(3, 2, torch.bfloat16)
    merge_(W, A, B, 1.0)
    assert torch.equal(W, B @ A)
    saved = merge_saving_(W, A, B, 1.0)
    assert torch.equal(W, 2 * (B @ A))
    unmerge_(W, saved)
    assert torch.equal(W, B @ A)


def test_takes_the_scale_from_a_tensor() -> None:
    W, A, B = whole(5, 7, torch.float32), whole(3, 7, torch.float32), whole(5, 3, torch.float32)
    expected = W + 0.5 * (B @ A)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        merged = W.clone()
        merge_(merged, A, B, torch.tensor(0.5, dtype=dtype))
        assert torch.equal(merged, expected)
