"""Draw the nodes of an adapted layer: on the left as the model has it, on the right after the rewrite."""

from __future__ import annotations

from collections.abc import Sequence

from adaptc.pictures.canvas import Canvas, line_height, text_width
from adaptc.pictures.layered_layout import Layout, lay_out
from adaptc.pictures.themes import Theme
from adaptc.reports.layer_graph import LayerGraph, LayerNode

_TITLE, _PANEL, _LABEL, _SIZES = 11.0, 9.5, 9.0, 7.5
#: inches around the picture, between boxes and between panels
_MARGIN, _BOX_GAP, _PANEL_GAP = 0.25, 0.22, 0.6
_BOX_HEIGHT, _LAYER_HEIGHT = 0.42, 0.74
#: what the colours mean
_ROLES = {
    "base": "the model's own",
    "tensor": "tensors of the adapter",
    "adapter": "nodes of the adapter",
    "sum": "stands for the model's value",
}


def draw_layer(layer: LayerGraph, theme: Theme) -> Canvas:
    """Return the page with both panels, and what the colours mean below."""
    panels = [("before", layer.before), ("after", layer.after)]
    layouts = [_lay_out(nodes) for _, nodes in panels]
    title = f"{layer.site}: {layer.heading}"
    legend = sum(text_width(t, _SIZES) + 0.4 for t in _ROLES.values())
    widths = [max(place.width, text_width(name, _PANEL)) for (name, _), place in zip(panels, layouts, strict=True)]
    width = max(sum(widths) + _PANEL_GAP, text_width(title, _TITLE), legend) + 2 * _MARGIN
    top = _MARGIN + line_height(_TITLE) + 0.12 + line_height(_PANEL) + 0.12
    depth = max(place.depth for place in layouts)
    height = top + (depth - 1) * _LAYER_HEIGHT + _BOX_HEIGHT + 0.25 + line_height(_SIZES) + _MARGIN
    page = Canvas(width, height, theme)
    page.text(_MARGIN, _MARGIN + line_height(_TITLE) / 2, title, _TITLE, align="left")
    x = _MARGIN + max((width - 2 * _MARGIN - sum(widths) - _PANEL_GAP) / 2, 0)
    for (name, nodes), place, panel_width in zip(panels, layouts, widths, strict=True):
        page.text(x + panel_width / 2, top - 0.12 - line_height(_PANEL) / 2, name, _PANEL, theme.faint)
        _draw_panel(page, nodes, place, x + (panel_width - place.width) / 2, top)
        x += panel_width + _PANEL_GAP
    _draw_legend(page, height - _MARGIN - line_height(_SIZES) / 2)
    return page


def _box_width(node: LayerNode) -> float:
    return max(text_width(node.label, _LABEL), text_width(node.sizes, _SIZES)) + 0.2


def _lay_out(nodes: Sequence[LayerNode]) -> Layout:
    return lay_out({n.name: n.inputs for n in nodes}, {n.name: _box_width(n) for n in nodes}, _BOX_GAP)


def _draw_panel(page: Canvas, nodes: Sequence[LayerNode], place: Layout, left: float, top: float) -> None:
    for points in place.lines.values():
        tops = [(left + x, top + layer * _LAYER_HEIGHT) for layer, x in points]
        # A line leaves below its box, passes the middles of other layers, and ends above the next box.
        path = [(tops[0][0], tops[0][1] + _BOX_HEIGHT)]
        for x, y in tops[1:-1]:
            path += [(x, y), (x, y + _BOX_HEIGHT)]
        page.curve([*path, tops[-1]], page.theme.faint)
    for node in nodes:
        fill, width = page.theme.fills[node.role], _box_width(node)
        x, y = left + place.middles[node.name], top + place.layers[node.name] * _LAYER_HEIGHT
        page.box(x - width / 2, y, width, _BOX_HEIGHT, fill, page.theme.faint, radius=0.06)
        colour = page.theme.text_on(fill)
        if node.sizes:
            page.text(x, y + 0.14, node.label, _LABEL, colour)
            page.text(x, y + 0.3, node.sizes, _SIZES, colour)
        else:
            page.text(x, y + _BOX_HEIGHT / 2, node.label, _LABEL, colour)


def _draw_legend(page: Canvas, y: float) -> None:
    x = _MARGIN
    for role, text in _ROLES.items():
        page.box(x, y - 0.06, 0.12, 0.12, page.theme.fills[role], page.theme.faint)
        page.text(x + 0.18, y, text, _SIZES, page.theme.faint, align="left")
        x += text_width(text, _SIZES) + 0.4
