"""The ``adaptc`` command: make programs of models and adapters, look at them, and swap, merge, write and verify them.

Every command reads files and writes one; none changes what it reads, and none replaces what is there unless it is told
to. Exit codes: 0 done, 1 an error of adaptc (one line on stderr) or a verification that failed, 2 wrong usage. What a
command found goes to stdout, as tables or as JSON. Only typer is imported before a command runs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

C = TypeVar("C", bound=Callable[..., None])

app = typer.Typer(
    help="Fine-tuning adapters (LoRA and PEFT's other methods) as a compiler pass over torch.export programs.",
    epilog="Start with: adaptc compile MODEL_DIR ADAPTER_DIR -o adapted.pt2. Then adaptc COMMAND --help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Program = Annotated[Path, typer.Argument(metavar="PROG.pt2", help="A program with an adapter.", show_default=False)]
Adapter = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER", help="A PEFT directory, or a file of diffusers, kohya or torchtune.", show_default=False
    ),
]
Component = Annotated[
    str | None, typer.Option(help="Which component of a file that has several, such as unet or text_encoder.")
]
Out = Annotated[
    Path | None, typer.Argument(metavar="OUT", help="Where to write the result, as --output.", show_default=False)
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Where to write the result.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace the output if it is there already.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was found as one JSON object.")]
KeyMapping = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="Rename the adapter's keys: a JSON object of regular expressions and what to put in their place. An error "
        "about keys that do not fit says which would.",
        show_default=False,
    ),
]


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="adaptc")


def plain_errors(command: C) -> C:
    """Errors of adaptc as one red line, warnings as yellow ones."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from adaptc.errors import AdaptcError, AdaptcWarning

        with warnings.catch_warnings():
            usual = warnings.showwarning
            warnings.simplefilter("always", AdaptcWarning)

            def show(message: Any, category: type[Warning], *rest: Any) -> None:
                if issubclass(category, AdaptcWarning):
                    _say("warning", str(message), "yellow")
                else:
                    usual(message, category, *rest)

            warnings.showwarning = show  # type: ignore[assignment]
            try:
                command(*args, **kwargs)
            except AdaptcError as error:
                _say("error", str(error), "red")
                raise typer.Exit(1) from None

    return run  # type: ignore[return-value]


def _say(what: str, text: str, colour: str) -> None:
    typer.secho(_printable(f"{what}: {' '.join(text.split())}"), fg=colour, err=True)


def _printable(text: str) -> str:
    """With escapes for what no terminal can show: file names and configs may hold bytes that are no text."""
    return text.encode("utf-8", "backslashreplace").decode()


def _print(report: Any) -> None:
    typer.echo(_printable(report.render(shutil.get_terminal_size((120, 24)).columns)))


def _tell(as_json: bool, report: Any = None, wrote: Path | None = None) -> None:
    """What a command found and wrote, as text or as one JSON object."""
    if as_json:
        found = {} if report is None else report.data()
        typer.echo(json.dumps(found if wrote is None else {**found, "wrote": _printable(str(wrote))}))
        return
    if report is not None:
        _print(report)
    if wrote is not None:
        typer.echo(_printable(f"wrote {wrote}"))


def _place(argument: Path | None, option: Path | None, force: bool) -> Path:
    """Where to write, known before any work is done. Raises AdaptcError for what is there already."""
    from adaptc.errors import CheckpointError

    if (argument is None) == (option is None):
        raise typer.BadParameter("give the output once, as -o OUT or as the last argument", param_hint="'--output'")
    out = argument or option
    assert out is not None
    full = any(out.iterdir()) if out.is_dir() else out.exists()
    if full and not force:
        raise CheckpointError(f"{out} is there already; --force replaces it")
    return out


def _mapping(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no JSON: {error}", param_hint="'--key-mapping'") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{text!r} is no JSON object", param_hint="'--key-mapping'")
    return found


def _version(show: bool) -> None:
    if show:
        from adaptc import __version__

        typer.echo(f"adaptc {__version__}")
        raise typer.Exit


def _import(files: list[Path] | None) -> None:
    """Run Python files, as importing them would: they register methods."""
    for file in files or []:
        name = f"imported_by_adaptc.{file.stem}"  # its own name may be that of a library
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.is_file():
            _say("error", f"--import {file}: there is no such Python file", "red")
            raise typer.Exit(1)
        sys.path.append(str(file.parent))  # files beside it can be imported, but none in the place of a library
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            _say("error", f"--import {file}: {type(error).__name__}: {error}", "red")
            raise typer.Exit(1) from None


