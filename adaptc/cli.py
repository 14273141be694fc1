"""The ``adaptc`` command: look at programs and adapters, and merge, swap, unload, export and verify them.

Every command reads files and writes files; none changes what it reads. An error of adaptc is one line on stderr and
exit code 1; a verification that fails exits with 1, too. Only typer is imported before a command runs.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

C = TypeVar("C", bound=Callable[..., None])

app = typer.Typer(
    help="Fine-tuning adapters as a compiler pass over torch.export programs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Program = Annotated[Path, typer.Argument(metavar="PROG.pt2", help="A program with an adapter.", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT.pt2", help="Where to write the result.", show_default=False)]
Adapter = Annotated[Path, typer.Argument(metavar="DIR", help="A PEFT adapter directory.", show_default=False)]


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


def _write(program: Any, out: Path) -> None:
    from adaptc.api import save

    typer.echo(_printable(f"wrote {save(program, out)}"))


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
            metavar="FILE.pt2|DIR", help="A program, a package, or an adapter directory.", show_default=False
        ),
    ],
) -> None:
    """What a program adapts and with which tensors, what a package takes, or what an adapter directory holds."""
    if path.is_dir():
        from adaptc.reports.adapter import AdapterReport

        _print(AdapterReport.of(path))
        return
    from adaptc.packages.manifest import is_package

    if is_package(path):
        from adaptc.packages.report import PackageReport

        _print(PackageReport.read(path))  # its code stays in the file
        return
    import adaptc

    _print(adaptc.report(adaptc.load(path)))


@app.command()
@plain_errors
def methods() -> None:
    """The methods there are, what each means, and which layers it takes: around them, or on their weights."""
    from adaptc.methods.overview import render

    typer.echo(render(shutil.get_terminal_size((120, 24)).columns))


@app.command()
@plain_errors
def merge(
    program: Program,
    out: Out,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Merge this PEFT adapter instead of the program's own.")
    ] = None,
    safe: Annotated[bool, typer.Option(help="Refuse weights that are not finite.")] = True,
) -> None:
    """Fold the adapter into the weights: a plain program, and how much rounding each weight took."""
    import adaptc

    adapted = adaptc.load(program)
    if adapter is not None:
        adaptc.swap(adapted, adapter)
    merged = adaptc.merge(adapted, safe=safe, keep_base=False, progress=sys.stderr.isatty())
    _print(merged.merge_report)
    _write(merged, out)


@app.command()
@plain_errors
def swap(program: Program, adapter: Adapter, out: Out) -> None:
    """Give a program another adapter."""
    import adaptc

    adapted = adaptc.load(program)
    typer.echo(_printable(str(adaptc.swap(adapted, adapter))))
    _write(adapted, out)


@app.command()
@plain_errors
def unload(program: Program, out: Out) -> None:
    """Take the adapter out: the base as a plain program."""
    import adaptc

    _write(adaptc.unload(adaptc.load(program)), out)


@app.command("export-adapter")
@plain_errors
def export_adapter(
    program: Program,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write the adapter.", show_default=False)],
    base_model: Annotated[str | None, typer.Option(help="Recorded as base_model_name_or_path.")] = None,
) -> None:
    """Write the program's adapter as a PEFT adapter directory."""
    import adaptc

    written = adaptc.save_adapter(adaptc.load(program), directory, base_model=base_model)
    typer.echo(_printable(f"wrote {written}"))


@app.command()
@plain_errors
def verify(
    program: Program,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of the random inputs.")] = 0,
    runs: Annotated[int, typer.Option(min=1, max=10_000, help="How many input shapes to try.")] = 3,
    atol: Annotated[
        float | None, typer.Option(help="Largest difference allowed; by default it follows from the weights' dtype.")
    ] = None,
) -> None:
    """Check on random inputs that merging and unloading a program do what they promise."""
    import adaptc

    report = adaptc.verify(adaptc.load(program), shapes=runs, seed=seed, atol=atol)
    _print(report)
    if not report.ok:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
