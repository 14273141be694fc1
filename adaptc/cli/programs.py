"""Define the commands on programs: show, compile, merge, swap, unload, lower, package, verify; and ``methods``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptc.cli.app import (
    Adapter,
    Component,
    Force,
    Json,
    KeyMapping,
    Out,
    Output,
    Program,
    app,
    facade,
    mapping,
    place,
    plain_errors,
    tell,
)


@app.command()
@plain_errors
def show(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.pt2|ADAPTER",
            help="A program, a package, or an adapter: a directory or a file.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show what a program adapts and with which tensors, what a package takes, or what an adapter holds."""
    if path.is_dir() or path.suffix in (".safetensors", ".bin"):
        from adaptc.reports.adapter_report import AdapterReport

        tell(as_json, AdapterReport.of(path))
        return
    from adaptc.packages.manifest import is_package

    if is_package(path):
        from adaptc.generation.artifact import report_of

        tell(as_json, report_of(path))  # reads the manifest only: loading a package would run its code
        return
    adaptc = facade()

    tell(as_json, adaptc.report(adaptc.load(path)))


@app.command()
@plain_errors
def methods(as_json: Json = False) -> None:
    """List the methods, what each means, and which layers it takes: around them, or on their weights."""
    from adaptc.methods.overview import overview, render

    if as_json:
        typer.echo(json.dumps([dict(vars(row)) for row in overview()]))
    else:
        typer.echo(render(shutil.get_terminal_size((120, 24)).columns))


@app.command("compile")
@plain_errors
def compile_(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A transformers model directory, or a program (.pt2).", show_default=False
        ),
    ],
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER|FILE.json",
            help="An adapter: a PEFT directory, or a file of diffusers, kohya or torchtune. Or the JSON of a config "
            "(adapter_config.json), for a fresh one.",
            show_default=False,
        ),
    ],
    out: Out = None,
    output: Output = None,
    force: Force = False,
    training: Annotated[bool, typer.Option("--training", help="Capture train mode: dropout, and the loss.")] = False,
    generate: Annotated[
        bool, typer.Option("--generate", help="Capture a step with its cache, of a model that generates text.")
    ] = False,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="With --generate: rows of a cache at most, 8 by default.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="With --generate: tokens of a text at most, by default all the model takes."),
    ] = None,
    key_mapping: KeyMapping = None,
    component: Component = None,
    as_json: Json = False,
) -> None:
    """Capture a model and adapt it: an adapted program.

    The model's inputs are made from its config. For other models export a program in Python (torch.export.save) and
    give that.
    """
    from adaptc.binding.sources.source import config_of
    from adaptc.capture.model_files import is_gguf, read_gguf, read_model

    adaptc = facade()
    _check_generate(generate, training, {"--max-batch": max_batch, "--max-length": max_length})

    path = place(out, output, force, model, adapter)
    given = adapter.is_dir() or (adapter.is_file() and adapter.suffix != ".json")
    config = str(adapter) if given else config_of(adapter)
    options: dict[str, Any] = {"key_mapping": mapping(key_mapping), "component": component}
    if generate:
        # A saved program cannot be captured again as a step with a cache, so only models are read here.
        found = read_gguf(model, None) if is_gguf(model) else read_model(model)
        options |= {"max_batch": max_batch or 8, "max_length": max_length}
        program = adaptc.compile_for_generation(found, config, **options)
    else:
        found = adaptc.load(model) if model.is_file() else read_model(model)
        program = adaptc.compile(found, config, training=training, **options)
    tell(as_json, adaptc.report(program), adaptc.save(program, path))


def _check_generate(generate: bool, training: bool, sizes: Mapping[str, int | None]) -> None:
    if generate and training:
        raise typer.BadParameter("text is generated in inference, without --training", param_hint="'--generate'")
    for name, value in sizes.items():
        if value is not None and not generate:
            raise typer.BadParameter("it is for --generate", param_hint=f"'{name}'")


