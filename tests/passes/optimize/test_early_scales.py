"""The pass that scales inputs of up projections: where it moves a scale, where it must not, and that values stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from adaptc.passes.optimize.early_scales import EarlyScales
from tests.support.pass_checks import export

aten = torch.ops.aten
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


class Scaled(nn.Module):
    """``body(self, x)`` over factors of rank 2, a narrow one, and scales."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.a, self.b = (nn.Parameter(torch.randn(n, m, generator=generator)) for n, m in ((2, 5), (7, 2)))
        self.bias = nn.Parameter(torch.randn(7, generator=generator))
        self.register_buffer("one", torch.tensor([0.7]))
        self.register_buffer("number", torch.tensor(0.7))
        self.register_buffer("wide", torch.tensor([0.7], dtype=torch.float64))
        self.register_buffer("vector", torch.rand(7, generator=generator))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def up(m: Any, x: Tensor, bias: Any = None) -> Tensor:
    return F.linear(F.linear(x, m.a), m.b, bias)


def moved(body: Callable[[Any, Tensor], Any]) -> tuple[int, fx.Graph]:
    program = export(Scaled(body).eval(), X)
    expected = program.module()(X)
    result = EarlyScales()(program.graph_module.graph)
    program.graph_module.recompile()
    torch.testing.assert_close(program.module()(X), expected, rtol=1e-5, atol=1e-6)
    return result.count, program.graph


@pytest.mark.parametrize(
    "body",
    [lambda m, x: up(m, x) * m.one, lambda m, x: m.one * up(m, x), lambda m, x: up(m, x) * m.number],
    ids=["one element", "from the left", "without axes"],
)
def test_the_scale_multiplies_the_narrow_input(body: Callable[[Any, Tensor], Any]) -> None:
    count, graph = moved(body)
    (product,) = [n for n in graph.nodes if n.target is aten.mul.Tensor]
    assert count == 1
    assert product.meta["val"].shape == (3, 2)
    assert [n.target for n in product.users] == [aten.linear.default]


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: F.linear(x, m.a) * m.one,
        lambda m, x: up(m, x, m.bias) * m.one,
        lambda m, x: up(m, x) * m.vector,
        lambda m, x: up(m, x) * m.wide,
        lambda m, x: up(m, x) * (m.one + 1),
        lambda m, x: (y := up(m, x)) * m.one + y,
    ],
    ids=["it narrows", "a bias", "a scale per column", "another dtype", "a computed scale", "read twice"],
)
def test_other_scales_stay(body: Callable[[Any, Tensor], Any]) -> None:
    count, _ = moved(body)
    assert count == 0
