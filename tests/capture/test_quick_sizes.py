"""Sizes of many terms are divided as before, without being simplified."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._sympy import functions
from torch.utils._sympy.functions import FloorDiv, PythonMod

import adaptc
from adaptc import LoraConfig
from adaptc.capture import dynamic_shapes
from adaptc.capture.capture import capture
from adaptc.capture.replacements import quick_sizes

S0, S1 = (sympy.Symbol(n, integer=True, positive=True) for n in ("s0", "s1"))


def padded(size: Any, windows: list[int]) -> Any:
    """A size that is padded to whole windows, several times."""
    for window in windows:
        size = (size + PythonMod(-size, window)) * window + S1
    return size


@given(st.lists(st.integers(2, 9), min_size=1, max_size=3), st.integers(2, 6), st.integers(1, 40), st.integers(1, 40))
def test_quotients_have_their_values(windows: list[int], divisor: int, a: int, b: int) -> None:
    size = padded(S0, windows) * divisor
    with quick_sizes.fast_size_arithmetic():
        quick = FloorDiv(size, divisor * S1)
    numbers = {S0: sympy.Integer(a), S1: sympy.Integer(b)}
    assert quick.xreplace(numbers) == size.xreplace(numbers) // (divisor * b)


def test_only_what_is_large_and_undivided_is_left() -> None:
    small, large = (S0 * S1 + S0) / S0, padded(S0, [3, 5, 7, 4])
    assert quick_sizes.simplify(small) == S1 + 1
    assert quick_sizes.simplify(large) is large
    assert quick_sizes.simplify(large * S0 / S0) == large


EXPRESSIONS = [
    padded(S0, [3, 5]),
    sympy.Max(S0, S1 * S0) + FloorDiv(S0 + S1, 3),
    sympy.And(sympy.Ge(S0, 3), sympy.Ne(S1, 2)),
    sympy.Piecewise((S0, S0 > 3), (S1, True)),
    sympy.Integer(3),
    S1,
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_walks_find_what_sympys_find(expression: Any) -> None:
    kinds = (sympy.Symbol, FloorDiv, (sympy.Symbol, PythonMod), sympy.Integer, S0)
    rules = [{S0: S1 + 2}, {S0: S1, S1: S0}, {S0: sympy.Integer(7)}, {expression: S1}, {}]

    def results() -> list[Any]:
        atoms = [expression.atoms(*(k if isinstance(k, tuple) else (k,))) for k in kinds]
        return [*atoms, expression.atoms(), expression.free_symbols, *map(expression.xreplace, rules)]

    expected, own = results(), [vars(sympy.Basic)[n] for n in ("atoms", "free_symbols", "xreplace")]
    with quick_sizes.fast_size_arithmetic():
        assert results() == expected
        assert results() == expected  # what is known from before
    assert [vars(sympy.Basic)[n] for n in ("atoms", "free_symbols", "xreplace")] == own


class Windows(nn.Module):
    """Pads to windows, mixes within each, and takes every second: as stages of Swin do."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for window in (3, 5):
            x = nn.functional.pad(x, (0, 0, 0, (window - x.shape[1] % window) % window))
            parts = x.view(x.shape[0], x.shape[1] // window, window, 4)
            x = (self.lin(parts) + parts.mean(2, keepdim=True)).flatten(1, 2)
            x = torch.cat([x[:, 0::2], x[:, 0::2]], 1)
        return x


@pytest.mark.long
def test_the_program_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Windows().eval(), torch.rand(2, 31, 4)
    before = functions.sympy
    found = capture(model, x).program
    assert functions.sympy is before
    monkeypatch.setattr(dynamic_shapes, "fast_size_arithmetic", contextlib.nullcontext)
    plain = capture(model, x).program
    assert found.graph_module.code == plain.graph_module.code
    assert str(found.range_constraints) == str(plain.range_constraints)
    assert [str(n.meta.get("val")) for n in found.graph.nodes] == [str(n.meta.get("val")) for n in plain.graph.nodes]
    for n in (31, 44, 63):
        y = torch.rand(3, n, 4)
        torch.testing.assert_close(found.module()(y), model(y))


@pytest.mark.long
def test_a_condition_of_many_terms_is_shown_in_short() -> None:
    class Deep(Windows):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out if x.shape[0] * out.shape[1] > 40 else out * 2

    torch.manual_seed(0)
    x = torch.rand(2, 31, 4)
    program = adaptc.compile(Deep().eval(), LoraConfig(r=2, target_modules=["lin"]), example_inputs=x)
    with pytest.raises(adaptc.AdaptcError, match=r"captured where .* \.\.\. .*, which these inputs break") as raised:
        program(torch.rand(2, 7, 4))
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("fails", [False, True])
def test_fake_tensors_are_not_kept_while_a_model_is_exported_and_are_after(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch keeps of them costs more than it saves, where sizes are free."""
    from torch._dynamo import config

    kept: list[bool] = []
    original = torch.export.export

    def export(*args: Any, **kwargs: Any) -> Any:
        kept.append(config.fake_tensor_cache_enabled)
        if fails:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", export)
    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():
        dynamic_shapes.export(torch.nn.Linear(3, 5), (torch.randn(2, 3),), {}, None)
    assert kept == [False]
    assert config.fake_tensor_cache_enabled
