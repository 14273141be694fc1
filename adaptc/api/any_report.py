"""Report on anything that holds adapters: a program, a package, a generator, or a bank of any of them."""

from __future__ import annotations

from typing import overload

from adaptc.bank.bank import Bank
from adaptc.bank.bank_report import BankReport
from adaptc.errors import AdaptcError
from adaptc.generation.generator_bank import GeneratorBank
from adaptc.packages.package_bank import PackagedBank
from adaptc.packages.package_report import PackageReport
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import adds_notes, check_program
from adaptc.reports.coverage import CoverageReport
from adaptc.value_types import validates_options


@overload
def report(program: AdaptedProgram, *, changes: bool = False) -> CoverageReport: ...


@overload
def report(program: PackagedProgram, *, changes: bool = False) -> PackageReport: ...


@overload
def report(program: Bank | GeneratorBank | PackagedBank, *, changes: bool = False) -> BankReport: ...


@adds_notes
@validates_options("changes")
def report(
    program: AdaptedProgram | PackagedProgram | Bank | GeneratorBank | PackagedBank, *, changes: bool = False
) -> CoverageReport | PackageReport | BankReport:
    """Return a report of what was adapted, what was left out, and the adapter's norms; it prints as tables.

    ``changes`` also gives how much the adapter changes each weight, relative to the weight's own norm. That computes
    every adapted weight once, one at a time.

    A package's report has its file, its adapter, the room for others and its inputs, as a
    :class:`~adaptc.packages.package_report.PackageReport`. Its weights are in compiled code, so ``changes`` raises
    AdaptcError. A bank's report has its adapters, as :meth:`Bank.report` gives them, and ``changes`` raises
    AdaptcError, too.
    """
    if isinstance(program, (Bank, GeneratorBank, PackagedBank)):
        if changes:
            raise AdaptcError("changes=True is of one adapter: ask the program, swapped to each of the bank's")
        return program.report()
    if isinstance(program, PackagedProgram):
        if changes:
            raise AdaptcError(
                "changes=True compares with the base weights, which a package has in its compiled code alone; ask the "
                "program that it was made from"
            )
        return PackageReport.from_package(program)
    check_program(program, "report")
    return CoverageReport.from_program(program, changes)
