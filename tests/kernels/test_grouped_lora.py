"""Grouped LoRA: its chunks, its ops as torch sees them, and what it computes where no kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptc.errors import BackendError
from adaptc.kernels._grouped_products import launch_expand, launch_shrink
from adaptc.kernels._row_chunks import adapter_edges, chunk_count, position_adapters
from adaptc.kernels.grouped_lora import (
    Chunks,
    cut_into_chunks,
    grouped_expand,
    grouped_lora,
    grouped_outer,
    grouped_shrink,
    reference_grouped_lora,
)
from tests.kernels import run_cases
from tests.kernels.grouped_lora_cases import Case, cases, check_against_oracle, check_gradients, make_case
from tests.kernels.on_gpu import guards_of_launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.long
def test_kernels_interpreted() -> None:
    run_cases("grouped_lora")


@given(st.integers(0, 6).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(-3, n + 2)))), st.integers(1, 9))
def test_chunks_have_each_row_once_beside_rows_of_its_adapter(case: tuple[int, list[int]], size: int) -> None:
    n, index = case
    table = cut_into_chunks(torch.tensor(index, dtype=torch.int64), n, size)
    groups = [i if -1 <= i < n else n for i in index]
    assert {t.dtype for t in table} == {torch.int32}
    assert [len(t) for t in table[1:]] == [chunk_count(len(index), n, size)] * 3
    positions = []
    for adapter, start, length in zip(*(t.tolist() for t in table[1:]), strict=True):
        assert 0 <= length <= size
        positions += range(start, start + length)
        assert {groups[row] for row in table.order[start : start + length].tolist()} <= {adapter}
    assert positions == list(range(len(index)))
    # Sorted, and rows of one adapter in their own order.
    assert table.order.tolist() == sorted(range(len(index)), key=groups.__getitem__)
    assert table.adapter.tolist() == sorted(table.adapter.tolist())
    assert position_adapters(table).tolist() == sorted(groups)
    assert adapter_edges(table, n).tolist() == [sum(g < i for g in groups) for i in range(n + 1)]


def test_as_many_chunks_as_there_may_be_are_needed() -> None:
    """One row of the base, of each adapter but the last, and of none; the rest of the last one."""
    index = torch.tensor([-1, 0, 1, 3] + [2] * 9)
    assert cut_into_chunks(index, 3, 4).length.tolist() == [1, 1, 1, 4, 4, 1, 1, 0]
    assert chunk_count(14, 3, 4) == 8
    assert (cut_into_chunks(torch.cat([index, index[-1:]]), 3, 4).length > 0).sum() == 7


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_chunks_do_not_look_at_the_index(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        table = cut_into_chunks(torch.empty(37, dtype=dtype), 5, 16)
    assert [t.shape[0] for t in table] == [37, *[chunk_count(37, 5, 16)] * 3]


@given(cases(DTYPES))
def test_off_the_gpu(c: Case) -> None:
    check_against_oracle(c)


@given(cases(DTYPES, rows=20))
def test_gradients_off_the_gpu(c: Case) -> None:
    check_gradients(c)


def test_reference_is_the_definition() -> None:
    c = make_case([3, 0, 40, 17], [2, -1, 0, 3, 2, 2, 1] * 5, 67, 31)
    tensors = c.x, c.y, c.A, c.B, c.starts, c.scales, c.index
    torch.testing.assert_close(reference_grouped_lora(*tensors), c.run())
    assert torch.equal(reference_grouped_lora(*tensors)[c.index == -1], c.y[c.index == -1])


def test_nan_of_an_adapter_stays_in_its_rows() -> None:
    c = make_case([3, 4], [0, 1, -1] * 3, 5, 7, chunk=2)
    out = c.run()
    c.A[1:4] = torch.nan
    c.x[c.index == 0] = torch.inf
    assert torch.equal(c.run().isnan().all(1), c.index == 0)
    assert torch.equal(c.run()[c.index != 0], out[c.index != 0])


def test_rows_that_cannot_be_right_are_nan() -> None:
    c = make_case([3, 8], [0, 1, -1, 0], 5, 7)
    assert c.run(max_rank=3).isnan().all(1).tolist() == [False, True, False, False]
    c.index[:] = torch.tensor([2, -2, -1, 0])
    assert c.run().isnan().all(1).tolist() == [True, True, False, False]


def _inputs(c: Case) -> list[Tensor]:
    return [t.requires_grad_() for t in (c.x, c.y, c.A[1:-2], c.B[1:-2], c.scales)]


@pytest.mark.long
def test_gradients_of_every_order() -> None:
    c = make_case([2, 0, 3, 1], [2, 0, 0, -1, 3, 1, 2], 4, 3, torch.float64, torch.float64)

    def run(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
        return grouped_lora(x, y, A, B, c.starts - 1, scales, c.index, chunk=2)

    inputs = [t.detach().clone().requires_grad_() for t in _inputs(c)]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("which", range(5))
def test_each_gradient_is_the_same_without_the_others(which: int) -> None:
    c = make_case([2, 0, 3, 1], [2, 0, 0, -1, 3, 1, 2], 4, 3, torch.float64, torch.float64)
    given = [t.detach() for t in _inputs(c)]

    def run(t: Tensor) -> Tensor:
        x, y, A, B, scales = (*given[:which], t, *given[which + 1 :])
        return grouped_lora(x, y, A, B, c.starts - 1, scales, c.index)

    assert torch.autograd.gradcheck(run, given[which].clone().requires_grad_())


@pytest.mark.long
def test_ops_are_what_their_schemas_say() -> None:
    c = make_case([2, 0, 3, 1], [2, 0, 0, -1, 3, 1, 2] * 5, 4, 3, torch.bfloat16)
    x, y, A, B, scales = (t.detach().clone().requires_grad_() for t in _inputs(c))
    starts, table = c.starts - 1, cut_into_chunks(c.index, 4, 16)
    h = torch.randn(35, 3, requires_grad=True)
    torch.library.opcheck(grouped_shrink, (x, A, starts, *table, 16, 3))
    torch.library.opcheck(grouped_expand, (y, h, B, starts, scales, *table, 16))
    torch.library.opcheck(grouped_outer, (h, y, starts, *table, 16, 8))


class _Layer(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return grouped_lora(*tensors, max_rank=40)


def _tensors(T: int) -> tuple[Tensor, ...]:
    c = make_case([3, 40], [0, 1, -1, 1, 0] * T, 7, 5)
    return c.x, c.y, c.A, c.B, c.starts, c.scales, c.index


def _with_gradients(layer: nn.Module, T: int) -> list[Tensor]:
    x, y, A, B, *others = _tensors(T)
    inputs = [t.requires_grad_() for t in (x, y, A, B)]
    out = layer(*inputs, *others)
    return [out, *torch.autograd.grad(out.sum(), inputs)]


@pytest.mark.long
def test_compiled_for_any_number_of_rows() -> None:
    compiled = torch.compile(_Layer(), backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (4, 7, 140):
        with torch.compiler.set_stance("default" if T == 4 else "fail_on_recompile"):
            found, expected = (_with_gradients(layer, T) for layer in (compiled, _Layer()))
            torch.testing.assert_close(found, expected)


def test_exported_as_ops_for_any_number_of_rows() -> None:
    rows = {0: torch.export.Dim("T", min=2)}
    sizes = (rows, rows, None, None, None, None, rows)
    program = torch.export.export(_Layer(), _tensors(4), dynamic_shapes=(sizes,))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"adaptc.grouped_shrink.default", "adaptc.grouped_expand.default"} <= called
    torch.testing.assert_close(program.module()(*_tensors(9)), _Layer()(*_tensors(9)))


def test_launches_hold_for_any_size() -> None:
    def shrink(x: Tensor, bank: Tensor, starts: Tensor, order: Tensor, chunk: Tensor) -> Tensor:
        return launch_shrink(x, bank, starts, Chunks(order, chunk, chunk, chunk), 32, 24)

    def expand(y: Tensor, h: Tensor, bank: Tensor, starts: Tensor, scales: Tensor, order: Tensor, c: Tensor) -> Tensor:
        return launch_expand(y, h, bank, starts, scales, Chunks(order, c, c, c), 32)

    assert not guards_of_launch(shrink, [(200, 136), (72, 136), (5,), (200,), (12,)])
    assert not guards_of_launch(expand, [(200, 136), (200, 24), (72, 136), (5,), (4,), (200,), (12,)])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"A": torch.ones(5, 6)}, "bank of 7 columns"),
    "bank": ({"B": torch.ones(6, 3)}, "as many rows in B as in A"),
    "rows": ({"y": torch.ones(3, 3)}, "as many rows in y as in x"),
    "index": ({"index": torch.zeros(4)}, "index: expected .* int32 or int64"),
    "fewer": ({"index": torch.zeros(3, dtype=torch.int64)}, "chunks of 4 rows"),
    "starts": ({"starts": torch.tensor([0, 2, 5])}, "starts contiguous and in int32"),
    "scales": ({"scales": torch.ones(3)}, "2 scales"),
    "whole": ({"x": torch.ones(4, 7, dtype=torch.int32)}, "x in float32"),
    "device": ({"A": torch.ones(5, 7, device="meta")}, "bank on cpu"),
    "flat": ({"x": torch.ones(4, 1, 7)}, "two dimensions"),
    "chunk": ({"chunk": 65}, "chunks of 1 to 64 rows"),
    "none": ({"chunk": 0}, "chunk: expected at least 1"),
    "cut": (
        {"index": cut_into_chunks(torch.zeros(4, dtype=torch.int64), 2, 1), "chunk": 16},
        "chunks, as cut_into_chunks",
    ),
}


@pytest.mark.parametrize("which", WRONG)
def test_refused(which: str) -> None:
    wrong, message = WRONG[which]
    right: dict[str, Any] = {
        "x": torch.ones(4, 7),
        "y": torch.ones(4, 3),
        "A": torch.ones(5, 7),
        "B": torch.ones(5, 3),
        "starts": torch.tensor([0, 2, 5], dtype=torch.int32),
        "scales": torch.ones(2),
        "index": torch.tensor([0, 1, -1, 0]),
    }
    assert grouped_lora(**right)[:, 0].tolist() == [15, 22, 1, 15]
    with pytest.raises(BackendError, match=message):
        grouped_lora(**(right | wrong))
