"""Writes become new values; of inputs, values that a graph returns. Where a result would change they stay writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from adaptc.passes.graph.mutation import written_inputs
from adaptc.passes.lower.functional_writes import without_writes

aten = torch.ops.aten
INDEX = torch.tensor([4, 1])


class Program:
    """A graph in the making over two inputs of shape (5, 3), and ``rows`` of shape (2, 3)."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.a, self.b, self.rows = (self.graph.placeholder(n) for n in ("a", "b", "rows"))
        self.index = self.graph.placeholder("index")

    def __call__(self, op: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(op, args)

    def copy(self, place: fx.Node) -> fx.Node:
        return self(aten.index_copy_.default, place, 0, self.index, self.rows)

    def returns(self, *results: fx.Node) -> fx.Graph:
        self.graph.output(results)
        self.graph.lint()
        return self.graph


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [*(torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (5, 5, 2)), INDEX]


def run(graph: fx.Graph) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The inputs after a run, and the results."""
    inputs = tensors()
    results = fx.GraphModule({}, graph)(*inputs)
    return inputs, results


def check(graph: fx.Graph) -> tuple[int, ...]:
    """The numbers of the inputs whose writes became values; all values are compared with those of ``graph``."""
    made, written = without_writes(graph)
    made.lint()
    (old_inputs, old_results), (inputs, results) = run(graph), run(made)
    for number, new in zip(written, results, strict=False):
        assert torch.equal(inputs[number], tensors()[number])
        inputs[number] = new
    for found, expected in zip([*inputs, *results[len(written) :]], [*old_inputs, *old_results], strict=True):
        assert torch.equal(found, expected)
    return written


def writes(graph: fx.Graph) -> int:
    return sum(bool(list(written_inputs(n))) for n in graph.nodes)


def test_a_write_becomes_the_first_result() -> None:
    p = Program()
    p.copy(p.b)
    graph = p.returns(p(aten.sin.default, p.b), p(aten.cos.default, p.a))
    assert check(graph) == (1,)
    assert writes(without_writes(graph).graph) == 0
    assert writes(graph) == 1


def test_reads_before_between_and_after_see_what_they_saw() -> None:
    p = Program()
    before = p(aten.exp.default, p.a)
    first = p.copy(p.a)
    between = p(aten.sin.default, first)
    p(aten.mul_.Tensor, p.a, p.b)
    after = [p(aten.sin.default, n) for n in (p.a, first)]
    assert check(p.returns(before, between, *after)) == (0,)


def test_two_inputs_keep_their_order() -> None:
    p = Program()
    p.copy(p.b)
    p.copy(p.a)
    assert check(p.returns(p(aten.add.Tensor, p.a, p.b))) == (0, 1)


def test_memory_of_the_graph_itself() -> None:
    p = Program()
    made = p(aten.exp.default, p.a)
    p.copy(made)
    graph = p.returns(p(aten.sin.default, made), made)
    assert check(graph) == ()
    assert writes(without_writes(graph).graph) == 0


def test_a_view_after_the_last_write_is_of_the_new_value() -> None:
    p = Program()
    view = p(aten.transpose.int, p.copy(p.a), 0, 1)
    assert check(p.returns(p(aten.sin.default, view))) == (0,)


def early_view(p: Program) -> fx.Node:
    view = p(aten.transpose.int, p.a, 0, 1)
    p.copy(p.a)
    return p(aten.sin.default, view)


def write_to_a_view(p: Program) -> fx.Node:
    p(aten.mul_.Scalar, p(aten.slice.Tensor, p.a, 0, 1, 3), 2.0)
    return p(aten.sin.default, p.a)


def returned(p: Program) -> fx.Node:
    return p.copy(p.a)


def no_other_form(p: Program) -> fx.Node:
    p.graph.call_function(aten.exp.out, (p.b,), {"out": p.a})
    return p(aten.sin.default, p.a)


@pytest.mark.parametrize("build", [early_view, write_to_a_view, returned, no_other_form])
def test_what_stays_a_write(build: Any) -> None:
    p = Program()
    graph = p.returns(build(p))
    assert check(graph) == ()
    assert writes(without_writes(graph).graph) == 1


@given(st.data())
def test_any_program(data: st.DataObject) -> None:
    """Reads, views, and writes in any order: values are those of the graph, whatever becomes a value."""
    p = Program()
    wholes, squares = [p.a, p.b], list[fx.Node]()
    results = [p(aten.cos.default, p.a)]
    for _ in range(data.draw(st.integers(1, 9))):
        node = data.draw(st.sampled_from(wholes))
        kind = data.draw(st.sampled_from(["read", "copy", "scale", "add", "fill", "flip", "part", "own"]))
        if kind == "read":
            results.append(p(aten.sin.default, node))
        elif kind == "copy":
            wholes.append(p.copy(node))
        elif kind == "scale":
            wholes.append(p(aten.mul_.Scalar, node, 0.5))
        elif kind == "add":
            wholes.append(p(aten.add_.Tensor, node, data.draw(st.sampled_from(wholes))))
        elif kind == "fill":
            p(aten.copy_.default, node, data.draw(st.sampled_from(wholes)))
        elif kind == "flip":
            squares.append(p(aten.transpose.int, node, 0, 1))
        elif kind == "part":
            p(aten.mul_.Scalar, p(aten.slice.Tensor, node, 0, 1, 3), 2.0)
        else:
            wholes.append(p(aten.clone.default, node))
    results += [p(aten.exp.default, n) for n in squares]
    if data.draw(st.booleans()):
        results.append(data.draw(st.sampled_from(wholes)))
    check(p.returns(*results))
