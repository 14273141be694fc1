"""A package that generates, known from the files that it carries.

Before: a file that ``adaptc.package`` wrote. After: of a step with its facts a :class:`Generator` over compiled code,
or a bank that generates; of any other program the package itself.
"""

from __future__ import annotations

from pathlib import Path

from adaptc.generation.bank import GeneratorBank
from adaptc.generation.generator import Generator
from adaptc.generation.kinds import generator_of
from adaptc.generation.package_files import understood
from adaptc.packages.bank import PackagedBank
from adaptc.packages.manifest import Contents
from adaptc.packages.report import PackageReport
from adaptc.packages.run import PackagedProgram
from adaptc.progress import stage


def load_generation(path: Path) -> Generator | PackagedProgram | PackagedBank | GeneratorBank:
    """Of a bank a bank. Raises as :class:`PackagedProgram` does, before any code is loaded also for what the package
    says of generation."""
    with stage(f"reading the package {path.name}"):
        found = PackagedProgram(path, understood)
    held = found if found.manifest.bank is None else PackagedBank(found)
    if found.understood is None:
        return held
    made = generator_of(found, found.understood)
    return GeneratorBank(made, held) if isinstance(held, PackagedBank) else made


def report_of(path: Path) -> PackageReport:
    """The report of a file, none of whose code is loaded. Raises as :class:`PackagedProgram` does."""

    def notes(contents: Contents) -> list[str]:
        facts = understood(contents)
        return [] if facts is None else facts.notes()

    return PackageReport.read(path, notes)
