"""Read programs and packages of any kind from their files.

A package is of a serving model, of what generates, or of a program alone. The files that it carries say which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptc.archives.archive import read_sidecar
from adaptc.archives.names import parse_json
from adaptc.archives.refusal import UnsafeFile, describe_error, printable_path
from adaptc.bank.bank import Bank
from adaptc.errors import CheckpointError
from adaptc.generation.compile_generation import make_generator
from adaptc.generation.description import SPEC_FILE as GENERATION_SPEC_FILE
from adaptc.generation.description import facts_of, spec_from_package, tokenizer_of_package
from adaptc.generation.generator import Generator
from adaptc.packages.manifest import Contents
from adaptc.packages.package_placement import bank_of_package
from adaptc.packages.package_report import PackageReport
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.passes.graph.lifted import user_inputs
from adaptc.passes.graph.subprogram import output_names
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.progress import stage
from adaptc.serving.serving_model import ServingModel, as_transformers_model, make_serving_bank
from adaptc.serving.serving_spec import SPEC_FILE, ServingSpec, spec_from_json


def _parse_package(contents: Contents) -> Any:
    """Return the spec of a package's program; None for one that is called alone.

    Raises UnsafeFile for a spec that does not fit.
    """
    files = contents.package_files
    if SPEC_FILE not in files:
        return spec_from_package(contents)
    tokenizer = tokenizer_of_package(files, SPEC_FILE)
    try:
        if contents.manifest.bank is None:
            raise UnsafeFile("it is no bank, which a serving model has")
        return spec_from_json(
            parse_json(files[SPEC_FILE], allow_nan=True), {i.name for i in contents.manifest.inputs}, tokenizer
        )
    except UnsafeFile as error:
        raise error.prepend_location(f"what it says of serving, {SPEC_FILE!r}: ") from None


def load_package_contents(path: Path, is_strict: bool = False) -> Any:
    """Return what a package holds: a serving model, a generator, a bank, or the package itself.

    ``is_strict``: as for :class:`PackagedProgram`, whose errors are raised. A spec that cannot be read raises before
    any code is loaded.
    """
    with stage(f"reading the package {path.name}"):
        found = PackagedProgram(path, _parse_package, is_strict)
    spec = found.parsed_contents
    if not isinstance(spec, ServingSpec):
        return _contents_of_package(found)
    return as_transformers_model()(found, spec, bank_of_package(found))


def read_package_report(path: Path) -> PackageReport:
    """Return the report of a package file without loading its code. Raises the errors of :class:`PackagedProgram`."""

    def notes(contents: Contents) -> list[str]:
        spec = _parse_package(contents)
        return [] if spec is None else list(spec.notes())

    return PackageReport.read(path, notes)


def wrapper_of_file(path: Path, program: AdaptedProgram) -> Any:
    """Return the serving model or the generator that was saved to ``path``, whose ``program`` was read; None for a
    program alone.

    Raises CheckpointError where the spec beside the program cannot be read.
    """
    stored = read_sidecar(path, SPEC_FILE)
    if stored is None:
        return _read_generator(path, program)
    try:
        spec = spec_from_json(stored, user_inputs(program))
    except Exception as error:  # transformers raises many types for a broken config
        why = str(error) if isinstance(error, UnsafeFile) else describe_error(error)
        raise CheckpointError(
            f"{printable_path(path)}: what it says of serving cannot be read: {why}. Save it again from the model"
        ) from error
    made: ServingModel = as_transformers_model()(program, spec, make_serving_bank(program, spec))
    return made


def _contents_of_package(found: PackagedProgram) -> Generator | PackagedProgram | Bank:
    """Return the generator, or the bank that generates, in a package; the package itself where it generates nothing.

    The package was read with ``spec_from_package``.
    """
    generator = None if found.parsed_contents is None else make_generator(found, found.parsed_contents)
    if found.manifest.bank is None:
        return found if generator is None else generator
    bank = bank_of_package(found)
    return bank if generator is None else bank.attach_generator(generator)


def _read_generator(path: Path, program: AdaptedProgram) -> Generator | None:
    """Return the generator that was saved to ``path``, whose ``program`` was read; None for a program alone.

    Raises CheckpointError where the spec beside the program cannot be read.
    """
    stored = read_sidecar(path, GENERATION_SPEC_FILE)
    if stored is None:
        return None
    try:
        spec = facts_of(stored, program.adaptation.inputs(program).names, outputs=output_names(program))
        return make_generator(program, spec)
    except Exception as error:  # transformers raises many types for a broken config
        why = str(error) if isinstance(error, UnsafeFile) else describe_error(error)
        raise CheckpointError(
            f"{printable_path(path)}: what it says of generation cannot be read: {why}. Save it again from the model"
        ) from error