@app.callback()
def options(
    imported: Annotated[
        list[Path] | None,
        typer.Option("--import", metavar="FILE.py", help="Run this file first: it registers a method of your own."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    _import(imported)


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
    """What a program adapts and with which tensors, what a package takes, or what an adapter holds."""
    if path.is_dir() or path.suffix in (".safetensors", ".bin"):
        from adaptc.reports.adapter import AdapterReport

        _tell(as_json, AdapterReport.of(path))
        return
    from adaptc.packages.manifest import is_package

    if is_package(path):
        from adaptc.packages.report import PackageReport

        _tell(as_json, PackageReport.read(path))  # its code stays in the file
        return
    import adaptc

    _tell(as_json, adaptc.report(adaptc.load(path)))


@app.command()
@plain_errors
def methods(as_json: Json = False) -> None:
    """The methods there are, what each means, and which layers it takes: around them, or on their weights."""
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
    key_mapping: KeyMapping = None,
    component: Component = None,
    as_json: Json = False,
) -> None:
    """Capture a model and adapt it: an adapted program.

    The model's inputs are made from its config. For other models export a program in Python (torch.export.save) and
    give that.
    """
    import adaptc
    from adaptc.binding.source import config_of
    from adaptc.capture.model_files import read_model

    path = _place(out, output, force)
    given = adapter.is_dir() or (adapter.is_file() and adapter.suffix != ".json")
    config = str(adapter) if given else config_of(adapter)
    options: dict[str, Any] = {"training": training, "key_mapping": _mapping(key_mapping), "component": component}
    program = adaptc.compile(adaptc.load(model) if model.is_file() else read_model(model), config, **options)
    _tell(as_json, adaptc.report(program), adaptc.save(program, path))


@app.command()
@plain_errors
def merge(
    program: Program,
    out: Out = None,
    output: Output = None,
    force: Force = False,
    adapter: Annotated[
        Path | None, typer.Option(metavar="ADAPTER", help="Merge this adapter instead of the program's own.")
    ] = None,
    key_mapping: KeyMapping = None,
    component: Component = None,
    safe: Annotated[bool, typer.Option(help="Refuse weights that are not finite.")] = True,
    as_json: Json = False,
) -> None:
    """Fold the adapter into the weights: a plain program, and how much rounding each weight took.

    The result runs with torch.export.load, without adaptc.
    """
    import adaptc

    path = _place(out, output, force)
    if adapter is None and (key_mapping is not None or component is not None):
        option = "--component" if key_mapping is None else "--key-mapping"
        raise typer.BadParameter("it is for the adapter that --adapter names", param_hint=f"'{option}'")
    adapted = adaptc.load(program)
    if adapter is not None:
        adaptc.swap(adapted, adapter, key_mapping=_mapping(key_mapping), component=component)
    merged = adaptc.merge(adapted, safe=safe, keep_base=False, progress=sys.stderr.isatty())
    _tell(as_json, merged.merge_report, adaptc.save(merged, path))


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
    import adaptc

    path = _place(out, output, force)
    adapted = adaptc.load(program)
    report = adaptc.swap(adapted, adapter, key_mapping=_mapping(key_mapping), component=component)
    _tell(as_json, report, adaptc.save(adapted, path))


@app.command()
@plain_errors
def unload(
    program: Program, out: Out = None, output: Output = None, force: Force = False, as_json: Json = False
) -> None:
    """Take the adapter out: the base as a plain program."""
    import adaptc

    path = _place(out, output, force)
    _tell(as_json, wrote=adaptc.save(adaptc.unload(adaptc.load(program)), path))


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
    import adaptc

    path = _place(out, output, force)
    lowered = adaptc.lower(adaptc.load(program, device=device))
    _tell(as_json, adaptc.report(lowered), adaptc.save(lowered, path))


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
    as_json: Json = False,
) -> None:
    """Compile a program ahead of time with AOTInductor: one file of machine code, whose adapters can be swapped.

    It runs with adaptc.load_package, on machines like this one. A package runs as it is loaded: load only those you
    trust.
    """
    import adaptc

    path = _place(out, output, force)
    _tell(as_json, wrote=adaptc.package(adaptc.load(program), path, max_rank=max_rank, products=products))


@app.command("export-adapter")
@plain_errors
def export_adapter(
    program: Program,
    out: Out = None,
    output: Output = None,
    force: Force = False,
    base_model: Annotated[str | None, typer.Option(help="Recorded as base_model_name_or_path.")] = None,
    form: Annotated[str, typer.Option("--format", help="peft, diffusers or kohya.")] = "peft",
    component: Annotated[str | None, typer.Option(help="Of a pipeline, such as unet: for diffusers and kohya.")] = None,
    as_json: Json = False,
) -> None:
    """Write the program's adapter as a PEFT adapter directory, which peft.PeftModel.from_pretrained loads, or as a file
    of diffusers or kohya."""
    import adaptc

    path = _place(out, output, force)
    written = adaptc.save_adapter(adaptc.load(program), path, base_model=base_model, format=form, component=component)
    _tell(as_json, wrote=written)


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
    import adaptc

    report = adaptc.verify(adaptc.load(program), shapes=runs, seed=seed, atol=atol)
    _tell(as_json, report)
    if not report.ok:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
