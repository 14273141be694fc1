"""Draw curves by name in panels one below the other, such as the losses of several configs by step.

All panels have the same steps, and a name has the same colour in each. A curve of very many points is drawn by the
means of stretches of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from adaptc.pictures.canvas import Canvas, line_height, text_width
from adaptc.pictures.themes import Theme

_TITLE, _LABEL = 10.5, 8.0
#: inches around the picture and between its parts, the size of a panel, and the length of a line of the legend
_MARGIN, _GAP, _PANEL_WIDTH, _PANEL_HEIGHT, _SAMPLE = 0.25, 0.1, 4.6, 1.9, 0.28
#: the most points of a curve, and the most letters of a name
_MAX_POINTS, _MAX_LETTERS = 240, 28


@dataclass(frozen=True)
class Panel:
    """A part of the picture: a title, and name -> the points (x, y) of its curve, x rising."""

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]

    def range_of(self, axis: int) -> tuple[float, float]:
        """Return the least and the largest value of x (``axis`` 0) or y (1), which differ."""
        values = [p[axis] for curve in self.curves.values() for p in curve]
        low, high = min(values), max(values)
        return (low, high) if low < high else (low - 0.5, high + 0.5)


def draw_curves(title: str, panels: Sequence[Panel], marked: str | None, theme: Theme) -> Canvas:
    """Return the page with the curves of all panels, and a legend in which the name ``marked`` is said to be the best.

    Each panel has a point at least.
    """
    names = list(dict.fromkeys(n for p in panels for n in p.curves))
    entries = {n: _shortened(n) + (" (best)" if n == marked else "") for n in names}
    ticks = [_ticks(*p.range_of(1)) for p in panels]
    widest = max(text_width(t, _LABEL) for found in ticks for t in found.values())
    left = _MARGIN + widest + _GAP
    legend = left + _PANEL_WIDTH + 2 * _GAP
    width = legend + _SAMPLE + _GAP + max(text_width(t, _LABEL) for t in entries.values()) + _MARGIN
    width = max(width, 2 * _MARGIN + text_width(title, _TITLE))
    first = _MARGIN + line_height(_TITLE) + 2 * _GAP
    each = line_height(_LABEL) + _GAP / 2 + _PANEL_HEIGHT + 2 * _GAP
    bottom = first + each * len(panels) + 2 * line_height(_LABEL)
    height = max(bottom, first + 1.5 * line_height(_LABEL) * (len(names) + 1)) + _MARGIN
    page = Canvas(width, height, theme)
    page.text(_MARGIN, _MARGIN + line_height(_TITLE) / 2, title, _TITLE, align="left")
    ends = [p.range_of(0) for p in panels]
    steps = min(low for low, _ in ends), max(high for _, high in ends)
    for i, panel in enumerate(panels):
        top = first + each * i + line_height(_LABEL) + _GAP / 2
        page.text(left, top - _GAP / 2 - line_height(_LABEL) / 2, panel.title, _LABEL, align="left")
        _draw_panel(page, panel, ticks[i], steps, names, left, top)
    below = first + each * len(panels) - _GAP
    for x, text in _ticks(*steps, whole=True).items():
        at = left + (x - steps[0]) / (steps[1] - steps[0]) * _PANEL_WIDTH
        page.text(at, below + line_height(_LABEL) / 2, text, _LABEL, theme.faint)
    page.text(left + _PANEL_WIDTH / 2, below + 1.5 * line_height(_LABEL), "step", _LABEL, theme.faint)
    for i, name in enumerate(names):
        y = first + 1.5 * line_height(_LABEL) * (i + 1)
        page.line([(legend, y), (legend + _SAMPLE, y)], *_style(i, theme))
        page.text(legend + _SAMPLE + _GAP, y, entries[name], _LABEL, align="left")
    return page


def _draw_panel(
    page: Canvas,
    panel: Panel,
    ticks: Mapping[float, str],
    steps: tuple[float, float],
    names: Sequence[str],
    left: float,
    top: float,
) -> None:
    low, high = panel.range_of(1)
    low, high = min(low, *ticks), max(high, *ticks)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - steps[0]) / (steps[1] - steps[0]) * _PANEL_WIDTH,
            top + (high - y) / (high - low) * _PANEL_HEIGHT,
        )

    for value, text in ticks.items():
        _, y = place(steps[0], value)
        page.line([(left, y), (left + _PANEL_WIDTH, y)], page.theme.empty, width=0.7)
        page.text(left - _GAP, y, text, _LABEL, page.theme.faint, align="right")
    for name, curve in panel.curves.items():
        points = [place(x, y) for x, y in _thinned(curve)]
        colour, dashed = _style(names.index(name), page.theme)
        if len(points) == 1:
            page.box(points[0][0] - 0.02, points[0][1] - 0.02, 0.04, 0.04, colour)
        elif points:
            page.line(points, colour, dashed)


def _style(index: int, theme: Theme) -> tuple[tuple[float, float, float], bool]:
    """Return the colour of a curve, and whether it is dashed, since there are more curves than colours."""
    count = len(theme.series)
    return theme.series[index % count], bool(index // count % 2)


def _ticks(low: float, high: float, whole: bool = False) -> dict[float, str]:
    """Return round values in a range, each with its text."""
    from matplotlib.ticker import MaxNLocator

    found = [float(v) for v in MaxNLocator(nbins=5, integer=whole).tick_values(low, high)]
    inside = [v for v in found if low <= v <= high] if whole else found
    return {v: f"{v:.6g}" for v in inside or [low, high]}


def _thinned(curve: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    size = -(-len(curve) // _MAX_POINTS)
    parts = [curve[i : i + size] for i in range(0, len(curve), max(size, 1))]
    return curve if size < 2 else [(part[-1][0], fmean(y for _, y in part)) for part in parts]


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_LETTERS else f"{name[: _MAX_LETTERS - 3]}..."
