"""Grouped LoRA: its kernels, interpreted, against a loop over rows in float64. See :func:`tests.kernels.run_cases`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptc.kernels._launch import INTERPRETED
from adaptc.kernels.grouped_lora import cut_into_chunks, grouped_lora, grouped_outer, grouped_shrink, rows_per_chunk

# The interpreter takes milliseconds for each program of a grid.
fewer = settings(max_examples=settings().max_examples // 2)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The most that rounding to a type moves a number, relative to it.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Case:
    """The arguments of grouped_lora."""

    x: Tensor
    y: Tensor
    A: Tensor
    B: Tensor
    starts: Tensor
    scales: Tensor
    index: Tensor
    chunk: int | None = None

    def run(self, **options: int) -> Tensor:
        tensors = self.x, self.y, self.A, self.B, self.starts, self.scales, self.index
        return grouped_lora(*tensors, chunk=self.chunk, **options)

    @property
    def n_adapters(self) -> int:
        return len(self.scales)

    def size(self) -> int:
        return rows_per_chunk(len(self.index)) if self.chunk is None else self.chunk

    def slot(self, t: int) -> slice:
        """The bank's rows of row t, which are none for the base."""
        i = int(self.index[t])
        return slice(0, 0) if i < 0 else slice(int(self.starts[i]), int(self.starts[i + 1]))


