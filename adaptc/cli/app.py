"""Define the app and what all commands share: arguments, the choice of the output path, reports and errors.

Every command reads files and writes one. No command replaces an existing file without ``--force``, or a file that it
reads under another name. Exit codes: 0 done, 1 an error of adaptc (one line on stderr) or a failed verification, 2
wrong usage. Reports go to stdout, as tables or as JSON. Only typer is imported before a command runs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

#: the contexts that are left when the running command ends
_command_contexts: ContextVar[ExitStack] = ContextVar("until_done")

C = TypeVar("C", bound=Callable[..., None])

app = typer.Typer(
    help="Fine-tuning adapters (LoRA and PEFT's other methods) as a compiler pass over torch.export programs.",
    epilog="Start with: adaptc compile MODEL_DIR ADAPTER_DIR -o adapted.pt2. Then adaptc COMMAND --help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ServedModel = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A transformers model directory, a GGUF file, or a program or package (.pt2) that serves.",
        show_default=False,
    ),
]
Program = Annotated[Path, typer.Argument(metavar="PROG.pt2", help="A program with an adapter.", show_default=False)]
Adapter = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER",
        help="A PEFT directory, or a file of diffusers, kohya, ComfyUI, loralib or torchtune.",
        show_default=False,
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
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEME",
        help='Store weights in few bits first: int8, int8_dynamic, int4, nf4, fp4; or "file", as a GGUF file does.',
    ),
]
Device = Annotated[str | None, typer.Option(help="Move the model there first, such as cuda.")]
Dtype = Annotated[
    str | None, typer.Option(help="Of the weights, such as bfloat16; by default that of the file, of GGUF float32.")
]
Tokenizer = Annotated[
    Path | None, typer.Option(metavar="DIR", help="A tokenizer's directory, if it is not with the model.")
]
NamedAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME=PATH", help="Put this adapter into the file too, by name.", show_default=False
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(
        metavar="MODEL",
        help="The base of a program that was saved by reference: a model directory or a .safetensors file.",
        show_default=False,
    ),
]
KeyMapping = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="Rename the adapter's keys: a JSON object of regular expressions and what to put in their place. An error "
        "about keys that do not fit says which would.",
        show_default=False,
    ),
]


def prints_errors(command: C) -> C:
    """Return ``command`` with adaptc's errors printed as one red line, and its warnings as yellow lines."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from adaptc.errors import AdaptcError, AdaptcWarning

        with warnings.catch_warnings(), ExitStack() as stack:
            _command_contexts.set(stack)
            default_showwarning = warnings.showwarning
            warnings.simplefilter("always", AdaptcWarning)

            def show_warning(message: Any, category: type[Warning], *rest: Any) -> None:
                if issubclass(category, AdaptcWarning):
                    print_message("warning", str(message), "yellow")
                else:
                    default_showwarning(message, category, *rest)

            warnings.showwarning = show_warning  # type: ignore[assignment]
            try:
                command(*args, **kwargs)
            except AdaptcError as error:
                print_message("error", str(error), "red")
                raise typer.Exit(1) from None

    return run  # type: ignore[return-value]


def import_adaptc() -> Any:
    """Return the package ``adaptc``, imported only when a command runs."""
    import adaptc

    return adaptc


def print_message(label: str, text: str, colour: str) -> None:
    typer.secho(printable(f"{label}: {' '.join(text.split())}"), fg=colour, err=True)


def printable(text: str) -> str:
    """Return ``text`` with escapes for bytes that are no text, which file names and configs may hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_report(report: Any) -> None:
    typer.echo(printable(report.render(shutil.get_terminal_size((120, 24)).columns)))


def print_result(as_json: bool, report: Any = None, written_path: Path | None = None) -> None:
    """Print a command's report and the path it wrote, as text or as one JSON object."""
    if as_json:
        found = {} if report is None else report.to_dict()
        typer.echo(json.dumps(found if written_path is None else {**found, "wrote": printable(str(written_path))}))
        return
    if report is not None:
        print_report(report)
    if written_path is not None:
        typer.echo(printable(f"wrote {written_path}"))


def choose_output_path(argument: Path | None, option: Path | None, force: bool, *read_paths: Path | None) -> Path:
    """Return the path to write to, before any work is done.

    ``read_paths``: the files that the command reads. One of them is replaced only where the output has its own name,
    with ``force``. Without ``force`` the command replaces no file at all, not even one that appears while it runs.
    Raises AdaptcError where the path exists, and where it is another name of a file that is read.
    """
    from adaptc.adapter_files.atomic_write import forbid_overwrite
    from adaptc.errors import CheckpointError

    if (argument is None) == (option is None):
        raise typer.BadParameter("give the output once, as -o OUT or as the last argument", param_hint="'--output'")
    out = argument or option
    assert out is not None
    is_occupied = any(out.iterdir()) if out.is_dir() else out.exists()
    if is_occupied and not force:
        raise CheckpointError(f"{out} is there already; --force replaces it")
    for read in read_paths:
        if read is not None and is_occupied and _overwrites(out, read):
            raise CheckpointError(
                f"{out} leads to {read}, which the command reads and would lose. Choose another name, or give the name "
                "itself to replace it"
            )
    if not force:
        _command_contexts.get().enter_context(forbid_overwrite(out))
    return out


def _overwrites(out: Path, read: Path) -> bool:
    """Return whether writing ``out`` would replace a part of ``read`` under another name."""
    named, other = Path(os.path.abspath(out)), Path(os.path.abspath(read))
    if named == other:
        return False
    real, source = Path(os.path.realpath(named)), Path(os.path.realpath(other))
    return real == source or source in real.parents or (real == source.parent and source.suffix != ".pt2")


def parse_key_mapping(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{text!r} is no JSON: {error}", param_hint="'--key-mapping'") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{text!r} is no JSON object", param_hint="'--key-mapping'")
    return found


def _version(show: bool) -> None:
    if show:
        from adaptc import __version__

        typer.echo(f"adaptc {__version__}")
        raise typer.Exit


def _run_python_files(files: list[Path] | None) -> None:
    """Run Python files, as importing them would: they register methods."""
    for file in files or []:
        name = f"imported_by_adaptc.{file.stem}"  # prefixed, since a file may have the name of a library
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.is_file():
            print_message("error", f"--import {file}: there is no such Python file", "red")
            raise typer.Exit(1)
        sys.path.append(str(file.parent))  # last, so that files beside it can be imported but replace no library
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            print_message("error", f"--import {file}: {type(error).__name__}: {error}", "red")
            raise typer.Exit(1) from None


@app.callback()
def options(
    imported: Annotated[
        list[Path] | None,
        typer.Option("--import", metavar="FILE.py", help="Run this file first: it registers a method of your own."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell each stage of long work on stderr.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress of long work on a terminal.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if verbose and quiet:
        raise typer.BadParameter("it is the opposite of --quiet", param_hint="'--verbose'")
    if verbose or quiet:
        import_adaptc().set_verbosity("info" if verbose else "error")
    _run_python_files(imported)


def parse_named_paths(pairs: list[str]) -> dict[str, Path]:
    """Return the paths of options ``NAME=PATH``, by name. Raises BadParameter for anything else."""
    found: dict[str, Path] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not name or not path or name in found:
            raise typer.BadParameter(f"{pair!r}: expected NAME=PATH, each name once", param_hint="'--adapter'")
        found[name] = Path(path)
    return found
