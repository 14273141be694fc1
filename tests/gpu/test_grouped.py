"""Grouped LoRA on the GPU against float64, with groups of all kinds: its three products, gradients, the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adaptc.kernels._launch import runs_kernels
from adaptc.kernels._row_chunks import reference_grouped_expand, reference_grouped_outer, reference_grouped_shrink
from adaptc.kernels.grouped_lora import (
    cut_into_chunks,
    grouped_expand,
    grouped_outer,
    grouped_shrink,
    reference_grouped_lora,
)
from tests.gpu.cases import BF16, DEVICE, TYPES, bits, type_name
from tests.kernels.grouped_lora_cases import Case, check_close, gradients, make_case, numbers

pytestmark = pytest.mark.usefixtures("nan_where_nothing_was_written")
all_types = pytest.mark.parametrize("types", TYPES, ids=type_name)

#: ranks of the adapters, the adapter of each row (-1: none), length of the sums, columns
GROUPS: dict[str, tuple[list[int], list[int], int, int]] = {
    "one row": ([7], [0], 1031, 33),
    "few rows": ([16, 3, 64], [2, -1, 0, 0, 1], 512, 256),
    "empty groups": ([8, 16, 128, 1], [2] * 37 + [-1] * 5, 257, 67),
    "no adapter": ([8, 16], [-1] * 40, 64, 64),
    "a rank of zero": ([0, 5, 0, 33], [0, 1, 2, 3, -1] * 9, 131, 129),
    "one large, the others small": ([16] * 8, [3] * 600 + list(range(8)) + [-1], 384, 192),
    "many adapters": ([1 + 7 * i % 67 for i in range(32)], [(5 * i) % 33 - 1 for i in range(521)], 193, 131),
    "many rows": ([64, 16, 32], [i * i % 3 for i in range(2500)], 256, 128),
}
all_groups = pytest.mark.parametrize("group", GROUPS)


def _case(group: str, types: tuple[torch.dtype, torch.dtype]) -> Case:
    ranks, index, K, N = GROUPS[group]
    c = make_case(ranks, index, K, N, *types)
    return replace(numbers(c, lambda t: t.to(DEVICE)), starts=c.starts.to(DEVICE), index=c.index.to(DEVICE))


def _exact(c: Case) -> Tensor:
    return reference_grouped_lora(c.x, c.y, c.A, c.B, c.starts, c.scales, c.index)


def _doubles(c: Case) -> tuple[Case, Case]:
    """In float64; and the absolute values, whose sums tell how large the terms are."""
    return numbers(c, Tensor.double), numbers(c, lambda t: t.double().abs())


@all_groups
@all_types
def test_layer(group, types) -> None:
    c = _case(group, types)
    found = c.run()
    assert (found.dtype, found.shape) == (c.y.dtype, c.y.shape)
    exact, magnitude = map(_exact, _doubles(c))
    check_close(found, exact, magnitude, c.x.shape[1] + 128 + 3, c.x, c.B)
    ranks = torch.cat([torch.diff(c.starts), c.starts.new_zeros(1)])
    base = ranks[c.index] == 0
    assert torch.equal(bits(found[base]), bits(c.y[base]))
    assert torch.equal(bits(c.run()), bits(found))


@pytest.mark.parametrize("chunk", [1, 16, 33, 64])
def test_chunks_of_any_size(chunk) -> None:
    c = replace(_case("many adapters", (BF16, BF16)), chunk=chunk)
    exact, magnitude = map(_exact, _doubles(c))
    check_close(c.run(), exact, magnitude, c.x.shape[1] + 128 + 3, c.x, c.B)


@all_types
def test_rows_in_another_order_get_the_same_bits(types) -> None:
    c = _case("many adapters", types)
    order = torch.randperm(len(c.index), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    # Exact sums, so that the place of a row in a tile may decide nothing.
    c = numbers(c, Tensor.sign)
    moved = replace(c, x=c.x[order], y=c.y[order], index=c.index[order])
    assert torch.equal(bits(moved.run()), bits(c.run()[order]))


@all_groups
@all_types
def test_three_products(group, types) -> None:
    c = _case(group, types)
    n, size, top = c.n_adapters, c.size(), max(GROUPS[group][0])
    table = cut_into_chunks(c.index, n, size)
    doubles, magnitudes = _doubles(c)
    ranks = torch.cat([torch.diff(c.starts), c.starts.new_zeros(1)])[c.index[table.order]]
    own = torch.arange(top, device=DEVICE) < ranks[:, None]
    h = grouped_shrink(c.x, c.A, c.starts, *table, size, top)
    # The fixture's NaNs say which columns were written; the reference writes zeros.
    assert torch.equal(h.isnan(), ~own & runs_kernels(h))
    exact, magnitude = (
        torch.where(own, reference_grouped_shrink(d.x, d.A, c.starts, table, size, top), 0)
        for d in (doubles, magnitudes)
    )
    check_close(torch.where(own, h, 0), exact, magnitude, c.x.shape[1] + 3)
    found = grouped_expand(c.y, h, c.B, c.starts, c.scales, *table, size)
    expand = [
        reference_grouped_expand(d.y, of_h, d.B, c.starts, d.scales, table, size)
        for d, of_h in ((doubles, h.double()), (magnitudes, h.double().abs()))
    ]
    check_close(found, *expand, top + 128 + 3, c.B)
    # Where h is NaN, for the base and beyond the own rank, it must be left alone.
    found = grouped_outer(h, c.y, c.starts, *table, size, c.A.shape[0])
    outer = [
        reference_grouped_outer(of_h, d.y, c.starts, table, size, c.A.shape[0])
        for d, of_h in ((doubles, h.double()), (magnitudes, h.double().abs()))
    ]
    check_close(found, *outer, len(c.index) + 128 + 3, c.y)


@pytest.mark.parametrize("group", ["few rows", "a rank of zero", "one large, the others small", "many adapters"])
@all_types
def test_gradients(group, types) -> None:
    c = _case(group, types)
    weight = torch.randn(c.y.shape, generator=torch.Generator().manual_seed(1)).to(c.y)
    found, again = gradients(Case.run, c, weight), gradients(Case.run, c, weight)
    doubles, magnitudes = _doubles(c)
    exact, magnitude = gradients(_exact, doubles, weight.double()), gradients(_exact, magnitudes, weight.double().abs())
    terms = sum(c.x.shape) + c.y.shape[1] + 128 + 5
    for name, grad in found.items():
        assert grad.dtype == getattr(c, name).dtype
        assert torch.equal(bits(grad), bits(again[name])), name
        check_close(grad, exact[name], magnitude[name], terms, c.x, c.A, c.B)


def test_rows_that_cannot_be_right_are_nan() -> None:
    c = _case("few rows", (BF16, BF16))
    assert c.run(max_rank=16).isnan().all(1).tolist() == [True, False, False, False, False]
    c.index[1], c.index[4] = -2, 3
    assert c.run().isnan().all(1).tolist() == [False, True, False, False, True]


def test_nothing_to_do() -> None:
    for T, K, N, ranks in ((0, 5, 7, [3]), (5, 0, 7, [3]), (5, 7, 0, [3]), (5, 7, 3, []), (5, 7, 3, [0])):
        c = make_case(ranks, [len(ranks) - 1] * T, K, N)
        c = replace(numbers(c, lambda t: t.to(DEVICE)), starts=c.starts.to(DEVICE), index=c.index.to(DEVICE))
        assert torch.equal(c.run(), c.y)