def make_case(
    ranks: list[int],
    index: list[int],
    K: int,
    N: int,
    x: torch.dtype = torch.float32,
    bank: torch.dtype = torch.float32,
    chunk: int | None = None,
    seed: int = 0,
) -> Case:
    """Random values. Before and after the adapters the bank has rows that belong to none, where every number is NaN."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float32).to(dtype)

    T, S = len(index), sum(ranks) + 3
    A, B = random(S, K, dtype=bank), random(S, N, dtype=bank)
    for matrix in (A, B):
        matrix[0] = matrix[-2:] = torch.nan
    starts = torch.tensor([1, *(1 + end for end in accumulate(ranks))], dtype=torch.int32)
    scales = random(len(ranks), dtype=torch.float64 if x == torch.float64 else torch.float32)
    x_rows, y_rows = random(T, K, dtype=x), random(T, N, dtype=x)
    return Case(x_rows, y_rows, A, B, starts, scales, torch.tensor(index, dtype=torch.int64), chunk)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, rows: int = 45) -> Case:
    """Any number of adapters of any ranks, and rows that are spread over all or some of them, or one, or none."""
    ranks = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64, 101, 128]), max_size=5))
    used = draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=1, max_size=4))
    index = draw(st.lists(st.sampled_from(used), min_size=1, max_size=rows))
    width = st.sampled_from([1, 2, 7, 16, 31, 64, 67, 129])
    return make_case(
        ranks,
        index,
        draw(st.one_of(width, st.just(283))),
        draw(width),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from([None, None, 3, 16, 33, 64])),
        draw(st.integers(0, 2**32 - 1)),
    )


def numbers(c: Case, of: Callable[[Tensor], Tensor]) -> Case:
    """The case with ``of`` each of its numbers."""
    return replace(c, x=of(c.x), y=of(c.y), A=of(c.A), B=of(c.B), scales=of(c.scales))


def oracle(c: Case) -> Tensor:
    """The definition, row by row, in the type of the case."""
    rows = []
    for t, i in enumerate(c.index.tolist()):
        own = c.slot(t)
        update = c.scales[i] * (c.x[t] @ c.A[own].T) @ c.B[own] if own.stop > own.start else 0
        rows.append(c.y[t] + update)
    return torch.stack(rows)


def check_close(found: Tensor, right: Tensor, magnitude: Tensor, terms: int, *others: Tensor) -> None:
    """Within the bounds of the arithmetic: ``magnitude`` is the same sum of ``terms`` terms made of absolute values."""
    types = {found.dtype, *(t.dtype for t in others)}
    sums = terms * ROUNDING[torch.float64 if torch.float64 in types else torch.float32]
    # Where a sum meets a factor in bfloat16, it is two numbers of that type.
    sums += ROUNDING[torch.bfloat16] ** 2 if torch.bfloat16 in types else 0
    smallest = torch.finfo(found.dtype).smallest_normal * ROUNDING[found.dtype]
    allowed = sums * magnitude + ROUNDING[found.dtype] * (right.abs() + sums * magnitude) + smallest
    assert ((found.double() - right).abs() <= allowed).all()


def check_against_oracle(c: Case) -> None:
    """Rows of adapters are close; rows without one the same bit by bit."""
    out = c.run()
    assert out.dtype == c.y.dtype
    assert out.shape == c.y.shape
    right, magnitude = (oracle(numbers(c, of)) for of in (Tensor.double, lambda t: t.double().abs()))
    check_close(out, right, magnitude, c.x.shape[1] + 128 + 3, c.x, c.B)
    base = torch.tensor([c.slot(t).start == c.slot(t).stop for t in range(len(c.index))])
    assert torch.equal(bits(out[base]), bits(c.y[base]))


def bits(t: Tensor) -> Tensor:
    """So that NaNs are equal if they are, and 0 is not -0."""
    return t.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


@pytest.fixture(autouse=True)
def _nan_where_nothing_was_written() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def test_kernels_are_interpreted() -> None:
    assert INTERPRETED


@given(cases())
# One row; more chunks of one adapter than one; a sum that is split.
@example(make_case([7], [0], 1031, 33, torch.bfloat16, torch.bfloat16))
@example(make_case([1, 128, 0, 16], [3] * 5 + [1] * 67, 31, 257, torch.float16, torch.float16))
@example(make_case([4, 40], [-1] * 20, 16, 16))
def test_oracle(c: Case) -> None:
    check_against_oracle(c)


@pytest.mark.parametrize("bank", DTYPES)
@pytest.mark.parametrize("x", DTYPES)
def test_all_types(x: torch.dtype, bank: torch.dtype) -> None:
    check_against_oracle(make_case([3, 0, 40, 17], [2, -1, 0, 3, 2, 2, 1] * 5, 67, 131, x, bank, 16))


@given(cases(), st.randoms())
def test_rows_in_another_order(c: Case, random: object) -> None:
    # Exact sums: the interpreter's own products depend on where in a tile a row lies, the hardware's do not.
    c = numbers(c, Tensor.sign)
    order = list(range(len(c.index)))
    random.shuffle(order)
    moved = replace(c, x=c.x[order], y=c.y[order], index=c.index[order])
    assert torch.equal(bits(moved.run()), bits(c.run()[order]))


@fewer
@given(cases())
def test_same_bits_again(c: Case) -> None:
    again = replace(c, x=c.x.clone(), y=c.y.clone(), index=c.index.int())
    assert torch.equal(bits(c.run()), bits(again.run()))


@fewer
@given(cases(), st.integers(1, 60))
def test_more_rank_allowed_for_changes_nothing(c: Case, more: int) -> None:
    top = max(torch.diff(c.starts).tolist(), default=0)
    # So much that the sum over K is not split differently.
    assume(c.x.shape[1] < 256)
    assert torch.equal(bits(c.run(max_rank=top + more)), bits(c.run()))


# Of numpy, where the interpreter multiplies infinities.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@fewer
@given(cases(), st.integers(0, 4))
def test_nan_in_one_adapter_and_in_its_rows_stays_there(c: Case, bad: int) -> None:
    assume(bad < c.n_adapters)
    out = c.run()
    mine = c.index == bad
    for matrix in (c.A, c.B):
        matrix[c.starts[bad] : c.starts[bad + 1]] = torch.nan
    c.x[mine] = torch.inf
    assert torch.equal(bits(c.run()[~mine]), bits(out[~mine]))


@fewer
@given(cases(), st.lists(st.integers(-9, 9).filter(lambda i: i < -1 or i > 4), min_size=1, max_size=20))
def test_adapters_that_do_not_exist_give_nan(c: Case, wrong: list[int]) -> None:
    x = torch.ones(len(wrong), c.x.shape[1], dtype=c.x.dtype)
    y = torch.ones(len(wrong), c.y.shape[1], dtype=c.y.dtype)
    more = replace(c, x=torch.cat([x, c.x]), y=torch.cat([y, c.y]), index=torch.cat([torch.tensor(wrong), c.index]))
    out = more.run()
    assert out[: len(wrong)].isnan().all()
    assert not out[len(wrong) :].isnan().any()


def test_higher_rank_than_allowed_for_gives_nan() -> None:
    c = make_case([3, 8, 20], [0, 1, 2, -1] * 3, 16, 16)
    out = c.run(max_rank=8)
    assert torch.equal(out.isnan().all(1), c.index == 2)
    assert torch.equal(out[c.index != 2], c.run()[c.index != 2])


def test_zero_keeps_its_sign_without_an_adapter() -> None:
    c = make_case([0, 3], [0, -1, 1], 16, 16)
    c.y.fill_(-0.0)
    c.x.zero_()
    assert c.run().signbit().tolist() == [[True] * 16, [True] * 16, [False] * 16]


@fewer
@given(cases())
def test_shrink_writes_the_own_columns_alone(c: Case) -> None:
    top = max(torch.diff(c.starts).tolist(), default=0) + 2
    table = cut_into_chunks(c.index, c.n_adapters, c.size())
    h = grouped_shrink(c.x, c.A, c.starts, *table, c.size(), top)
    for p, t in enumerate(table.order.tolist()):
        rank = c.slot(t).stop - c.slot(t).start
        assert h[p].isnan().tolist() == [False] * rank + [True] * (top - rank)


@fewer
@given(cases())
def test_rows_apart_in_memory(c: Case) -> None:
    wide = replace(c, x=torch.cat([c.x, c.x], 1)[:, : c.x.shape[1]], y=torch.cat([c.y, c.y], 1)[:, : c.y.shape[1]])
    assert torch.equal(bits(wide.run()), bits(c.run()))
    turned = replace(c, x=c.x.T.contiguous().T, y=c.y.T.contiguous().T, B=c.B.T.contiguous().T)
    assert torch.equal(bits(turned.run()), bits(c.run()))


def gradients(run: Callable[[Case], Tensor], c: Case, weight: Tensor) -> dict[str, Tensor]:
    inputs = {name: getattr(c, name).detach().requires_grad_() for name in ("x", "y", "A", "B", "scales")}
    out = (run(replace(c, **inputs)) * weight).sum()
    return dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), materialize_grads=True), strict=True))


def check_gradients(c: Case) -> None:
    """Close to those of the oracle, and the same bits again."""
    weight = torch.randn(c.y.shape, generator=torch.Generator().manual_seed(1)).to(c.y.dtype)
    found, again = gradients(Case.run, c, weight), gradients(Case.run, c, weight)
    right = gradients(oracle, numbers(c, Tensor.double), weight.double())
    magnitude = gradients(oracle, numbers(c, lambda t: t.double().abs()), weight.double().abs())
    terms = sum(c.x.shape) + c.y.shape[1] + 128 + 5
    for name, grad in found.items():
        assert torch.equal(bits(grad), bits(again[name]))
        assert grad.dtype == getattr(c, name).dtype
        check_close(grad, right[name], magnitude[name], terms, c.x, c.A, c.B)


@fewer
@given(cases(rows=20))
@example(make_case([40, 3, 17], [2, 0, 0, -1, 1] * 14, 67, 67, torch.bfloat16, torch.bfloat16))
def test_gradients(c: Case) -> None:
    check_gradients(c)


def test_no_rows_no_columns_no_adapters() -> None:
    for T, K, N, ranks in ((0, 5, 7, [3]), (5, 0, 7, [3]), (5, 7, 0, [3]), (5, 7, 3, []), (5, 7, 3, [0])):
        c = make_case(ranks, [len(ranks) - 1] * T, K, N)
        assert torch.equal(c.run(), c.y)
        table = cut_into_chunks(c.index, c.n_adapters, 16)
        assert grouped_outer(torch.zeros(T, 3), c.x, c.starts, *table, 16, 9).shape == (9, K)
