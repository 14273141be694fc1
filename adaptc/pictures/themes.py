"""Colours of pictures, on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

#: a colour as (red, green, blue), from 0 to 1
Colour = tuple[float, float, float]


def _colour(text: str) -> Colour:
    red, green, blue = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


@dataclass(frozen=True)
class Theme:
    """The colours of a page.

    ``page``, ``text``, ``faint`` (small text, lines) and ``empty`` (a cell without a value). ``fills``: role of a node
    -> its fill. ``scale``: colours from zero to the largest value. ``negative``: the same down to the least value.
    ``series``: the colours of curves, in the order of their names.
    """

    page: Colour
    text: Colour
    faint: Colour
    empty: Colour
    fills: Mapping[str, Colour]
    scale: Sequence[Colour]
    negative: Sequence[Colour]
    series: Sequence[Colour]

    def colour_of(self, share: float) -> Colour:
        """Return the colour of a value, where ``share`` is its part of the largest magnitude, from -1 to 1."""
        colours = self.scale if share >= 0 else self.negative
        place = min(abs(share), 1.0) * (len(colours) - 1)
        low = min(int(place), len(colours) - 2)
        part = place - low
        a, b = colours[low], colours[low + 1]
        return (a[0] + (b[0] - a[0]) * part, a[1] + (b[1] - a[1]) * part, a[2] + (b[2] - a[2]) * part)

    def text_on(self, fill: Colour) -> Colour:
        """Return black or white, which can be read on ``fill``."""
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in fill)
        # Both contrasts are equal at this luminance (WCAG 2).
        return _colour("#000000") if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else _colour("#ffffff")


def _colours(*texts: str) -> tuple[Colour, ...]:
    return tuple(map(_colour, texts))


LIGHT = Theme(
    page=_colour("#ffffff"),
    text=_colour("#1f2328"),
    faint=_colour("#656d76"),
    empty=_colour("#f0f1f3"),
    fills=MappingProxyType(
        {
            "input": _colour("#ffffff"),
            "base": _colour("#dfe3e8"),
            "tensor": _colour("#ffe2b8"),
            "adapter": _colour("#cfe5fb"),
            "sum": _colour("#7fb8ee"),
        }
    ),
    scale=_colours("#f3f8fd", "#a9cfee", "#4a90c9", "#0b4a86"),
    negative=_colours("#f3f8fd", "#f5c6a5", "#dd7a42", "#8f3808"),
    series=_colours("#1f6fb4", "#c4570c", "#2b8a3e", "#9c36b5", "#946c00", "#0b7285", "#c2255c", "#5f3dc4"),
)
DARK = Theme(
    page=_colour("#0d1117"),
    text=_colour("#e6edf3"),
    faint=_colour("#9198a1"),
    empty=_colour("#2b2d31"),
    fills=MappingProxyType(
        {
            "input": _colour("#0d1117"),
            "base": _colour("#30363d"),
            "tensor": _colour("#6b4a12"),
            "adapter": _colour("#153f66"),
            "sum": _colour("#2a74b8"),
        }
    ),
    scale=_colours("#14202e", "#1d4f80", "#3f8fd0", "#b9dcf8"),
    negative=_colours("#14202e", "#7a3d16", "#cf7033", "#fad0b0"),
    series=_colours("#6cb2f0", "#ff9d5c", "#69db7c", "#da77f2", "#ffd43b", "#3bc9db", "#faa2c1", "#b197fc"),
)
#: theme by the name that users give
THEMES: Mapping[str, Theme] = MappingProxyType({"light": LIGHT, "dark": DARK})
