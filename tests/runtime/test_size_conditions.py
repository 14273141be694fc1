"""Conditions on sizes: read, never run as code, and silent about what they do not understand."""

from __future__ import annotations

import pytest

from adaptc.runtime.calls.size_conditions import parse_condition, parse_expression, solve_for_symbol, symbol_names

NAMES = ["x", "cache_k", "cache_v_0"]


@pytest.mark.parametrize(
    ("text", "shapes", "broken"),
    [
        ("L['x'].size()[0] != 1", [(1, 5)], True),
        ("L['x'].size()[0] != 1", [(2, 5)], False),
        ("(L['x'].size()[1] % 2) == 0 and L['x'].size()[0] < 3", [(2, 5)], True),
        ("not L['x'].size()[0] == 2", [(2, 5)], True),
        ("(1 + (((-1) + L['x'].size()[1]) // 2)) == 3", [(2, 5)], False),
        ("L['x'].size()[0]*L['cache']['k'].size()[0] <= max(6, 2)", [(2, 5), (4,)], True),
        ("L['cache']['v'][0].size()[0] == L['x'].size()[0]", [(2, 5), (4,), (3,)], True),
        ("L['flat_args'][1].size()[0] > 3", [(2, 5), (3,)], True),
        ("(L['x'].size()[0] % L['x'].size()[1]) == 0", [(2, 0)], False),
    ],
)
def test_what_breaks_them(text: str, shapes: list[tuple[int, ...]], broken: bool) -> None:
    found = parse_condition(text, NAMES)
    assert found is not None
    assert found.is_broken_by(shapes) is broken
    assert "L[" not in found.text


@pytest.mark.parametrize(
    "text",
    [
        "L['y'].size()[0] != 1",
        "L['x'].stride()[0] != 1",
        "L['x'].size()[0].__class__",
        "__import__('os').system('true') == L['x'].size()[0]",
        "[L['x'].size()[0] for _ in ()]",
        "L['x'].size()[0] != other",
        "L['x'].size()[0] !=",
        "-" * 60 + "L['x'].size()[0] == 1",
        "L['x'].size()[0] " + "+ 1" * 2_000 + " > 0",
        "L['x'].size()[0] ** 9 > 0",
        "1 != 2",
    ],
)
def test_what_is_left_to_the_graph(text: str) -> None:
    assert parse_condition(text, NAMES) is None


def test_sizes_made_of_others() -> None:
    made = parse_expression("2*half + 1")
    assert made is not None
    assert made({"half": 3}) == 7
    assert symbol_names("2*half + Mod(s0, 3)") == ["half", "s0"]
    assert solve_for_symbol("2*half + 1", {}, "half", 7) == 3
    assert solve_for_symbol("2*half + 1", {}, "half", 8) is None
    assert solve_for_symbol("(s0//2)", {}, "s0", 3) is None
    assert solve_for_symbol("s0*n", {"n": 3}, "s0", 6) == 2
