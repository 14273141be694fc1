"""Where rows are in the values of a program, and whether they stay apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc.bank.find_batch_axis import find_batch, find_row_axes
from adaptc.passes.protocol.bank_method import RowAxis

B = torch.export.Dim("b", max=9)


class Flat(nn.Module):
    """Rows of several tokens, as one axis: row after row, or token after token."""

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.layer, self.inside = nn.Linear(5, 7), inside

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        if self.inside:
            return self.layer(x.transpose(0, 1).reshape(-1, 5)).view(tokens, rows, 7).sum(0)
        return self.layer(x.reshape(-1, 5)).view(rows, tokens, 7).sum(1)


class Table(nn.Module):
    """A layer that reads what no input changes, once for each row."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.layer, self.inside = nn.Linear(5, 7), inside
        self.register_buffer("table", torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if self.inside:
            return x + self.layer(self.table.repeat_interleave(rows, 0)).view(4, rows, 7).sum(0)
        return x + self.layer(self.table.repeat(rows, 1)).view(rows, 4, 7).sum(1)


class Of(nn.Module):
    """A layer, and what is done to what it reads."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.layer, self.before = nn.Linear(5, 7), before

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.before(x)))


def found(model: nn.Module, x: Any, free: Any = B) -> tuple[RowAxis | None, str]:
    """Where the rows are behind the layer of a model, or why nowhere."""
    args = x if isinstance(x, tuple) else (x,)
    shapes = None if free is None else tuple({0: free} if a.ndim and a.shape[0] > 1 else {} for a in args)
    program = torch.export.export(model.eval(), args, dynamic_shapes=shapes)
    (name,) = [n.name for n in program.graph.nodes if "linear" in str(n.target)]
    where, why = find_row_axes(program, find_batch(program), [name])
    assert set(where) | set(why) == {name}
    return where.get(name), why.get(name, "")


@pytest.mark.parametrize(
    ("model", "x", "free", "where"),
    [
        (Of(lambda x: x), torch.randn(4, 5), B, RowAxis(0)),
        (Of(lambda x: x.transpose(0, 1)), torch.randn(4, 3, 5), B, RowAxis(1)),
        (Flat(), torch.randn(4, 3, 5), B, RowAxis(0, "rows outside")),
        (Flat(inside=True), torch.randn(4, 3, 5), B, RowAxis(0, "rows inside")),
        (Of(lambda x: x[:, None].expand(-1, 4, -1).reshape(-1, 5)), torch.randn(4, 5), B, RowAxis(0, "rows outside")),
        (Of(lambda x: torch.cat([x, -x])), torch.randn(4, 5), B, RowAxis(0, "rows inside")),
        # sizes that are numbers, and others that equal them
        (Flat(), torch.randn(3, 3, 5), None, RowAxis(0, "rows outside")),
        (Of(lambda x: x.transpose(0, 1)), torch.randn(3, 3, 5), None, RowAxis(1)),
        (Of(lambda x: x), torch.randn(1, 3, 5), None, RowAxis(0)),
        # numbers of rows that there may be
        (Of(lambda x: x), torch.randn(2, 5), torch.export.Dim("b", max=2), RowAxis(0)),
        (Of(lambda x: x), torch.randn(4, 5), 2 * torch.export.Dim("half", max=5), RowAxis(0)),
    ],
)
def test_where_rows_are(model: nn.Module, x: Tensor, free: Any, where: RowAxis) -> None:
    assert found(model, x, free) == (where, "")


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (lambda x: x - x.mean(0, keepdim=True), "rows are not apart"),
        (lambda x: x.flip(0), "rows are not apart"),
        (lambda x: x[x[:, 0].argsort()], "rows are not apart"),
        (lambda x: x.cumsum(0), "rows are not apart"),
        (lambda x: torch.cat([x, x[:1]]), "has no axis for the"),
        (lambda x: x.sum(0), "has no axis for the"),
        (lambda x: torch.ones(3, 5), "has no axis for the"),
    ],
)
def test_rows_that_mix_have_no_place(before: Any, why: str) -> None:
    where, said = found(Of(before), torch.randn(4, 5))
    assert where is None
    assert why in said


@pytest.mark.parametrize("inside", [False, True])
def test_what_no_input_changes_does_not_tell_its_order(inside: bool) -> None:
    assert found(Table(inside), torch.randn(3, 7))[0] is None
    assert "nothing tells which row is where" in found(Table(inside), torch.randn(3, 7))[1]


def test_an_axis_with_the_symbol_of_the_rows_needs_no_telling() -> None:
    where, _ = found(Of(lambda x: torch.ones_like(x)), torch.randn(4, 5))
    assert where == RowAxis(0)


def test_a_number_that_happens_to_be_that_of_the_rows_does() -> None:
    where, why = found(Of(lambda x: torch.ones(3, 5)), torch.randn(3, 5), None)
    assert where is None
    assert "nothing tells" in why


def test_small_changes_beside_large_constants_are_seen() -> None:
    """A channel that is large whatever the input is hides neither rows nor what mixes them."""
    large = torch.tensor([1e5, 0, 0, 0, 0])
    assert found(Of(lambda x: x + large), torch.randn(4, 5)) == (RowAxis(0), "")
    assert found(Of(lambda x: x + x.mean(0) + large), torch.randn(4, 5))[0] is None


def test_the_batch_is_the_first_axis_that_is_free() -> None:
    class Scaled(nn.Module):
        def forward(self, scale: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return scale * x + y

    shapes = ({}, {0: B}, {0: B})
    args = (torch.randn(5), torch.randn(4, 5), torch.randn(4, 5))
    rows = find_batch(torch.export.export(Scaled(), args, dynamic_shapes=shapes))
    assert rows.inputs == {"x": 0, "y": 0}
    assert rows.first_input == ("x", 0)


def test_a_program_without_an_axis_has_no_rows() -> None:
    class Number(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    program = torch.export.export(Number(), (torch.tensor(1.0),))
    with pytest.raises(adaptc.TargetError, match="no input of the program has an axis of rows"):
        find_batch(program)


def test_looking_writes_to_no_buffer() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 7)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return self.layer(x)

    program = torch.export.export(Counting(), (torch.randn(4, 5),), dynamic_shapes=({0: B},))
    (name,) = [n.name for n in program.graph.nodes if "linear" in str(n.target)]
    find_row_axes(program, find_batch(program), [name])
    assert float(program.state_dict["count"]) == 0
