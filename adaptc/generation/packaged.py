"""Load a package as what it holds: a generator over compiled code, a bank that generates, or any other program.

The files in the package that ``adaptc.package`` wrote say which of these it is.
"""

from __future__ import annotations

from pathlib import Path

from adaptc.generation.bank import GeneratorBank
from adaptc.generation.generator import Generator
from adaptc.generation.kinds import generator_of
from adaptc.generation.package_files import understood
from adaptc.packages.bank import PackagedBank
from adaptc.packages.manifest import Contents
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.packages.report import PackageReport
from adaptc.progress import stage


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
