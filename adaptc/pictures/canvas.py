"""Draw shapes and text on a page that is measured in inches, and write the page as SVG or PNG.

matplotlib does both, with fonts of its own, and is installed by pip alone. graphviz would lay out graphs better, but it
needs a program beside Python, and it draws no heat maps. No global state of matplotlib is changed but two settings of
SVG files, for the moment of writing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any

from adaptc.errors import ConfigError
from adaptc.locks import reset_after_fork
from adaptc.pictures.themes import Colour, Theme

#: the font of text, which comes with matplotlib, and those that viewers of SVG files may have instead
_FONT, _OTHER_FONTS = "DejaVu Sans", "Verdana, Arial, sans-serif"
#: the widths of an average letter and of the height of a line, as parts of the font's size
_LETTER, _LINE = 0.64, 1.2
#: pixels of a PNG in an inch
_RESOLUTION = 144
#: text stays text in SVG files, and the same picture is the same file
_SVG_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "adaptc"}
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_settings_lock = reset_after_fork(threading.RLock())


def text_width(text: str, size: float) -> float:
    """Return about how many inches wide a line of text is, in points of ``size``; rather too many than too few."""
    return len(text) * _LETTER * size / 72


def line_height(size: float) -> float:
    """Return the height of a line of text in inches."""
    return _LINE * size / 72


def check_library() -> None:
    """Raise ConfigError where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("pictures are drawn with matplotlib: pip install 'adaptc[pictures]'") from None


class Canvas:
    """A page of ``width`` by ``height`` inches, whose origin is the top left corner.

    ``figure`` is matplotlib's figure.
    """

    def __init__(self, width: float, height: float, theme: Theme) -> None:
        from matplotlib.figure import Figure

        self.theme, self.height = theme, height
        self.figure: Any = Figure(figsize=(width, height), facecolor=theme.page)
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.axis("off")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 8,
        colour: Colour | None = None,
        align: str = "center",
        **options: Any,
    ) -> None:
        """Write a line of text, at ``x`` by ``align`` and with its middle at ``y``."""
        options = {"va": "center", "fontfamily": _FONT, "parse_math": False, **options}
        self.axes.text(x, y, text, fontsize=size, color=colour or self.theme.text, ha=align, **options)

    def box(
        self, x: float, y: float, width: float, height: float, fill: Colour, edge: Colour | None = None, **options: Any
    ) -> None:
        """Draw a rectangle with its top left corner at (x, y). ``radius`` rounds its corners."""
        from matplotlib.patches import FancyBboxPatch, Rectangle

        style = {"facecolor": fill, "edgecolor": edge or "none", "linewidth": 0.8 if edge else 0}
        radius = options.pop("radius", 0.0)
        shape: Any
        if radius:
            rounding = f"round,pad=0,rounding_size={radius}"
            shape = FancyBboxPatch((x, y), width, height, boxstyle=rounding, **style, **options)
        else:
            shape = Rectangle((x, y), width, height, **style, **options)
        self.axes.add_patch(shape)

    def curve(self, points: Sequence[tuple[float, float]], colour: Colour, arrow: bool = True) -> None:
        """Draw a curve down through points, vertical at each of them, with an arrow at the end."""
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path

        corners, codes = [points[0]], [Path.MOVETO]
        for (x, y), (new_x, new_y) in pairwise(points):
            middle = (y + new_y) / 2
            corners += [(x, middle), (new_x, middle), (new_x, new_y)]
            codes += [Path.CURVE4] * 3
        style = "-|>,head_length=3,head_width=1.8" if arrow else "-"
        patch = FancyArrowPatch(
            path=Path(corners, codes), arrowstyle=style, color=colour, linewidth=0.9, shrinkA=0, shrinkB=0, zorder=0.5
        )
        self.axes.add_patch(patch)

    def line(
        self, points: Sequence[tuple[float, float]], colour: Colour, dashed: bool = False, width: float = 1.3
    ) -> None:
        """Draw straight lines from point to point, ``width`` points wide."""
        self.axes.plot(
            *zip(*points, strict=True),
            color=colour,
            linewidth=width,
            linestyle=(0, (4, 2)) if dashed else "-",
            solid_joinstyle="round",
        )

    def to_bytes(self, suffix: str) -> bytes:
        """Return the page as an SVG or PNG file."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        out = BytesIO()
        canvas: Any = (FigureCanvasSVG if suffix == ".svg" else FigureCanvasAgg)(self.figure)
        if suffix == ".png":
            canvas.figure.savefig(out, format="png", dpi=_RESOLUTION, facecolor=self.theme.page)
            return out.getvalue()
        with _settings_lock:
            settings: Any = matplotlib.rcParams
            old = {name: settings[name] for name in _SVG_SETTINGS}
            settings.update(_SVG_SETTINGS)
            try:
                canvas.figure.savefig(out, format="svg", facecolor=self.theme.page, metadata=_NO_METADATA)
            finally:
                settings.update(old)
        return out.getvalue().replace(f"'{_FONT}'".encode(), f"'{_FONT}', {_OTHER_FONTS}".encode())
