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
#: the sizes of a panel and of the space around its axes, in pixels; names stand in a column on the right
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 620, 500, 52, 120, 36, 44
_FONT, _LINE = 9, 10.5
#: pixels from the axes to the names
_TO_NAMES = 22


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
    low, high = math.log10(min(counts) / 1.25), math.log10(max(counts) * 1.25)
    shares = [r["accuracy"] for r in done]
    least = max(0.0, math.floor(min(shares) * 20 - 0.2) / 20)
    most = min(1.0, math.ceil(max(shares) * 20 + 0.2) / 20)

    def x_of(parameters: float) -> float:
        return _LEFT + (math.log10(parameters) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(accuracy: float) -> float:
        return _HEIGHT - _BOTTOM - (accuracy - least) / (most - least) * (_HEIGHT - _TOP - _BOTTOM)

    parts += _axes((low, high), (least, most), x_of, y_of)
    if (base_accuracy := done[0]["base_accuracy"]) >= least:
        base = y_of(base_accuracy)
        parts.append(
            f'<path d="M{_LEFT} {base:.1f}H{_WIDTH - _RIGHT}" stroke="#999999" stroke-dasharray="4 3"/>'
            f'<text x="{_LEFT + 4}" y="{base - 4:.1f}" fill="#666666">no adapter</text>'
        )
    points = [(y_of(r["accuracy"]), x_of(r["parameters"]), r["method"]) for r in done]
    column = _WIDTH - _RIGHT + _TO_NAMES
    for (y, x, method), name_y in zip(points, spread([y for y, _, _ in points]), strict=True):
        parts.append(f'<path d="M{x:.1f} {y:.1f}L{column - 3} {name_y:.1f}" stroke="#c4c4c4" stroke-width="0.6"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#1f6f8b"/>')
        parts.append(f'<text x="{column}" y="{name_y + 3:.1f}" fill="#222222">{escape(method)}</text>')
    return parts


def spread(wanted: Sequence[float]) -> list[float]:
    """Return places for names, in order, that are a line apart and near ``wanted``, which rises.

    Names that run out of the picture below are moved up.
    """
    places: list[float] = []
    for y in wanted:
        places.append(max(y, places[-1] + _LINE) if places else y)
    lowest = _HEIGHT - _LINE
    for i in reversed(range(len(places))):
        places[i] = min(places[i], lowest)
        lowest = places[i] - _LINE
    return places


def _axes(powers: tuple[float, float], shares: tuple[float, float], x_of: Any, y_of: Any) -> list[str]:
    """Return the lines and numbers of both axes: parameters at 1, 2 and 5 times powers of ten, accuracy at 5 %."""
    parts = []
    bottom = _HEIGHT - _BOTTOM
    numbers = (digit * 10**power for power in range(math.floor(powers[0]), math.ceil(powers[1])) for digit in (1, 2, 5))
    for number in numbers:
        if powers[0] <= math.log10(number) <= powers[1]:
            x = x_of(number)
            parts.append(
                f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="#e6e6e6"/>'
                f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#444444">{number:,}</text>'
            )
    for twentieth in range(round(shares[0] * 20), round(shares[1] * 20) + 1):
        y = y_of(twentieth / 20)
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#e6e6e6"/>'
            f'<text x="{_LEFT - 6}" y="{y + 3:.1f}" text-anchor="end" fill="#444444">{twentieth * 5} %</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_HEIGHT - 10}" text-anchor="middle" fill="#444444">trained parameters</text>'
    )
    return parts
