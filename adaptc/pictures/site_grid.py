"""Arrange values of sites as a grid: a row for each block of the model, a column for each layer in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from adaptc.tables import path_pattern

#: the row of sites that are in no block
OUTSIDE = "-"


@dataclass(frozen=True)
class Grid:
    """A grid of values by (row, column). A place that is missing has no adapter; None is a value that is not known.

    ``lowest``: the value of the scale's lower end, 0 or -1.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[str, str], float | None]
    format: Callable[[float], str]
    lowest: float = 0.0
    #: the value of the scale's upper end; None for the largest of the values
    highest: float | None = None

    @property
    def top(self) -> float:
        """Return the value of the scale's upper end."""
        found = [v for v in self.values.values() if v is not None]
        return self.highest if self.highest is not None else max(found, default=0.0) or 1.0


def site_grid(title: str, sites: Iterable[tuple[str, float | None]], text: Callable[[float], str]) -> Grid:
    """Return the grid of the values of sites, by their names.

    The first number in a name tells the block. Columns are named by the ends of names, as short as tells them apart.
    """
    places: dict[tuple[str, tuple[str, ...]], float | None] = {}
    for name, value in sites:
        parts = name.removesuffix(".weight").split(".")
        number = next((i for i, p in enumerate(path_pattern(".".join(parts))) if p is None), None)
        row = OUTSIDE if number is None else parts[number]
        places[row, tuple(p for i, p in enumerate(parts) if i != number)] = value
    labels = _short_names(dict.fromkeys(path for _, path in places))
    rows = sorted({row for row, _ in places}, key=lambda r: (r == OUTSIDE, int(r) if r != OUTSIDE else 0))
    values = {(row, labels[path]): value for (row, path), value in places.items()}
    return Grid(title, rows, list(labels.values()), values, text)


def _short_names(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Return each path's last components, as few as tell it from the others."""
    found: dict[tuple[str, ...], str] = {}
    paths = list(paths)
    for path in paths:
        count = 1
        while count < len(path) and any(p[-count:] == path[-count:] for p in paths if p != path):
            count += 1
        found[path] = ".".join(path[-count:])
    return found
