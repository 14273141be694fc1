"""Short forms of many paths stand for exactly these paths, and tables lose nothing."""

from __future__ import annotations

import re
from itertools import product
from math import inf, nan

from hypothesis import given
from hypothesis import strategies as st

from adaptc.tables import Column, Table, collapse_paths, format_bytes, paragraph, render_table, to_json_value


def expand(text: str) -> list[str]:
    """The paths a short form stands for."""
    parts: list[list[str]] = []
    for piece in re.findall(r"\{[^}]*\}|[^.{}]+", text):
        if piece[0] != "{":
            parts.append([piece])
            continue
        numbers: list[str] = []
        for run in piece[1:-1].split(","):
            first, _, last = run.partition("..")
            numbers += map(str, range(int(first), int(last or first) + 1))
        parts.append(numbers)
    return [".".join(p) for p in product(*parts)]


@given(
    st.sets(st.lists(st.sampled_from(["a", "b", "0", "1", "2", "3", "10", "07"]), min_size=1, max_size=4).map(".".join))
)
def test_collapsed_paths_are_exactly_the_paths(paths: set[str]) -> None:
    forms = collapse_paths(paths)
    stood_for = [p for text, _ in forms for p in expand(text)]
    assert sorted(stood_for) == sorted(paths)
    assert all(len(expand(text)) == n for text, n in forms)


def test_collapse_finds_the_product() -> None:
    paths = [f"h.{i}.experts.{j}.w1" for i in range(4) for j in range(8)]
    assert collapse_paths(paths) == [("h.{0..3}.experts.{0..7}.w1", 32)]


def test_tables_cut_long_cells_into_lines() -> None:
    text = render_table(["name", Column("n", right=True)], [("x" * 300, 3), ("[red]", 1234)], width=100)
    assert text.count("x") == 300
    assert "[red]" in text  # not taken for markup
    assert max(map(len, text.splitlines())) <= 100
    assert render_table(["a"], []) == ""


def test_sizes() -> None:
    assert [format_bytes(n) for n in (7, 2048, 5 * 2**20, 3 * 2**30)] == ["7 B", "2.0 KiB", "5.0 MiB", "3.0 GiB"]


def test_tables_as_html_lose_nothing_and_escape_everything() -> None:
    html = Table(["name", Column("n", right=True)], [("a<b\nc", 3), ("[red]", 1234)]).html()
    assert "a&lt;b<br>c" in html
    assert '<td style="text-align: right">1234</td>' in html
    assert html.count("<tr>") == 3
    assert Table(["a"], []).html() == Table(["a"], []).text() == paragraph("") == ""


def test_numbers_that_are_none_are_none() -> None:
    found = to_json_value({"a": nan, 2: (1.5, inf), "c": complex(1)})
    assert found == {"a": None, "2": [1.5, None], "c": "(1+0j)"}
