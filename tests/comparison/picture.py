"""The picture of results: accuracy against trained parameters, a panel for each task, as SVG.

It is written by hand, so that it is the same text for the same results whatever is installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tests.comparison.tables import of_task

Result = Mapping[str, Any]

_PANELS = {"text": "text: reversed pairs of words, SmolLM2-135M", "vision": "vision: digits 5 to 9, a small ViT"}
#: the sizes of a panel and of the space around its axes, in pixels
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 620, 460, 52, 74, 36, 44
_FONT, _LETTER = 10, 5.6
#: where a name may stand beside its point, the first that is free: anchor, x and y
_PLACES = (
    *(("start", 6, 3), ("end", -6, 3), ("start", 5, -7), ("start", 5, 13), ("end", -5, -7), ("end", -5, 13)),
    *(("middle", 0, -10), ("middle", 0, 17), ("start", 10, -16), ("start", 10, 22), ("end", -10, -16)),
)
Box = tuple[float, float, float, float]


def svg(results: Sequence[Result]) -> str:
    """Return the picture of all results that ended well."""
    width = _WIDTH * len(_PANELS)
    font = f'font-family="sans-serif" font-size="{_FONT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" {font}>',
        "<title>Accuracy against trained parameters</title>",
        f'<rect width="{width}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for number, (task, title) in enumerate(_PANELS.items()):
        parts.append(f'<g transform="translate({number * _WIDTH} 0)">')
        parts += _panel(of_task(results, task)[0], title)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(done: Sequence[Result], title: str) -> list[str]:
    parts = [f'<text x="{_LEFT}" y="20" font-size="13" fill="#222222">{escape(title)}</text>']
    if not done:
        return [*parts, f'<text x="{_LEFT}" y="60" fill="#666666">no results yet</text>']
    counts = [r["parameters"] for r in done]
    low, high = math.floor(math.log10(min(counts))), math.ceil(math.log10(max(counts) + 1))
    least = min(0.9, math.floor(min(r["accuracy"] for r in done) * 10) / 10)

    def x_of(parameters: float) -> float:
        return _LEFT + (math.log10(parameters) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(accuracy: float) -> float:
        return _HEIGHT - _BOTTOM - (accuracy - least) / (1 - least) * (_HEIGHT - _TOP - _BOTTOM)

    parts += _axes(low, high, least, x_of, y_of)
    if (base_accuracy := done[0]["base_accuracy"]) >= least:
        base = y_of(base_accuracy)
        parts.append(
            f'<path d="M{_LEFT} {base:.1f}H{_WIDTH - _RIGHT}" stroke="#999999" stroke-dasharray="4 3"/>'
            f'<text x="{_WIDTH - _RIGHT + 4}" y="{base + 3:.1f}" fill="#666666">no adapter</text>'
        )
    points = [(x_of(r["parameters"]), y_of(r["accuracy"]), r["method"]) for r in done]
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y, _ in points]
    for x, y, method in points:
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#1f6f8b"/>')
        parts.append(_name(x, y, method, taken))
    return parts


def _axes(low: int, high: int, least: float, x_of: Any, y_of: Any) -> list[str]:
    parts = []
    bottom = _HEIGHT - _BOTTOM
    for power in range(low, high + 1):
        x = x_of(10**power)
        parts.append(
            f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="#e6e6e6"/>'
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#444444">{10**power:,}</text>'
        )
    for tenth in range(round(least * 10), 11):
        y = y_of(tenth / 10)
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#e6e6e6"/>'
            f'<text x="{_LEFT - 6}" y="{y + 3:.1f}" text-anchor="end" fill="#444444">{tenth * 10} %</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_HEIGHT - 10}" text-anchor="middle" fill="#444444">trained parameters</text>'
    )
    return parts


def _name(x: float, y: float, method: str, taken: list[Box]) -> str:
    """Return a name beside its point, in the first place that is free, and take the place."""
    boxes = [(_box(x + dx, y + dy, anchor, method), anchor, dx, dy) for anchor, dx, dy in _PLACES]
    # Where none is free, the place that covers the least.
    box, anchor, dx, dy = min(boxes, key=lambda place: sum(_overlap(place[0], other) for other in taken))
    taken.append(box)
    return f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}" fill="#222222">{escape(method)}</text>'


def _box(x: float, y: float, anchor: str, text: str) -> Box:
    width = len(text) * _LETTER
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return left, y - _FONT + 2, left + width, y + 2


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)
