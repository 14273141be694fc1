"""Load a package as what it holds: a generator over compiled code, a bank that generates, or any other program.

The files in the package that ``adaptc.package`` wrote say which of these it is. A saved generator is a program like any
other, with a JSON text beside it in its file: the model's config, its generation config, and the layout of its cache.
"""

from __future__ import annotations

from pathlib import Path

from adaptc.archives.archive import read_sidecar
from adaptc.archives.refusal import UnsafeFile, describe_error, printable_path
from adaptc.bank.bank import Bank
from adaptc.errors import CheckpointError
from adaptc.generation.compile_generation import make_generator
from adaptc.generation.description import SPEC_FILE, facts_of, spec_from_package
from adaptc.generation.generator import Generator
from adaptc.packages.manifest import Contents
from adaptc.packages.package_placement import bank_of_package
from adaptc.packages.package_report import PackageReport
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.passes.graph.subprogram import output_names
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.progress import stage


def load_package_contents(path: Path) -> Generator | PackagedProgram | Bank:
    """Return the generator, or the bank that generates, in a package; the package itself where it generates nothing.

    Raises the errors of :class:`PackagedProgram`. A spec that cannot be read raises before any code is loaded.
    """
    with stage(f"reading the package {path.name}"):
        found = PackagedProgram(path, spec_from_package)
    generator = None if found.parsed_contents is None else make_generator(found, found.parsed_contents)
    if found.manifest.bank is None:
        return found if generator is None else generator
    bank = bank_of_package(found)
    return bank if generator is None else bank.attach_generator(generator)


def read_package_report(path: Path) -> PackageReport:
    """Return the report of a package file without loading its code. Raises the errors of :class:`PackagedProgram`."""

    def notes(contents: Contents) -> list[str]:
        spec = spec_from_package(contents)
        return [] if spec is None else spec.notes()

    return PackageReport.read(path, notes)


def read_generator(path: Path, program: AdaptedProgram) -> Generator | None:
    """Return the generator that was saved to ``path``, whose ``program`` was read; None for a program alone.

    Raises CheckpointError where the spec beside the program cannot be read.
    """
    stored = read_sidecar(path, SPEC_FILE)
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
