"""Draw pictures of programs and adapters into SVG and PNG files (``draw``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from adaptc.adapter_files.atomic_write import atomic_replace
from adaptc.errors import CheckpointError, ConfigError, listing, short_repr
from adaptc.pictures.canvas import Canvas, check_library
from adaptc.pictures.heat_map import draw_heat_map
from adaptc.pictures.layer_picture import draw_layer
from adaptc.pictures.site_grid import Grid, site_grid
from adaptc.pictures.themes import THEMES, Theme
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import unwrap
from adaptc.reports.layer_graph import LayerGraph
from adaptc.reports.norms import Norms
from adaptc.reports.similarity import SimilarityReport, compare_adapters
from adaptc.reports.spectra import SpectrumReport, measure_spectra
from adaptc.tables import Report
from adaptc.value_types import validates_options

Kind = Literal["layer", "norm", "rank", "effective_rank", "similarity"]
#: the ends of names of files that are written
SUFFIXES = (".svg", ".png")


@validates_options("kind", "site", "theme")
def draw(
    subject: Any,
    path: str | os.PathLike[str],
    *,
    kind: Kind | None = None,
    site: str | None = None,
    theme: Literal["light", "dark"] = "light",
) -> Report:
    """Draw a program or adapters into an SVG or PNG file, and return the numbers behind the picture.

    | kind | picture | of what |
    |---|---|---|
    | "layer" | the nodes of a layer before and after the rewrite | a program |
    | "norm" | blocks by layers: the norm of the change over that of the weight | a program |
    | "rank" | the same: the rank of the adapter | a program or an adapter |
    | "effective_rank" | the same: how much of the rank is used, :func:`adaptc.debug.measure_spectra` | both |
    | "similarity" | the cosines between the changes, :func:`adaptc.debug.compare_adapters` | several adapters |

    Args:
        subject: a program or generator; an adapter, as for :func:`adaptc.debug.measure_spectra`; or several, as for
            :func:`adaptc.debug.compare_adapters`.
        path: the file to write, which ends in ``.svg`` or ``.png``. Text in an SVG stays text.
        kind: one of the table; None for "similarity" of a dict or list, "layer" of a program, and "effective_rank" of
            an adapter.
        site: for "layer", the parameter or module to draw; None for the first with an adapter.
        theme: "light" or "dark", the page that the picture is for.

    Returns:
        a report of the numbers, whose ``to_pandas()`` is a table.

    Raises:
        ConfigError: matplotlib is not installed, an option does not go with the kind, or the subject has no such
            picture.
        CheckpointError: the file cannot be written, or an adapter is damaged. What was there before is unchanged.

    Example:
        >>> adaptc.draw(prog, "layer.svg", kind="layer").site
        '0.weight'
    """
    target = check_picture_path(path)
    chosen = kind or _usual_kind(subject)
    if site is not None and chosen != "layer":
        raise ConfigError(f"site= is for kind='layer': {chosen!r} shows all sites")
    report, picture = _KINDS[chosen](subject, site, THEMES[theme])
    write_picture(picture, target)
    return report


def check_picture_path(path: str | os.PathLike[str], theme: Any = "light") -> Path:
    """Return the path of a picture. Raises ConfigError for one of another kind, for a theme that is none, and where
    matplotlib is not installed."""
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{short_repr(os.fspath(path))} must end in {' or '.join(SUFFIXES)}")
    if not isinstance(theme, str) or theme not in THEMES:
        raise ConfigError(f"theme={short_repr(theme)} must be one of {listing(map(repr, THEMES))}")
    check_library()
    return target


def write_picture(picture: Canvas, target: Path) -> Path:
    """Write a picture, and return its path. Raises CheckpointError where that cannot be written."""
    content = picture.to_bytes(target.suffix.lower())
    try:
        with atomic_replace(target) as new:
            new.write_bytes(content)
    except OSError as error:
        raise CheckpointError(
            f"could not write a picture to {target} ({short_repr(str(error))}). What was there before is unchanged."
        ) from error
    return target


def _usual_kind(subject: Any) -> Kind:
    if isinstance(subject, (Mapping, list, tuple)):
        return "similarity"
    return "layer" if isinstance(unwrap(subject), AdaptedProgram) else "effective_rank"


def _program(subject: Any, kind: Kind) -> AdaptedProgram:
    program = unwrap(subject)
    if not isinstance(program, AdaptedProgram):
        raise ConfigError(
            f"kind={kind!r} is of a program, which has the base's weights: give adaptc.compile(model, adapter), not "
            f"{short_repr(subject)}"
        )
    return program


def _layer(subject: Any, site: str | None, theme: Theme) -> tuple[Report, Canvas]:
    report = LayerGraph.from_program(_program(subject, "layer"), site)
    return report, draw_layer(report, theme)


def _norm(subject: Any, site: str | None, theme: Theme) -> tuple[Report, Canvas]:
    report = Norms.from_program(_program(subject, "norm").snapshot(), changes=True)
    if all(s.relative_change is None for s in report.sites):
        raise ConfigError("the program has no adapter that changes weights, so there are no norms to draw")
    # Adapters that act together share the change of a weight.
    sites = {s.fqn: s.relative_change for s in report.sites}
    return report, draw_heat_map(site_grid("norm of the change / norm of the weight", sites.items(), _short), theme)


def _rank(subject: Any, site: str | None, theme: Theme) -> tuple[Report, Canvas]:
    report = measure_spectra(subject)
    sites = [(s.site, None if s.rank is None else float(s.rank)) for s in report.sites]
    return report, draw_heat_map(site_grid(_title("rank", report), sites, lambda v: f"{v:.0f}"), theme)


def _effective_rank(subject: Any, site: str | None, theme: Theme) -> tuple[Report, Canvas]:
    report = measure_spectra(subject)
    sites = [(s.site, s.effective_rank) for s in report.sites]
    return report, draw_heat_map(site_grid(_title("effective rank", report), sites, lambda v: f"{v:.1f}"), theme)


def _title(what: str, report: SpectrumReport) -> str:
    ranks = sorted({s.rank for s in report.sites if s.rank is not None})
    return what if not ranks or what == "rank" else f"{what} of LoRA of rank {', '.join(map(str, ranks))}"


def _similarity(subject: Any, site: str | None, theme: Theme) -> tuple[Report, Canvas]:
    report = compare_adapters(subject)
    return report, draw_heat_map(_cosines(report), theme)


def _cosines(report: SimilarityReport) -> Grid:
    names, matrix = report.adapters, report.matrix()
    values = {(a, b): matrix[i][j] for i, a in enumerate(names) for j, b in enumerate(names)}
    return Grid("cosine between the changes", names, names, values, lambda v: f"{v:.2f}", lowest=-1.0, highest=1.0)


def _short(value: float) -> str:
    """Return a share, which is mostly below 1, with two digits, or one where it is very small."""
    if value == 0 or not 0.00095 <= value < 99.5:
        return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{0 if value >= 9.95 else 1 if value >= 0.995 else 2 if value >= 0.0995 else 3}f}"


_KINDS: Mapping[str, Callable[[Any, str | None, Theme], tuple[Report, Canvas]]] = {
    "layer": _layer,
    "norm": _norm,
    "rank": _rank,
    "effective_rank": _effective_rank,
    "similarity": _similarity,
}
