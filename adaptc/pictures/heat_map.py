"""Draw a grid of values as a heat map with the values in its cells."""

from __future__ import annotations

from adaptc.pictures.canvas import Canvas, line_height, text_width
from adaptc.pictures.site_grid import Grid
from adaptc.pictures.themes import Theme

_TITLE, _LABEL, _VALUE = 10.5, 8.0, 7.0
#: inches around the picture, between its parts, and of the scale below
_MARGIN, _GAP, _SCALE_WIDTH, _SCALE_HEIGHT = 0.25, 0.1, 2.2, 0.12
#: the most columns whose cells have their value as text
_MAX_WRITTEN_COLUMNS = 40
_SCALE_STEPS = 24


def draw_heat_map(grid: Grid, theme: Theme) -> Canvas:
    """Return the page with the heat map of a grid, the name of each row and column, and the scale."""
    written = len(grid.columns) <= _MAX_WRITTEN_COLUMNS
    texts = {place: "?" if v is None else grid.format(v) for place, v in grid.values.items()}
    widest = max((text_width(t, _VALUE) for t in texts.values()), default=0.0)
    cell_height = line_height(_LABEL) * (1.45 if len(grid.rows) <= 50 else 1.15)
    cell_width = max(widest + 0.12, 0.45) if written else 0.16
    names = [text_width(c, _LABEL) for c in grid.columns]
    turned = max(names, default=0.0) + 0.1 > cell_width * 1.8
    if not turned:
        cell_width = max(cell_width, max(names, default=0.0) + 0.1)
    # Turned names need a column as wide as a line is high.
    cell_width = max(cell_width, line_height(_LABEL) + 0.02)
    head = max(names, default=0.0) if turned else line_height(_LABEL)
    left = _MARGIN + max((text_width(r, _LABEL) for r in grid.rows), default=0.0) + _GAP
    top = _MARGIN + line_height(_TITLE) + _GAP + head + _GAP
    table_width, table_height = cell_width * len(grid.columns), cell_height * len(grid.rows)
    scale_width = _SCALE_WIDTH + 0.8
    width = max(left + table_width, left + scale_width, _MARGIN + text_width(grid.title, _TITLE)) + _MARGIN
    scale_top = top + table_height + 2 * _GAP
    height = scale_top + _SCALE_HEIGHT + _GAP + line_height(_LABEL) + _MARGIN
    page = Canvas(width, height, theme)
    page.text(_MARGIN, _MARGIN + line_height(_TITLE) / 2, grid.title, _TITLE, align="left")
    for i, name in enumerate(grid.columns):
        x = left + (i + 0.5) * cell_width
        if turned:
            page.text(x, top - _GAP, name, _LABEL, rotation=90, va="bottom")
        else:
            page.text(x, top - _GAP - line_height(_LABEL) / 2, name, _LABEL)
    for j, row in enumerate(grid.rows):
        y = top + j * cell_height
        page.text(left - _GAP, y + cell_height / 2, row, _LABEL, align="right")
        for i, column in enumerate(grid.columns):
            x, value = left + i * cell_width, grid.values.get((row, column))
            fill = theme.empty if value is None else theme.colour_of(_share(grid, value))
            page.box(x, y, cell_width, cell_height, fill, edge=theme.page)
            if written and (row, column) in texts:
                colour = theme.faint if value is None else theme.text_on(fill)
                page.text(x + cell_width / 2, y + cell_height / 2, texts[row, column], _VALUE, colour)
    _draw_scale(page, grid, left, scale_top)
    return page


def _share(grid: Grid, value: float) -> float:
    return value / grid.top if value >= 0 or not grid.lowest else -value / grid.lowest


def _draw_scale(page: Canvas, grid: Grid, x: float, y: float) -> None:
    step, ends = _SCALE_WIDTH / _SCALE_STEPS, (grid.lowest, grid.top)
    for i in range(_SCALE_STEPS):
        value = ends[0] + (ends[1] - ends[0]) * (i + 0.5) / _SCALE_STEPS
        # A little wider than its step, so that no seam shows.
        page.box(x + i * step, y, step * 1.05, _SCALE_HEIGHT, page.theme.colour_of(_share(grid, value)))
    below = y + _SCALE_HEIGHT + _GAP / 2 + line_height(_LABEL) / 2
    page.text(x, below, grid.format(ends[0]), _LABEL, page.theme.faint, align="left")
    page.text(x + _SCALE_WIDTH, below, grid.format(ends[1]), _LABEL, page.theme.faint, align="right")
    if any(p not in grid.values for p in ((r, c) for r in grid.rows for c in grid.columns)):
        page.box(x + _SCALE_WIDTH + 2 * _GAP, y, _SCALE_HEIGHT, _SCALE_HEIGHT, page.theme.empty, page.theme.faint)
        place = x + _SCALE_WIDTH + 3 * _GAP + _SCALE_HEIGHT
        page.text(place, y + _SCALE_HEIGHT / 2, "no adapter", _LABEL, page.theme.faint, align="left")
