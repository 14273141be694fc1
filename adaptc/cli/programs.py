"""Define the commands on programs: show, compile, merge, swap, lower, package and others; and ``methods``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptc.cli.app import (
    Base,
    Component,
    Force,
    Json,
    KeyMapping,
    NamedAdapters,
    Out,
    Output,
    Program,
    Quantize,
    app,
    choose_output_path,
    import_adaptc,
    parse_key_mapping,
    parse_named_paths,
    print_message,
    print_result,
    prints_errors,
)


@app.command()
@prints_errors
def show(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|DIR",
            help="A program, a package, an adapter, a transformers model directory, a GGUF or an ONNX file.",
            show_default=False,
        ),
    ],
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Show what a program adapts and with which tensors, what a package takes, or what a file or directory holds.

    Of a program and a package also the adapters that lie in the file by name.
    """
    if path.is_dir() or path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx"):
        from adaptc.reports.inspect_file import inspect_file

        print_result(as_json, inspect_file(path))
        return
    from adaptc.archives.archive import is_package

    if is_package(path):
        from adaptc.serving.serving_file import read_package_report

        print_result(
            as_json, read_package_report(path)
        )  # reads the manifest only: loading a package would run its code
        return
    adaptc = import_adaptc()

    print_result(as_json, adaptc.report(adaptc.load(path, base=base)))


