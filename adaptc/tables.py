"""Write tables for reports as text, HTML and plain data, and many module paths in a short form.

Everything here makes strings; nothing looks at a program. Text is plain ASCII but for what the user's own names hold,
so that it can be printed anywhere. In HTML those names are escaped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from math import isfinite, isnan, prod
from typing import Any, ClassVar

from adaptc.errors import AdaptcError
from adaptc.public_names import warn_renamed

WIDTH = 120
#: the narrowest table in characters; below it, columns would have to be dropped
MIN_WIDTH = 100


@dataclass(frozen=True)
class Column:
    """A heading. ``right`` aligns numbers, ``no_wrap`` never wraps."""

    name: str
    right: bool = False
    no_wrap: bool = False


@dataclass(frozen=True)
class Table:
    """A table of headings, and rows of as many cells. As text and as HTML it is '' when there is no row."""

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Any]]

    def text(self, width: int = WIDTH) -> str:
        """Return the table as text without trailing blanks. Cells are cut into lines, never left out, so it is at least
        ``MIN_WIDTH`` characters wide."""
        return render_table(self.columns, self.rows, width=width)

    def html(self) -> str:
        if not self.rows:
            return ""
        columns = [c if isinstance(c, Column) else Column(c) for c in self.columns]
        head = "".join(_cell("th", c.name, c.right) for c in columns)
        rows = ("".join(_cell("td", cell, c.right) for cell, c in zip(row, columns, strict=True)) for row in self.rows)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(tag: str, value: Any, right: bool) -> str:
    lines = "<br>".join(escape(line) for line in str(value).split("\n"))
    return f'<{tag} style="text-align: {"right" if right else "left"}">{lines}</{tag}>'


def paragraph(text: str) -> str:
    """Return lines of text as an HTML paragraph; '' for no text."""
    return f"<p>{'<br>'.join(escape(line) for line in text.splitlines())}</p>" if text else ""


class Report(ABC):
    """A report of what was found or done. ``print`` gives tables, a notebook shows them, and ``repr`` is the first
    line. :meth:`to_dict` has the numbers as JSON does, and :meth:`to_pandas` has them as a table of pandas."""

    #: where :meth:`to_dict` has the entries that are rows of :meth:`to_pandas`: its keys, from the outermost inwards.
    #: Without keys the dict itself has the entries; None: it is the only row
    ROWS: ClassVar[tuple[str, ...] | None] = None
    #: the column of the names, where the entries have names
    ROW_NAME: ClassVar[str] = "name"

    @abstractmethod
    def sections(self) -> Iterable[str | Table]:
        """Return sections of text, and tables; empty ones are left out when they are shown."""

    @abstractmethod
    def values(self) -> dict[str, Any]:
        """Return the keys and values of :meth:`to_dict`, whose values may be any that :func:`to_json_value` takes."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it: dicts, lists, strings, numbers and None.

        The keys are those of examples/reports.md, and the command line prints the same with ``--json``.

        Returns:
            a new dict. A number that is not finite is None.

        Example:
            >>> adaptc.report(prog).to_dict()["peft_type"]
            'LORA'
        """
        return to_json_value(self.values())

    def to_pandas(self) -> Any:
        """Return the entries of the report as a table of pandas: one row for each site, weight, tensor or check.

        Columns are the keys of :meth:`to_dict`'s entries; dots join the keys of dicts in dicts, and lists stay lists.

        Returns:
            a ``pandas.DataFrame``. It has one row where the report has no entries by its kind.

        Raises:
            AdaptcError: pandas is not installed.

        Example:
            >>> adaptc.report(prog).to_pandas()["rank"].tolist()
            [2]
        """
        try:
            import pandas
        except ImportError:
            raise AdaptcError("tables of pandas need pandas: pip install 'adaptc[pandas]'") from None

        found: Any = self.to_dict()
        if self.ROWS is None:
            return pandas.json_normalize([found])
        for key in self.ROWS:
            found = found[key] if found else []
        named = found.items() if isinstance(found, Mapping) else ()
        return pandas.json_normalize([{self.ROW_NAME: name, **entry} for name, entry in named] or list(found or ()))

    def data(self) -> dict[str, Any]:
        """Return :meth:`to_dict`, under its old name."""
        warn_renamed("report.data()", "report.to_dict()")
        return self.to_dict()

    def render(self, width: int = WIDTH) -> str:
        """Return the report as text."""
        return as_text(self.sections(), width)

    def __str__(self) -> str:
        return self.render()

    def __repr__(self) -> str:
        first = next((p for p in self.sections() if isinstance(p, str) and p), "")
        return f"<{type(self).__name__}: {first.partition(chr(10))[0]}>"

    def _repr_html_(self) -> str:
        return "".join(paragraph(p) if isinstance(p, str) else p.html() for p in self.sections())


def as_text(sections: Iterable[str | Table], width: int = WIDTH) -> str:
    """Return sections and tables as one text; tables are ``width`` characters wide at most."""
    return join_sections(*(p if isinstance(p, str) else p.text(width) for p in sections))


def to_json_value(value: Any) -> Any:
    """Return a value as JSON has it: numbers that are not finite are None, and what JSON has no word for is its
    ``str``."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): to_json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json_value(v) for v in value]
    return str(value)


