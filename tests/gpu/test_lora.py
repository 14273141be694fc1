"""lora_linear, packed_lora, lora_down and lora_up_add against their references in float64, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.kernels.lora_epilogue import lora_down, lora_up_add, reference_lora_down, reference_lora_up_add
from adaptc.kernels.lora_linear import _lora_linear_op, lora_linear, reference_lora_linear
from adaptc.kernels.packed_lora import packed_factors, packed_lora, sibling_table
from tests.gpu.cases import (
    BF16,
    DEVICE,
    EPS,
    SCALE,
    SIZES,
    TYPES,
    bits,
    check_close,
    matrix,
    number,
    size_name,
    type_name,
    vector,
)
from tests.kernels.lora_linear_cases import _check_gradients
from tests.kernels.matrices import product_error, rounding
from tests.kernels.packed_lora_cases import exact_and_wide

pytestmark = pytest.mark.usefixtures("nan_where_nothing_was_written")
all_types = pytest.mark.parametrize("types", TYPES, ids=type_name)
all_sizes = pytest.mark.parametrize("sizes", SIZES, ids=size_name)
few_sizes = pytest.mark.parametrize("sizes", [SIZES[1], SIZES[2], SIZES[6], SIZES[7]], ids=size_name)

#: the widths and the ranks of siblings; whole tiles first, then ragged ones with a rank of zero
SIBLINGS = (((256, 64, 64), (16, 16, 16)), ((131, 0, 67, 5), (33, 4, 0, 128)))

Types = tuple[torch.dtype, torch.dtype]
Sizes = tuple[int, int, int, int]


def _check_layer(sizes: Sizes, types: Types, layouts: str, bias: bool) -> None:
    (rows, cols, length, rank), (base, adapter) = sizes, types
    x, W = matrix(rows, length, base, seed=1), matrix(cols, length, base, layouts, 2)
    A, B = matrix(rank, length, adapter, seed=3), matrix(cols, rank, adapter, layouts, 4)
    b = vector(cols, base, 5) if bias else None
    found = lora_linear(x, W, b, A, B, SCALE)
    assert found.dtype == base
    high = [None if t is None else t.double() for t in (x, W, b, A, B, number(SCALE))]
    exact = reference_lora_linear(*high)  # type: ignore[arg-type]
    h = reference_lora_down(x.double(), A.double())
    # h is a sum in float32 that is rounded to A's type, and what that costs goes through B.
    h_wide = product_error(x, A.T)
    h_wide = h_wide + rounding(h.abs() + h_wide, adapter) * (1 + 2**-10)
    up_wide = h_wide @ B.double().abs().T + product_error(h.abs() + h_wide, B.T)
    plain = x.double() @ W.double().T
    wide = product_error(x, W.T) + SCALE * up_wide + 2 * EPS * (exact.abs() + plain.abs())
    check_close(found, exact, wide + rounding((exact - plain).abs() + wide, base))
    assert torch.equal(bits(lora_linear(x, W, b, A, B, SCALE)), bits(found))


@all_sizes
@all_types
def test_layer(sizes, types) -> None:
    _check_layer(sizes, types, "contiguous", bias=False)


@few_sizes
@all_types
@pytest.mark.parametrize("layouts", ["wider", "transposed", "strided"])
def test_layer_of_any_layout_with_bias(sizes, types, layouts) -> None:
    _check_layer(sizes, types, layouts, bias=True)


@all_sizes
@all_types
def test_down(sizes, types) -> None:
    (rows, _, length, rank), (base, adapter) = sizes, types
    x, A = matrix(rows, length, base, seed=1), matrix(rank, length, adapter, seed=2)
    wide = product_error(x, A.T)
    for scale in (None, number(SCALE)):
        found = lora_down(x, A, scale)
        assert found.dtype == adapter
        exact = reference_lora_down(x.double(), A.double(), None if scale is None else scale.double())
        check_close(found, exact, wide + EPS * exact.abs())
        assert torch.equal(bits(lora_down(x, A, scale)), bits(found))


@all_sizes
@all_types
def test_up_add(sizes, types) -> None:
    (rows, cols, _, rank), (base, adapter) = sizes, types
    y, h, B = matrix(rows, cols, base, seed=1), matrix(rows, rank, adapter, seed=2), matrix(cols, rank, adapter, seed=3)
    before, found = y.clone(), lora_up_add(y, h, B, number(SCALE))
    assert found.dtype == base
    assert torch.equal(y, before)
    exact = reference_lora_up_add(y.double(), h.double(), B.double(), number(SCALE).double())
    check_close(found, exact, SCALE * product_error(h, B.T) + EPS * (exact.abs() + y.double().abs()))
    assert torch.equal(bits(lora_up_add(y, h, B, number(SCALE))), bits(found))


@pytest.mark.parametrize(("widths", "ranks"), SIBLINGS, ids=["whole", "ragged"])
@pytest.mark.parametrize("rows", [1, 16, 17, 256])
@pytest.mark.parametrize("length", [131, 4096])
@all_types
def test_siblings(rows, length, widths, ranks, types) -> None:
    base, adapter = types
    x, W, b = (
        matrix(rows, length, base, seed=1),
        matrix(sum(widths), length, base, seed=2),
        vector(sum(widths), base, 8),
    )
    A = matrix(sum(ranks), length, adapter, seed=3)
    matrices = [matrix(w, r, adapter, seed=4 + i) for i, (w, r) in enumerate(zip(widths, ranks, strict=True))]
    scales, table = torch.linspace(0.3, 2, len(widths), device=DEVICE), sibling_table(widths, ranks, DEVICE)
    args = x, W, b, A, packed_factors(matrices), table, scales, widths
    found = packed_lora(*args)
    assert found.dtype == base
    exact, wide = exact_and_wide(x, W, b, A, args[4], ranks, scales, widths)
    check_close(found, exact, wide)
    assert torch.equal(bits(packed_lora(*args)), bits(found))


@all_types
def test_a_swap_to_any_rank_compiles_nothing(types) -> None:
    base, adapter = types
    x, W = matrix(40, 512, base, seed=1), matrix(256, 512, base, seed=2)

    def call(rows: int, rank: int) -> None:
        A, B = matrix(rank, 512, adapter, seed=3), matrix(256, rank, adapter, seed=4)
        packed_lora(x[:rows], W, None, A, packed_factors([B]), None, torch.ones(1, device=DEVICE), [256])

    call(1, 16)
    with adaptc.debug.assert_no_recompiles():
        for rank in (8, 32, 64, 1, 17):
            for rows in (1, 16, 17, 40):
                call(rows, rank)


@few_sizes
@all_types
def test_gradients_of_a_layer(sizes, types) -> None:
    (rows, cols, length, rank), (base, adapter) = sizes, types
    x, W, b = matrix(rows, length, base, seed=1), matrix(cols, length, base, seed=2), vector(cols, base, 5)
    A, B = matrix(rank, length, adapter, seed=3), matrix(cols, rank, adapter, seed=4)

    def of(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: op(*tensors, number(SCALE))

    g = matrix(rows, cols, base, seed=6)
    _check_gradients(of(_lora_linear_op), of(reference_lora_linear), [x, W, b, A, B], g, max(rows, rank))


@few_sizes
@all_types
def test_gradients_of_down_and_up(sizes, types) -> None:
    (rows, cols, length, rank), (base, adapter) = sizes, types
    x, A, B = (matrix(*shape, t, seed=1) for *shape, t in (
        (rows, length, base), (rank, length, adapter), (cols, rank, adapter),
    ))  # fmt: skip
    y, h = matrix(rows, cols, base, seed=2), matrix(rows, rank, adapter, seed=3)

    def of(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: op(*tensors, number(SCALE))

    g = matrix(rows, rank, adapter, seed=4)
    _check_gradients(of(lora_down), of(reference_lora_down), [x, A], g, max(rows, rank))
    g = matrix(rows, cols, base, seed=4)
    _check_gradients(of(lora_up_add), of(reference_lora_up_add), [y, h, B], g, max(rows, rank))


@pytest.mark.parametrize("rows", [0, 3, 67])
@pytest.mark.parametrize(("cols", "length", "rank"), [(5, 7, 0), (5, 0, 3), (0, 7, 3)])
def test_nothing_to_do(rows, cols, length, rank) -> None:
    x, W = matrix(rows, length, BF16), matrix(cols, length, BF16)
    A, B = matrix(rank, length, BF16), matrix(cols, rank, BF16)
    expected = reference_lora_linear(x.double(), W.double(), None, A.double(), B.double(), number(SCALE).double())
    torch.testing.assert_close(lora_linear(x, W, None, A, B, SCALE), expected.to(BF16))
