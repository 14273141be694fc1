"""Passes over exported programs: a frozen dataclass with options as fields, and a manager that checks each result.

A pass takes a program and returns a new one with a count of what it changed; the program it was given stays as it was.
It may break the program in between, never on exit: after each pass the manager runs ``graph.lint()`` and
``program.validate()`` and blames the pass by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch.export import ExportedProgram

from adaptc.errors import AdaptcError, PassError


@dataclass(frozen=True)
class PassResult:
    """``count`` sites or nodes changed; ``notes`` say why others were not; ``data`` is the pass's own report."""

    program: ExportedProgram
    count: int
    notes: tuple[str, ...] = ()
    data: Any = None


@dataclass(frozen=True)
class Pass:
    """One rewrite. Subclasses set ``name`` and define ``apply``."""

    name: ClassVar[str] = ""

    def apply(self, program: ExportedProgram) -> PassResult:
        raise AssertionError(f"{type(self).__name__} must define apply()")

    def __call__(self, program: ExportedProgram) -> PassResult:
        result = self.apply(program)
        check(result.program, self.name)
        return result

    def __str__(self) -> str:
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
        return f"{self.name}({shown})"


def check(program: ExportedProgram, name: str) -> None:
    """Raise :class:`PassError` naming the pass when ``program`` is not valid."""
    try:
        program.graph.lint()
        program.validate()
    except Exception as error:
        raise PassError(f"pass {name!r} left an invalid program: {error}") from error


@dataclass
class PassManager:
    """Runs passes in order; ``observe`` is called after each with the pass and its result (dump, time, verify).

    ``results`` are those of the last run. An error of a pass keeps its type and says which pass failed, and after which
    others; one that is no AdaptcError is a bug of the pass and becomes a PassError.
    """

    passes: Sequence[Pass]
    observe: Callable[[Pass, PassResult], None] | None = None
    results: list[PassResult] = field(default_factory=list)

    def __call__(self, program: ExportedProgram) -> PassResult:
        done: list[str] = []
        total, notes = 0, []
        self.results = []
        for p in self.passes:
            try:
                result = p(program)
            except Exception as error:
                where = f"(in pass {p.name!r}, after {', '.join(done) or 'no other pass'})"
                kind = type(error) if isinstance(error, AdaptcError) else PassError
                raise kind(f"{str(error) or repr(error)} {where}") from error
            done.append(p.name)
            self.results.append(result)
            if self.observe is not None:
                self.observe(p, result)
            program, total = result.program, total + result.count
            notes.extend(result.notes)
        return PassResult(program, total, tuple(notes))