def render_table(columns: Sequence[Column | str], rows: Iterable[Sequence[Any]], *, width: int = WIDTH) -> str:
    """Return the text of a table with these columns and rows, as :meth:`Table.text` describes it."""
    cells = [[str(c) for c in row] for row in rows]
    if not cells:
        return ""
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    plain = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    rich_table = Table(box=plain, pad_edge=False, padding=(0, 1))
    for c in (c if isinstance(c, Column) else Column(c) for c in columns):
        side = "right" if c.right else "left"
        rich_table.add_column(c.name, justify=side, no_wrap=c.no_wrap, overflow="fold", min_width=len(c.name))
    for row in cells:
        rich_table.add_row(*(Text(c) for c in row))
    out = StringIO()
    Console(file=out, width=max(width, MIN_WIDTH), color_system=None, legacy_windows=False).print(rich_table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)


def join_sections(*sections: str) -> str:
    """Join sections with a blank line between them; empty ones are dropped."""
    return "\n\n".join(p for p in sections if p)


def path_pattern(path: str) -> tuple[str | None, ...]:
    """Return the components of a module path, with None for every number: equal for the same layer of every block."""
    return tuple(None if _is_number(part) else part for part in path.split("."))


def path_numbers(path: str) -> str:
    """Return the numbers in a module path, which tell a layer from the same one of another block: ``3``, ``0.5``."""
    return ".".join(part for part in path.split(".") if _is_number(part))


def _is_number(part: str) -> bool:
    return part.isdecimal() and str(int(part)) == part


def collapse_paths(paths: Iterable[str]) -> list[tuple[str, int]]:
    """Return (short form, how many paths it stands for), exactly covering ``paths``: ``layers.{0..29}.q_proj``, 30.

    A short form never stands for a path that is not there: numbers that vary together are split over several forms.
    """
    groups: dict[tuple[str | None, ...], set[tuple[int, ...]]] = {}
    for path in paths:
        numbers = tuple(int(part) for part in path.split(".") if _is_number(part))
        groups.setdefault(path_pattern(path), set()).add(numbers)
    out: list[tuple[str, int]] = []
    for path_form, indices in groups.items():
        for cover in _cartesian_covers(indices):
            values = iter(cover)
            text = ".".join(_format_number_set(next(values)) if part is None else part for part in path_form)
            out.append((text, prod(map(len, cover))))
    return out


def _cartesian_covers(indices: set[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Return Cartesian products of sets that together are exactly ``indices``."""
    if () in indices:
        return [()]
    tails_by_first: dict[int, set[tuple[int, ...]]] = {}
    for first, *rest in sorted(indices):
        tails_by_first.setdefault(first, set()).add(tuple(rest))
    firsts_by_tails: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first, rest in tails_by_first.items():
        firsts_by_tails.setdefault(frozenset(rest), []).append(first)
    return [(tuple(same), *tail) for rest, same in firsts_by_tails.items() for tail in _cartesian_covers(set(rest))]


def _format_number_set(values: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for v in sorted(values):
        if runs and v == runs[-1][1] + 1:
            runs[-1][1] = v
        else:
            runs.append([v, v])
    text = ",".join(f"{a}" if a == b else f"{a}..{b}" if b > a + 1 else f"{a},{b}" for a, b in runs)
    return text if len(values) == 1 else f"{{{text}}}"


def with_count(text: str, count: int) -> str:
    return text if count == 1 else f"{text} x{count}"


def shorten_paths(paths: Iterable[str], limit: int = 4, sep: str = ", ") -> str:
    """Return the first ``limit`` of the collapsed paths, and how many paths the others stand for."""
    forms = collapse_paths(paths)
    omitted = sum(n for _, n in forms[limit:])
    return sep.join([*(text for text, _ in forms[:limit]), *([f"and {omitted} more"] if omitted else [])])


def format_error(value: float) -> str:
    """Return an error or a difference as text: three digits, and a plain 0 when there is none."""
    return "0" if value == 0 else f"{value:.2e}"


def format_error_or_dash(value: float) -> str:
    """Return an error or a difference as :func:`format_error` writes it, and a dash for NaN."""
    return "-" if isnan(value) else format_error(value)


def format_bytes(nbytes: int) -> str:
    """Return an amount of memory as text, in units of 1024. Bytes are printed in no other way."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Sequence[Any], dtype: Any) -> str:
    """Return a shape as ``4x64``, with the dtype behind it when it is not float32."""
    name = dtype_name(dtype)
    return " ".join(p for p in ("x".join(map(str, shape)), "" if name == "float32" else name) if p)
