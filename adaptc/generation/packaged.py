"""A package that generates, known from the files that it carries.

Before: a file that ``adaptc.package`` wrote. After: of a step with its facts a :class:`Generator` over compiled code;
of any other program the package itself.
"""

from __future__ import annotations

from pathlib import Path

from adaptc.generation.generator import Generator, generator_class
from adaptc.generation.package_files import understood
from adaptc.packages.bank import PackagedBank
from adaptc.packages.run import PackagedProgram


def load_generation(path: Path) -> Generator | PackagedProgram | PackagedBank:
    """Of a bank a bank. Raises as :class:`PackagedProgram` does, before any code is loaded also for what the package
    says of generation."""
    found = PackagedProgram(path, understood)
    if found.manifest.bank is not None:
        return PackagedBank(found)
    return found if found.understood is None else generator_class()(found, found.understood)