@app.command()
@plain_errors
def merge(
    program: Annotated[
        Path,
        typer.Argument(
            metavar="PROG.pt2|MODEL",
            help="A program with an adapter, or a transformers model directory.",
            show_default=False,
        ),
    ],
    second: Annotated[
        Path | None,
        typer.Argument(
            metavar="ADAPTER|OUT",
            help="Where to write the result; of a MODEL, with --output, the adapter to merge.",
            show_default=False,
        ),
    ] = None,
    output: Output = None,
    force: Force = False,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="ADAPTER", help="The adapter to merge; by default the program's own.", show_default=False),
    ] = None,
    key_mapping: KeyMapping = None,
    component: Component = None,
    safe: Annotated[bool, typer.Option(help="Refuse weights that are not finite.")] = True,
    as_json: Json = False,
) -> None:
    """Fold the adapter into the weights, and tell how much rounding each weight took.

    Of a program: a plain program, which runs with torch.export.load, without adaptc. Of a model directory: a model
    directory, with its tokenizer, which from_pretrained loads: adaptc merge MODEL ADAPTER -o DIR.
    """
    whole = program.is_dir()
    if whole:
        from adaptc.chat.terminal import settle_libraries

        settle_libraries()
    adaptc = facade()

    if whole and output is not None and second is not None:
        if adapter is not None:
            raise typer.BadParameter(f"give the adapter once, as {second} or as --adapter", param_hint="'--adapter'")
        adapter, second = second, None
    path = place(second, output, force, program, adapter)
    if adapter is None and (key_mapping is not None or component is not None):
        option = "--component" if key_mapping is None else "--key-mapping"
        raise typer.BadParameter("it is for the adapter that --adapter names", param_hint=f"'{option}'")
    options: dict[str, Any] = {"key_mapping": mapping(key_mapping), "component": component}
    if whole:
        from adaptc.capture.model_files import read_model
        from adaptc.state.model_directory import check_place, write_model_of

        if adapter is None:
            raise typer.BadParameter("which adapter is to be merged into the model?", param_hint="'ADAPTER'")
        check_place(path)
        adapted = adaptc.compile(read_model(program), str(adapter), **options)
    else:
        adapted = adaptc.load(program)
        if adapter is not None:
            adaptc.swap(adapted, adapter, **options)
    merged = adaptc.merge(adapted, safe=safe, keep_base=False)
    inside = merged.program if isinstance(merged, adaptc.Generator) else merged
    wrote = write_model_of(merged, path, beside=program) if whole else adaptc.save(merged, path)
    tell(as_json, inside.merge_report, wrote)


@app.command()
@plain_errors
def swap(
    program: Program,
    adapter: Adapter,
    out: Out = None,
    output: Output = None,
    force: Force = False,
    key_mapping: KeyMapping = None,
    component: Component = None,
    as_json: Json = False,
) -> None:
    """Give a program another adapter, of any rank, at any of its sites."""
    adaptc = facade()

    path = place(out, output, force, program, adapter)
    adapted = adaptc.load(program)
    report = adaptc.swap(adapted, adapter, key_mapping=mapping(key_mapping), component=component)
    tell(as_json, report, adaptc.save(adapted, path))


@app.command()
@plain_errors
def unload(
    program: Program, out: Out = None, output: Output = None, force: Force = False, as_json: Json = False
) -> None:
    """Take the adapter out: the base as a plain program."""
    adaptc = facade()

    path = place(out, output, force, program)
    tell(as_json, wrote=adaptc.save(adaptc.unload(adaptc.load(program)), path))


@app.command()
@plain_errors
def lower(
    program: Program,
    out: Out = None,
    output: Output = None,
    force: Force = False,
    device: Annotated[
        str | None, typer.Option(help="Move the program there first, such as cuda; by default it stays where it was.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put fused GPU kernels into the graph, in the place of the adapters' own nodes. Needs a GPU and triton."""
    adaptc = facade()

    path = place(out, output, force, program)
    lowered = adaptc.lower(adaptc.load(program, device=device))
    tell(as_json, adaptc.report(lowered), adaptc.save(lowered, path))


@app.command()
@plain_errors
def package(
    program: Program,
    out: Out = None,
    output: Output = None,
    force: Force = False,
    max_rank: Annotated[
        int | None,
        typer.Option(min=1, help="The largest rank later swaps may have; by default the ranks there are now."),
    ] = None,
    products: Annotated[
        str, typer.Option(help="What computes the base's layers: measured (the fastest on this machine) or plain.")
    ] = "measured",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A tokenizer's directory, such as the model's, to put into a package that generates text.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a program ahead of time with AOTInductor: one file of machine code, whose adapters can be swapped.

    It runs with adaptc.load_package, on machines like this one. Of a program that generates (adaptc compile --generate)
    the package generates, too, and adaptc chat talks to it. A package runs as it is loaded: load only those you trust.
    """
    adaptc = facade()

    path = place(out, output, force, program, tokenizer)
    options: dict[str, Any] = {"max_rank": max_rank, "products": products, "tokenizer": tokenizer}
    tell(as_json, wrote=adaptc.package(adaptc.load(program), path, **options))


@app.command()
@plain_errors
def verify(
    program: Program,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of the random inputs.")] = 0,
    runs: Annotated[int, typer.Option(min=1, max=10_000, help="How many input shapes to try.")] = 3,
    atol: Annotated[
        float | None, typer.Option(help="Largest difference allowed; by default it follows from the weights' dtype.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check on random inputs that merging and unloading a program do what they promise. Exits with 1 if not."""
    adaptc = facade()

    report = adaptc.verify(adaptc.load(program), shapes=runs, seed=seed, atol=atol)
    tell(as_json, report)
    if not report.ok:
        raise typer.Exit(1)
