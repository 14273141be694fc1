"""Load a package as what it holds: a generator over compiled code, a bank that generates, or any other program.

The files in the package that ``adaptc.package`` wrote say which of these it is. A saved generator is a program like any
other, with a JSON text beside it in its file: the model's config, its generation config, and the layout of its cache.
"""

from __future__ import annotations

from pathlib import Path

from adaptc.errors import CheckpointError
from adaptc.generation.description import NAME, facts_of, understood
from adaptc.generation.generator import Generator
from adaptc.generation.generator_bank import GeneratorBank
from adaptc.generation.kinds import generator_of
from adaptc.packages.manifest import Contents
from adaptc.packages.package_bank import PackagedBank
from adaptc.packages.package_report import PackageReport
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.passes.graph.subprogram import outputs_of
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.progress import stage
from adaptc.safe_pt2.archive import read_beside
from adaptc.safe_pt2.refusal import UnsafeFile, reason, shown_path


def load_generation(path: Path) -> Generator | PackagedProgram | PackagedBank | GeneratorBank:
    """Return the generator, or the bank that generates, in a package; the package itself where it generates nothing.

    Raises the errors of :class:`PackagedProgram`. Facts that cannot be read raise before any code is loaded.
    """
    with stage(f"reading the package {path.name}"):
        found = PackagedProgram(path, understood)
    held = found if found.manifest.bank is None else PackagedBank(found)
    if found.understood is None:
        return held
    made = generator_of(found, found.understood)
    return GeneratorBank(made, held) if isinstance(held, PackagedBank) else made


def report_of(path: Path) -> PackageReport:
    """Return the report of a package file without loading its code. Raises the errors of :class:`PackagedProgram`."""

    def notes(contents: Contents) -> list[str]:
        facts = understood(contents)
        return [] if facts is None else facts.notes()

    return PackageReport.read(path, notes)


def generator_in(path: Path, program: AdaptedProgram) -> Generator | None:
    """Return the generator that was saved to ``path``, whose ``program`` was read; None for a program alone.

    Raises CheckpointError where the facts beside the program cannot be read.
    """
    stored = read_beside(path, NAME)
    if stored is None:
        return None
    try:
        facts = facts_of(stored, program.adaptation.inputs(program).names, outputs=outputs_of(program))
        return generator_of(program, facts)
    except Exception as error:  # transformers raises many types for a broken config
        why = str(error) if isinstance(error, UnsafeFile) else reason(error)
        raise CheckpointError(
            f"{shown_path(path)}: what it says of generation cannot be read: {why}. Save it again from the model"
        ) from error
