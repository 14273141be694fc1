"""Costs are expressions of sizes, whatever functions of sizes torch traced."""

from __future__ import annotations

import inspect

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils._sympy import functions

import adaptc
from adaptc import LoraConfig
from adaptc.passes.analysis.costs import evaluate_at_sizes, size_expression

SIZES = {"s0": 23, "s1": 5}


class Padded(nn.Module):
    """Pads to whole windows of seven, as Swin does: the number of rows is (s + (-s) % 7) // 7."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 0, 0, (7 - x.shape[1] % 7) % 7))
        return self.lin(x.unflatten(1, (-1, 7)).flatten(0, 1))


@pytest.mark.long
def test_sizes_of_windows() -> None:
    torch.manual_seed(0)
    model, x = Padded(), torch.rand(3, 16, 5)
    config = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=x)
    assert "operations per call" in str(adaptc.report(program))
    for n in (16, 20, 29):
        y = torch.rand(2, n, 5)
        assert program(y).shape == model(y).shape
        torch.testing.assert_close(adaptc.merge(program)(y), program(y))


@pytest.mark.parametrize("name", sorted(n for n, f in vars(functions).items() if inspect.isclass(f)))
def test_functions_of_sizes_are_numbers(name: str) -> None:
    """Those that are not known count as sizes of which nothing is known."""
    function = getattr(functions, name)
    if not issubclass(function, sympy.Function) or function.__module__ != functions.__name__:
        return
    s0, s1 = (sympy.Symbol(n, integer=True, positive=True) for n in SIZES)
    texts = [f"{name}({', '.join(map(str, args))})" for args in ((s0,), (s0, s1), (s0, s1, 3))]
    for text in texts:
        try:
            expression = size_expression(text)
        except TypeError:  # another number of arguments
            continue
        assert float(evaluate_at_sizes(expression * 2, SIZES)) is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PythonMod(-s0, 7)", -23 % 7),
        ("s0 + PythonMod(-s0, 7)", 28),
        ("FloorDiv(s0, s1)", 4),
        ("(s0//7)", 3),
        ("CeilToInt(IntTrueDiv(s0, s1))", 5),
        ("ModularIndexing(s0, 2, s1)", 1),
        ("Max(s0, s1)", 23),
        ("Something(s0, s1)", 1),
    ],
)
def test_values(text: str, expected: int) -> None:
    assert evaluate_at_sizes(size_expression(text), SIZES) == expected