@app.command()
@prints_errors
def methods(
    coverage: Annotated[
        bool, typer.Option("--coverage", help="List the method types of PEFT, and what is refused of each.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the methods, what each means, and which layers it takes: around them, or on their weights."""
    from adaptc.methods.overview import coverage_rows, method_rows, render_coverage, render_text

    if as_json:
        typer.echo(json.dumps([dict(vars(row)) for row in (coverage_rows() if coverage else method_rows())]))
    else:
        render = render_coverage if coverage else render_text
        typer.echo(render(shutil.get_terminal_size((120, 24)).columns))


@app.command("compile")
@prints_errors
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
            help="An adapter: a PEFT directory, or a file of diffusers, kohya, ComfyUI, loralib or torchtune. Or the "
            "JSON of a config (adapter_config.json), for a fresh one.",
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
    quantize: Quantize = None,
    key_mapping: KeyMapping = None,
    component: Component = None,
    adapters: NamedAdapters = None,
    by_reference: Annotated[
        bool, typer.Option("--by-reference", help="Leave the base's weights out of the file: loading it takes --base.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Capture a model and adapt it: an adapted program.

    The model's inputs are made from its config. For other models export a program in Python (torch.export.save) and
    give that.
    """
    from adaptc.api.quantize import check_scheme_name, quantize_read_model
    from adaptc.binding.sources.configs import read_config_file
    from adaptc.capture.model_files import is_gguf, read_gguf, read_model

    adaptc = import_adaptc()
    if quantize is not None:
        check_scheme_name(quantize)
    _check_generate(generate, training, {"--max-batch": max_batch, "--max-length": max_length})

    path = choose_output_path(out, output, force, model, adapter)
    has_weights = adapter.is_dir() or (adapter.is_file() and adapter.suffix != ".json")
    config = str(adapter) if has_weights else read_config_file(adapter)
    options: dict[str, Any] = {"key_mapping": parse_key_mapping(key_mapping), "component": component}
    if generate:
        # A saved program cannot be captured again as a step with a cache, so only models are read here.
        found = read_gguf(model, None) if is_gguf(model) else read_model(model)
        found = found if quantize is None else quantize_read_model(found, quantize, model)
        options |= {"max_batch": max_batch or 8, "max_length": max_length}
        program = adaptc.compile_for_generation(found, config, **options)
    else:
        found = adaptc.load(model) if model.is_file() else read_model(model)
        found = found if quantize is None else quantize_read_model(found, quantize, model)
        program = adaptc.compile(found, config, training=training, **options)
    how = {"adapters": parse_named_paths(adapters) if adapters else None}
    written_path = adaptc.save(program, path, base="reference" if by_reference else "included", **how)
    print_result(as_json, adaptc.report(program), written_path)


def _check_generate(generate: bool, training: bool, sizes: Mapping[str, int | None]) -> None:
    if generate and training:
        raise typer.BadParameter("text is generated in inference, without --training", param_hint="'--generate'")
    for name, value in sizes.items():
        if value is not None and not generate:
            raise typer.BadParameter("it is for --generate", param_hint=f"'{name}'")


@app.command()
@prints_errors
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
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Make plain weights of the quantised ones that the adapter changes.")
    ] = False,
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Store quantised weights that the adapter changes by their scheme again."),
    ] = False,
    correction_rank: Annotated[
        int | None,
        typer.Option(
            metavar="RANK", help="With --requantize: keep a correction of this rank beside each.", show_default=False
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="residual", help="Keep quantised weights, and the adapter beside them.", show_default=False
        ),
    ] = None,
    by_file: Annotated[
        bool | None,
        typer.Option(
            "--by-file/--in-memory",
            help="Rewrite a MODEL's files one tensor at a time, or merge the model in memory. By default by file, if "
            "the files have a place for every new weight.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fold the adapter into the weights, and tell how much rounding each weight took.

    Of a program: a plain program, which runs with torch.export.load, without adaptc. Of a model directory: a model
    directory, with its tokenizer, which from_pretrained loads: adaptc merge MODEL ADAPTER -o DIR.
    """
    from adaptc.errors import FilePlaceError

    is_model_directory = program.is_dir()
    if is_model_directory:
        # Both are read when torch and transformers are imported.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
    adaptc = import_adaptc()

    if is_model_directory and output is not None and second is not None:
        if adapter is not None:
            raise typer.BadParameter(f"give the adapter once, as {second} or as --adapter", param_hint="'--adapter'")
        adapter, second = second, None
    path = choose_output_path(second, output, force, program, adapter)
    if adapter is None and (key_mapping is not None or component is not None):
        option = "--component" if key_mapping is None else "--key-mapping"
        raise typer.BadParameter("it is for the adapter that --adapter names", param_hint=f"'{option}'")
    options: dict[str, Any] = {"key_mapping": parse_key_mapping(key_mapping), "component": component}
    in_memory_options = {"--keep": keep, "--correction-rank": correction_rank}
    chosen = next((name for name, value in in_memory_options.items() if value is not None), None)
    if by_file is not None and not is_model_directory:
        raise typer.BadParameter("it is for a model directory", param_hint="'--by-file'")
    if by_file and chosen is not None:
        raise typer.BadParameter(f"it does not go with {chosen}", param_hint="'--by-file'")
    can_write_by_file = is_model_directory and chosen is None and any(program.glob("*.safetensors"))
    if adapter is not None and (can_write_by_file if by_file is None else by_file):
        ways = {"dequantize": dequantize, "requantize": requantize, "safe": safe}
        try:
            print_result(as_json, adaptc.merge_directory(program, adapter, path, **options, **ways), path)
            return
        except FilePlaceError as error:
            if by_file:
                raise
            print_message("warning", f"merging in memory, since the files have no place for it: {error}", "yellow")
    if is_model_directory:
        from adaptc.capture.model_files import read_model
        from adaptc.state.model_directory import check_target_dir, write_program_model

        if adapter is None:
            raise typer.BadParameter("which adapter is to be merged into the model?", param_hint="'ADAPTER'")
        check_target_dir(path)
        adapted = adaptc.compile(read_model(program), str(adapter), **options)
    else:
        adapted = adaptc.load(program)
        if adapter is not None:
            adaptc.swap(adapted, adapter, **options)
    ways = {"dequantize": dequantize, "requantize": requantize, "keep": keep, "safe": safe}
    merged = adaptc.merge(adapted, keep_base=False, correction_rank=correction_rank, **ways)
    merged_program = merged.program if isinstance(merged, adaptc.Generator) else merged
    written_path = (
        write_program_model(merged, path, companions_from=program) if is_model_directory else adaptc.save(merged, path)
    )
    print_result(as_json, merged_program.merge_report, written_path)


@app.command()
@prints_errors
def swap(
    program: Program,
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER|NAME",
            help="A PEFT directory, a file of another format, or the name of an adapter in the program's file.",
            show_default=False,
        ),
    ],
    out: Out = None,
    output: Output = None,
    force: Force = False,
    key_mapping: KeyMapping = None,
    component: Component = None,
    as_json: Json = False,
) -> None:
    """Give a program another adapter, of any rank, at any of its sites."""
    adaptc = import_adaptc()

    path = choose_output_path(out, output, force, program, adapter)
    adapted = adaptc.load(program)
    report = adaptc.swap(adapted, str(adapter), key_mapping=parse_key_mapping(key_mapping), component=component)
    print_result(as_json, report, adaptc.save(adapted, path))


@app.command()
@prints_errors
def unload(
    program: Program, out: Out = None, output: Output = None, force: Force = False, as_json: Json = False
) -> None:
    """Take the adapter out: the base as a plain program."""
    adaptc = import_adaptc()

    path = choose_output_path(out, output, force, program)
    print_result(as_json, written_path=adaptc.save(adaptc.unload(adaptc.load(program)), path))


@app.command()
@prints_errors
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
    adaptc = import_adaptc()

    path = choose_output_path(out, output, force, program)
    lowered = adaptc.debug.lower(adaptc.load(program, device=device))
    print_result(as_json, adaptc.report(lowered), adaptc.save(lowered, path))


@app.command()
@prints_errors
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
    adapters: NamedAdapters = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Compile a program ahead of time with AOTInductor: one file of machine code, whose adapters can be swapped.

    It runs with adaptc.load_package, on machines like this one. Of a program that generates (adaptc compile --generate)
    the package generates, too. A package runs as it is loaded: load only those you trust.
    """
    adaptc = import_adaptc()

    path = choose_output_path(out, output, force, program, tokenizer)
    options: dict[str, Any] = {"max_rank": max_rank, "products": products, "tokenizer": tokenizer}
    options["adapters"] = parse_named_paths(adapters) if adapters else None
    print_result(as_json, written_path=adaptc.package(adaptc.load(program, base=base), path, **options))


File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="A program with an adapter, a package, or an ONNX, .xml or .pte file.", show_default=False
    ),
]
Original = Annotated[
    Path | None,
    typer.Option(
        "--program",
        metavar="PROG.pt2",
        help="The program that FILE was made from, to compare with; an ONNX, .xml or .pte file needs it.",
        show_default=False,
    ),
]
Atol = Annotated[
    float | None, typer.Option(help="Largest difference allowed; by default it follows from the weights' dtype.")
]


@app.command()
@prints_errors
def verify(
    file: File,
    seed: Annotated[
        int | None,
        typer.Option(
            min=-(2**63),
            max=2**63 - 1,
            help="Seed of the random inputs; by default the certificate's.",
            show_default=False,
        ),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000, help="How many input shapes to try; by default as certified, or 3.", show_default=False
        ),
    ] = None,
    atol: Atol = None,
    base: Base = None,
    program: Original = None,
    as_json: Json = False,
) -> None:
    """Check on random inputs that merging and unloading a program do what they promise, and whether the certificate of
    the file still holds. Exits with 1 if not. A package runs as it is loaded.
    """
    adaptc = import_adaptc()

    original = None if program is None else adaptc.load(program)
    report = adaptc.verify(file, original, shapes=runs, seed=seed, atol=atol, base=base)
    print_result(as_json, report)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@prints_errors
def certify(
    file: File,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of the random inputs.")] = 0,
    runs: Annotated[int, typer.Option(min=1, max=10_000, help="How many input shapes to try.")] = 3,
    atol: Atol = None,
    base: Base = None,
    program: Original = None,
    as_json: Json = False,
) -> None:
    """Verify a file as verify does, and write what was measured into the file's certificate.

    The file is replaced by one with the same content and the new certificate. Where a check fails it stays as it is,
    and the exit code is 1. A package runs as it is loaded.
    """
    adaptc = import_adaptc()

    original = None if program is None else adaptc.load(program)
    print_result(as_json, adaptc.certify(file, original, seed=seed, shapes=runs, atol=atol, base=base), file)
