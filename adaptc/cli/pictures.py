"""Define the command that draws programs and adapters: ``draw``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptc.cli.app import Force, Json, Output, app, choose_output_path, import_adaptc, print_result, prints_errors


class Picture(StrEnum):
    """The kinds of pictures."""

    LAYER = "layer"
    NORM = "norm"
    RANK = "rank"
    EFFECTIVE_RANK = "effective_rank"
    SIMILARITY = "similarity"


class Page(StrEnum):
    """The pages that pictures are for."""

    LIGHT = "light"
    DARK = "dark"


@app.command()
@prints_errors
def draw(
    subjects: Annotated[
        list[Path],
        typer.Argument(
            metavar="PROG.pt2|ADAPTER...", help="A program, an adapter, or several adapters.", show_default=False
        ),
    ],
    output: Output = None,
    force: Force = False,
    kind: Annotated[
        Picture | None,
        typer.Option(
            help="By default similarity of several adapters, layer of a program, and effective_rank of an adapter.",
            show_default=False,
        ),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With layer: which one; by default the first adapted.", show_default=False),
    ] = None,
    theme: Annotated[Page, typer.Option(help="The page that the picture is for.")] = Page.LIGHT,
    as_json: Json = False,
) -> None:
    """Draw into an SVG or PNG file: a layer before and after the rewrite, norms and ranks by layer, or similarities.

    The numbers behind the picture are printed, with --json as one object. Pictures need matplotlib (extra pictures).
    """
    adaptc = import_adaptc()

    path = choose_output_path(None, output, force, *subjects)
    found: list[Any] = [adaptc.load(p) if p.suffix == ".pt2" else p for p in subjects]
    options = {"kind": kind and kind.value, "site": site, "theme": theme.value}
    print_result(as_json, adaptc.draw(found if len(found) > 1 else found[0], path, **options), path)
