"""Layers with packed LoRA against sums in float64, within the roundings that they are allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptc.kernels._launch import INTERPRETED
from adaptc.kernels._mixed_dot import float32_dot, split_exactly
from adaptc.kernels._packed_products import FEW_ROWS
from adaptc.kernels.lora_epilogue import lora_down
from adaptc.kernels.packed_lora import packed_factors, packed_lora, reference_packed_lora, sibling_table
from tests.kernels.lora_linear_cases import ALMOST_ONE, EPS, LENGTHS, ROWS, TYPES, _close
from tests.kernels.matrices import DTYPES, LAYOUTS, SCALES, matrix, product_error, rounding, whole
from tests.support.cover import examples

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: none, ragged, whole blocks, and more than one block
WIDTHS = st.lists(st.sampled_from([1, 16, 48, 63, 65, 128, 131, 256]), min_size=1, max_size=3)
SOME_RANKS = st.sampled_from([0, 1, 3, 8, 15, 16, 17, 33, 64, 127])


def test_interpreted() -> None:
    assert INTERPRETED


def operands(
    rows: int, length: int, widths: list[int], ranks: list[int], types: Any, bias: bool = True, make: Any = matrix,
    layouts: Any = ("contiguous", "contiguous"), scales: Any = (),
) -> list[Any]:  # fmt: skip
    """The arguments of the op; without a table for one layer."""
    (base, adapter), n_cols = types, sum(widths)
    Bs = [make(w, r, adapter, seed=4 + i) for i, (w, r) in enumerate(zip(widths, ranks, strict=True))]
    return [
        make(rows, length, base, layouts[0], seed=1),
        make(n_cols, length, base, layouts[1], seed=2),
        make(1, n_cols, base, seed=9)[0] if bias else None,
        make(sum(ranks), length, adapter, seed=3),
        packed_factors(Bs),
        sibling_table(widths, ranks) if len(widths) > 1 else None,
        torch.tensor(scales or [0.5, 2.0, -1.0][: len(widths)]),
        widths,
    ]


def exact_and_wide(
    x: Tensor, W: Tensor, bias: Any, A: Tensor, B: Tensor, ranks: Any, scales: Tensor, widths: Any
) -> Any:
    """The result in float64, and what float32 sums and the rounding of h and of the update may cost."""
    taken, parts = x.to(A.dtype), []
    h = taken.double() @ A.double().T
    h_wide = product_error(taken, A.T)
    h_wide = h_wide + rounding(h.abs() + h_wide, A.dtype) * ALMOST_ONE
    update_wide, column, begin = [], 0, 0
    for w, r, s in zip(widths, ranks, scales.double(), strict=True):
        own, factor = slice(column, column + r), B[begin : begin + w * r].view(r, w).double()
        parts.append(s * (h[:, own] @ factor))
        update_wide.append(
            s.abs() * (h_wide[:, own] @ factor.abs() + product_error(h[:, own].abs() + h_wide[:, own], factor))
        )
        column, begin = column + r, begin + w * r
    update = torch.cat(parts, 1) + (0 if bias is None else bias.double())
    exact = x.double() @ W.double().T + update
    wide = product_error(x, W.T) + torch.cat(update_wide, 1) + 3 * EPS * (exact.abs() + update.abs())
    return exact, wide + rounding(update.abs() + wide, x.dtype)


@settings(max_examples=examples(40))
@given(rows=ROWS, length=LENGTHS, widths=WIDTHS, types=TYPES, bias=st.booleans(), data=st.data())
def test_layers_are_exact_but_for_their_roundings(rows, length, widths, types, bias, data) -> None:
    ranks = [data.draw(SOME_RANKS, label="rank") for _ in widths]
    scales = [data.draw(SCALES, label="scale") for _ in widths]
    # What lies between rows of x is never read by kernels, but by torch's matmul for many rows (lora_linear_cases).
    layouts = data.draw(LAYOUTS) if rows <= FEW_ROWS else "contiguous", data.draw(LAYOUTS)
    args = operands(rows, length, widths, ranks, types, bias, layouts=layouts, scales=scales)
    y = packed_lora(*args)
    assert y.dtype == types[0]
    x, W, b, A, B, _, s, _ = args
    _close(y, *exact_and_wide(x, W, b, A, B, ranks, s, widths))


@pytest.mark.parametrize("types", [(base, adapter) for base in DTYPES for adapter in DTYPES])
@settings(max_examples=examples(8))
@given(rows=st.integers(1, 40), length=st.integers(1, 300), widths=WIDTHS, data=st.data())
def test_layers_equal_the_reference_bit_by_bit_where_sums_are_exact(types, rows, length, widths, data) -> None:
    ranks = [data.draw(st.integers(0, 40), label="rank") for _ in widths]
    args = operands(rows, length, widths, ranks, types, make=whole)
    args[0] = torch.eye(rows, length, dtype=types[0])  # h then needs no rounding
    assert torch.equal(packed_lora(*args), reference_packed_lora(*args))


@pytest.mark.parametrize("adapter", DTYPES)
@pytest.mark.parametrize("base", [BF16, F16])
@settings(max_examples=examples(6))
@given(length=st.integers(1, 200), rank=st.integers(1, 40), widths=WIDTHS)
def test_sixteen_rows_and_seventeen_are_rounded_alike(base, adapter, length, rank, widths) -> None:
    # Sums of small whole numbers are exact, so that only roundings differ, if anything does.
    args = operands(17, length, widths, [rank] * len(widths), (base, adapter), make=whole)
    args[4] = args[4] * 0.37  # such that updates are no whole numbers
    many = packed_lora(*args)
    for rows in (1, 16):
        few = packed_lora(args[0][:rows], *args[1:])
        excess = (few.double() - many[:rows].double()).abs()
        # The order of sums differs, by less than float32 shows in half precision almost everywhere.
        assert (excess > 0).sum() <= 2 + excess.numel() // 200


@pytest.mark.parametrize("base", [BF16, F16])
@settings(max_examples=examples(10))
@given(rows=st.integers(1, 20), length=st.integers(1, 700), rank=st.integers(1, 40))
def test_a_float32_adapter_on_a_base_in_half_precision_is_as_exact_as_float32(base, rows, length, rank) -> None:
    x, A = matrix(rows, length, base, seed=1), matrix(rank, length, F32, seed=2)
    exact, terms = x.double() @ A.double().T, x.double().abs() @ A.double().abs().T
    found, plain = lora_down(x, A), x.float() @ A.T
    assert (found.double() - exact).norm() <= 1.5 * (plain.double() - exact).norm() + 2 * EPS * terms.norm()


@triton.jit
def _split_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    high, middle, low = split_exactly(tl.load(x_ptr + i))
    tl.store(out_ptr + i, high)
    tl.store(out_ptr + BLOCK + i, middle)
    tl.store(out_ptr + 2 * BLOCK + i, low)


@given(seed=st.integers(0, 999), power=st.integers(-90, 120))
def test_a_float32_is_the_sum_of_its_three_terms_to_the_bit(seed, power) -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    terms = torch.empty(3, 256, dtype=BF16)
    _split_kernel[(1,)](x, terms, BLOCK=256)
    assert torch.equal(terms.double().sum(0), x.double())
    assert (terms[1].abs() <= terms[0].abs() * 2**-8).all()


@triton.jit
def _product_kernel(left_ptr, right_ptr, out_ptr):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    acc = tl.zeros((16, 16), tl.float32)
    tl.store(out_ptr + i, float32_dot(tl.load(left_ptr + i), tl.load(right_ptr + i), acc))


@given(seed=st.integers(0, 999))
def test_products_of_two_float32_in_terms_are_as_exact_as_float32(seed) -> None:
    left, right = matrix(16, 16, F32, seed=seed), matrix(16, 16, F32, seed=seed + 1)
    out = torch.empty(16, 16)
    _product_kernel[(1,)](left, right, out)
    error = (out.double() - left.double() @ right.double()).abs()
    assert (error <= product_error(left, right)).all()


@pytest.mark.parametrize("rows", [0, 1, 16, 17])
@pytest.mark.parametrize(("widths", "length", "ranks"), [([5], 7, [0]), ([5, 3], 0, [3, 2]), ([4, 5], 7, [0, 0])])
def test_empty_layers(rows, widths, length, ranks) -> None:
    args = operands(rows, length, widths, ranks, (F32, F32))
    torch.testing.assert_close(packed_lora(*args), reference_packed_lora(*args))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_ranks_that_do_not_exist_cannot_be_seen() -> None:
    # Rows of infinity times zeros would be NaN.
    x, W, b, A, B, table, scales, widths = operands(3, 40, [20, 30], [3, 5], (BF16, BF16))
    x[1, 7] = torch.inf
    A[:, 7] = A[:, 7].abs() + 1
    W[:, 7] = W[:, 7].abs() + 1
    B = B.abs()
    found = packed_lora(x, W, b, A, B, table, scales, widths)
    assert found[1].isposinf().all()
    assert found[[0, 2]].isfinite().all()
