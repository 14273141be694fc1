"""Sums of rows are in place where nobody else reads what they are added to, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from adaptc.kernels import grouped_rows, grouped_rows_in_place
from adaptc.passes.graph.lifted import copy_graph
from adaptc.passes.optimize.add_in_place import AddInPlace
from adaptc.passes.protocol.low_rank_rows import low_rank_rows, low_rank_rows_in_place

linear, ours = torch.ops.aten.linear.default, torch.ops.adaptc


def alone(x: Tensor, w: Tensor, *rest: Tensor) -> Any:
    return low_rank_rows(x, linear(x, w), *rest)


def twice(x: Tensor, w: Tensor, *rest: Tensor) -> Any:
    return low_rank_rows(x, low_rank_rows(x, linear(x, w), *rest), *rest)


def read_again(x: Tensor, w: Tensor, *rest: Tensor) -> Any:
    y = linear(x, w)
    return low_rank_rows(x, y, *rest), y


def a_view(x: Tensor, w: Tensor, *rest: Tensor) -> Any:
    return low_rank_rows(x, torch.ops.aten.view.default(x, [3, 11, 7]), *rest)


def an_input(x: Tensor, w: Tensor, *rest: Tensor) -> Any:
    return low_rank_rows(x, x, *rest)


@pytest.mark.parametrize(
    ("function", "count", "width"), [(alone, 1, 5), (twice, 2, 5), (read_again, 0, 5), (a_view, 0, 7), (an_input, 0, 7)]
)
def test_where_it_fires(function: Any, count: int, width: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, A, B = (torch.randn(*s, generator=g) for s in ((3, 11, 7), (5, 7), (2, 4, 7), (2, width, 4)))
    inputs = (x, w, A, B, torch.tensor([0.5, 1.5]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
    module = make_fx(function, pre_dispatch=True)(*inputs)
    before = [t.clone() for t in inputs]
    expected = module(*inputs)
    result = AddInPlace()(copy_graph(module.graph))
    assert result.count == count
    assert sum(n.target is low_rank_rows_in_place for n in result.output.nodes) == count
    found = fx.GraphModule(module, result.output)(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))


def test_kernels_of_a_bank_write_in_place_too() -> None:
    g = torch.Generator().manual_seed(0)
    x, w, A, B = (torch.randn(*s, generator=g) for s in ((3, 11, 7), (5, 7), (2, 4, 7), (2, 4, 5)))
    starts, scale = torch.tensor([0, 3, 4, 6, 8], dtype=torch.int32), torch.tensor([0.5, 0.0, 1.5, 0.0])
    rest = A, B.transpose(1, 2), starts, scale, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])

    def layer(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        return grouped_rows(x, linear(x, w), *rest)

    module = make_fx(layer, pre_dispatch=True)(x, w, *rest)
    result = AddInPlace()(copy_graph(module.graph))
    assert [n.target for n in result.output.nodes].count(grouped_rows_in_place) == result.count == 1
    assert torch.equal(fx.GraphModule(module, result.output)(x, w, *rest), module(x, w, *rest))
    with_gradient = x.clone().requires_grad_()
    fx.GraphModule(module, result.output)(with_gradient, w, *rest).sum().backward()
    assert with_gradient.grad is not None
