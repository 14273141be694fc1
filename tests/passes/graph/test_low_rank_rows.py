"""Low-rank changes of several adapters, each row with its own: both ways, against the sum that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaptc.passes.protocol.low_rank_rows import (
    divide_rows,
    low_rank_rows,
    low_rank_rows_direct,
    low_rank_rows_in_place,
    matmuls_by_adapter,
    stacked_matmul,
)


def in_place(x, y, A, B, scale, c):
    given = y.clone()
    out = low_rank_rows_in_place(x, given, A, B, scale, c)
    assert out.data_ptr() == given.data_ptr()
    return out


WAYS = [stacked_matmul, matmuls_by_adapter, low_rank_rows, in_place]


def case(rows: int, positions: int, count: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, positions, n, generator=g, dtype=torch.float64) for n in (7, 5))
    A = torch.randn(count, rank, 7, generator=g, dtype=torch.float64)
    B = torch.randn(5, count, rank, generator=g, dtype=torch.float64).transpose(0, 1)
    scale = torch.randn(count, generator=g, dtype=torch.float64)
    c = torch.randint(-1, 2, (rows, count), generator=g) * torch.rand(rows, count, generator=g)
    return x, y, A, B, scale, c


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 4), st.integers(1, 3), st.integers(0, 99))
def test_the_sum(rows, positions, count, rank, seed):
    x, y, A, B, scale, c = case(rows, positions, count, rank, seed)
    each = torch.einsum("rpi,kji,koj->krpo", x, A, B)
    expected = y + torch.einsum("rk,k,krpo->rpo", c.double(), scale, each)
    for way in WAYS:
        torch.testing.assert_close(way(x, y, A, B, scale, c), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_what_overflows_stays_with_its_rows(way):
    x, y, A, B, scale, _ = case(3, 2, 2, 3)
    c = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.5]])
    expected = way(x, y, A, B, scale, c)
    A[1] = 1e308
    found = way(x * 10, y, A, B, scale, c)
    torch.testing.assert_close(found[0], way(x * 10, y, A[:1].repeat(2, 1, 1), B, scale, c)[0])
    assert torch.equal(found[1], y[1])
    assert torch.equal(found[1], expected[1])
    assert not found[2].isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_written_to_what_it_reads(way):
    tensors = case(4, 3, 3, 2)
    before = [t.clone() for t in tensors]
    way(*tensors)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, -0.5]), min_size=4, max_size=4), max_size=9))
def test_each_row_has_its_adapters_once(rows):
    stretches, runs = divide_rows(rows)
    found = [(i, k, w) for first, last, k, w in stretches for i in range(first, last)]
    for first, adapters, weights in runs:
        assert len(adapters) > 1
        found += [(first + i, k, w) for i, (k, w) in enumerate(zip(adapters, weights, strict=True))]
    assert sorted(found) == [(i, k, w) for i, row in enumerate(rows) for k, w in enumerate(row) if w]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("adapters", "weights"),
    [
        ((0, 1, 2, None), (1.0, 1.0, 1.0)),
        ((2, 0, None, 1, 0), (0.5, -1.0, 1.5, 0.25)),
        ((3, None, 1, 3, 2, 0, None, None, 1), (1.0,) * 6),
    ],
)
def test_a_batch_of_products_for_rows_of_one_adapter_each(adapters, weights, dtype):
    c = torch.zeros(len(adapters), 4)
    for i, w in zip([i for i, k in enumerate(adapters) if k is not None], weights, strict=True):
        c[i, adapters[i]] = w
    assert len(divide_rows(c.tolist())[1]) > 0
    tensors = [t.to(dtype) for t in case(len(adapters), 11, 4, 3, seed=4)[:5]]
    x, y, A, B, scale = tensors
    each = torch.einsum("rpi,kji,koj->krpo", *(t.double() for t in (x, A, B)))
    expected = y.double() + torch.einsum("rk,k,krpo->rpo", c.double(), scale.double(), each)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    for way in (matmuls_by_adapter, in_place):
        found = way(x, y, A, B, scale, c)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        nothing = [i for i, k in enumerate(adapters) if k is None]
        assert torch.equal(found[nothing], y[nothing])


@settings(max_examples=25, deadline=None)
@example([0, 1, 2, 3], 9, False, torch.float64, True)
@example([0, 0, 1, 1, 2, 2, 3, 3], 9, False, torch.float32, True)
@example([1, 0, 2, 3], 9, False, torch.float64, True)
@given(
    st.lists(st.integers(-1, 3), min_size=1, max_size=9),
    st.sampled_from([1, 9, 40]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
    st.booleans(),
)
def test_gradients(adapter_of_row, positions, has_weights, dtype, wants_input):
    """Rows computed by adapter have the gradients, and gradients of gradients, of one matmul with all factors."""
    adapter_of_row = adapter_of_row * (1 if positions > 1 else 7)  # many rows of one token are gathered by adapter
    rows, count = len(adapter_of_row), 4
    x, y, A, B, scale, _ = case(rows, positions, count, 3, rows)
    c = torch.zeros(rows, count)
    for i, k in enumerate(adapter_of_row):
        if k >= 0:
            c[i, k] = 0.3 * (i % 3) - 0.7 if has_weights else 1.0
    found = []
    for way in (low_rank_rows_direct, low_rank_rows_in_place, stacked_matmul):
        own = [
            t.detach().clone().to(d).requires_grad_() for t, d in ((x, dtype), (y, dtype), (A, A.dtype), (B, B.dtype))
        ]
        own[0].requires_grad_(wants_input)
        leaves = [t for t in own if t.requires_grad]
        out = way(own[0], own[1] * 1.0, own[2], own[3], scale, c)
        total = out.double().sin().sum()
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        again = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.double().square().sum() for g in again), leaves)
        found.append([out.detach(), *first, *(g.detach() for g in again), *second])
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for made in found[:2]:
        for f, want in zip(made, found[2], strict=True):
            torch.testing.assert_close(f, want, rtol=tolerance, atol=tolerance * max(1.0, float(want.abs().max())))
