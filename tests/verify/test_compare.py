"""Differences of outputs and checksums of states."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch.utils import _pytree as pytree

from adaptc.verification.compare import compare, difference, digests, output_leaves


def test_differences() -> None:
    a = torch.tensor([1.0, nan, inf, -3.0])
    assert difference(a, a.clone()) == (0.0, 3.0)
    assert difference(a, torch.tensor([1.5, nan, inf, -3.0])) == (0.5, 3.0)
    assert difference(a, torch.tensor([1.0, 0.0, inf, -3.0]))[0] == inf
    assert difference(a, torch.tensor([1.0, nan, -inf, -3.0]))[0] == inf
    assert difference(a, a[:3])[0] == inf
    assert difference(torch.tensor([3]), torch.tensor([5])) == (2.0, 3.0)
    assert difference(torch.tensor([3]), torch.tensor([3.0]))[0] == inf
    assert difference(torch.empty(0), torch.empty(0)) == (0.0, 0.0)
    assert difference(torch.tensor([3 + 4j]), torch.tensor([3 + 1j])) == (3.0, 5.0)
    assert difference(2, 2)[0] == 0
    assert difference(2, 3)[0] == inf


def test_the_worst_output_is_reported() -> None:
    runs = [output_leaves((torch.tensor([1.0]), {"k": torch.tensor([100.0])})) for _ in range(2)]
    found = [
        output_leaves((torch.tensor([1.0]), {"k": torch.tensor([100.0])})),
        output_leaves((torch.tensor([1.1]), {"k": torch.tensor([101.0])})),
    ]
    check = compare("x", runs, found, 0.5)
    assert check.passed
    assert check.where == "output[0], run 2"  # by the share of what is allowed, not by size
    assert check.error == pytest.approx(0.1)
    assert not compare("x", runs, found, 0.05).passed
    assert compare("x", runs, runs, 0.0).passed
    assert compare("x", [{}], [{}], 1.0).passed is False


def test_digests_see_one_bit_and_one_storage() -> None:
    t = torch.randn(5, 3, dtype=torch.bfloat16)
    state = {"a": t, "tied": t, "b": t.clone(), "n": 3}
    out = digests(state)
    assert out["a"] == out["tied"] == out["b"]
    assert "n" not in out
    t.view(torch.int16)[4, 2] ^= 1
    assert digests(state)["a"] != out["b"]


def test_outputs_whose_parts_have_no_names_are_numbered() -> None:
    """As those of diffusers, which are registered with torch without names for their parts."""

    class Pair:
        def __init__(self, *parts: torch.Tensor) -> None:
            self.parts = parts

    pytree.register_pytree_node(Pair, lambda p: (list(p.parts), None), lambda parts, _: Pair(*parts))
    found = output_leaves({"a": Pair(torch.ones(3), torch.zeros(2))})
    assert [(k, v.shape[0]) for k, v in found.items()] == [("output[0]", 3), ("output[1]", 2)]
