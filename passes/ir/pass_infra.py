"""What a pass is: a frozen dataclass with its options as fields, a result with a count, and a runner that checks it.

There are two kinds, by what they are applied to. A :class:`Pass` takes an exported program and returns a new one; the
program it was given stays as it was. A :class:`GraphPass` takes an ``fx.Graph`` that the caller owns, and may change it
in place or return another. Either may break what it works on in between, never on exit: whoever calls a pass, alone or
through a :class:`PassManager`, gets a result that was checked, or a :class:`PassError` that blames the pass by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Generic, TypeVar

from torch import fx
from torch.export import ExportedProgram

from adaptc.errors import AdaptcError, PassError
from adaptc.passes.ir.exclusive import exclusive

T = TypeVar("T")
#: names of passes, and how much each changed
Trail = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class PassResult(Generic[T]):
    """``output``: the program or the graph. ``count`` sites or nodes changed; ``notes`` say why others were not;
    ``data`` is the pass's own report. ``trail`` names the passes it went through, with their counts."""

    output: T
    count: int
    notes: tuple[str, ...] = ()
    data: Any = None
    trail: Trail = ()

    @property
    def program(self) -> T:
        """The output, of a pass on programs."""
        return self.output

    @property
    def graph(self) -> T:
        """The output, of a pass on graphs."""
        return self.output


@dataclass(frozen=True)
class PassBase(Generic[T]):
    """Subclasses set ``name`` and define ``apply``."""

    name: ClassVar[str] = ""

    def apply(self, subject: T) -> PassResult[T]:
        raise AssertionError(f"{type(self).__name__} must define apply()")

    @exclusive
    def __call__(self, subject: T) -> PassResult[T]:
        known = self.before(subject)
        result = self.apply(subject)
        try:
            self.check(known, result.output)
        except Exception as error:
            raise PassError(f"pass {self.name!r} left an invalid {self.kind}: {error}") from error
        return replace(result, trail=(*result.trail, (self.name, result.count)))

    #: what it works on, for messages
    kind: ClassVar[str] = "program"

    def before(self, subject: T) -> Any:
        """What :meth:`check` has to know of the subject as it was."""
        return None

    def check(self, before: Any, output: T) -> None:
        """Raises anything at all where the output is not valid."""

    def __str__(self) -> str:
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
        return f"{self.name}({shown})"


@dataclass(frozen=True)
class Pass(PassBase[ExportedProgram]):
    """A rewrite of a program. Afterwards its graph lints and the program validates."""

    def check(self, before: Any, output: ExportedProgram) -> None:
        output.graph.lint()
        output.validate()


@dataclass(frozen=True)
class GraphPass(PassBase[fx.Graph]):
    """A rewrite of a graph. Afterwards it lints, returns as many values as before and, but for passes that say
    otherwise, has all the inputs it had, in their order."""

    kind: ClassVar[str] = "graph"
    #: whether all inputs stay; further ones may come
    keeps_inputs: ClassVar[bool] = True

    def before(self, subject: fx.Graph) -> Any:
        return [n.name for n in subject.find_nodes(op="placeholder")], _results(subject)

    def check(self, before: Any, output: fx.Graph) -> None:
        output.lint()
        inputs, results = before
        have = [n.name for n in output.find_nodes(op="placeholder")]
        if self.keeps_inputs and [n for n in have if n in set(inputs)] != inputs:
            raise ValueError(f"inputs are lost: {[n for n in inputs if n not in have] or 'their order'}")
        if _results(output) != results:
            raise ValueError(f"it returns {_results(output)} values, and returned {results}")


def _results(graph: fx.Graph) -> int:
    values = graph.output_node().args[0]
    return len(values) if isinstance(values, (tuple, list)) else 1


@dataclass
class PassManager(Generic[T]):
    """Runs passes of one kind in order; ``observe`` is called after each with the pass and its result (dump, time,
    verify).

    ``results`` are those of the last run, and the ``data`` of the result it returns are theirs, in order. An error of a
    pass keeps its type and says which pass failed, and after which others; one that is no AdaptcError is a bug of the
    pass and becomes a PassError.
    """

    passes: Sequence[PassBase[T]]
    observe: Callable[[PassBase[T], PassResult[T]], None] | None = None
    results: list[PassResult[T]] = field(default_factory=list)

    @exclusive
    def __call__(self, subject: T) -> PassResult[T]:
        self.results = []
        done: list[str] = []
        for p in self.passes:
            try:
                result = p(subject)
            except Exception as error:
                where = f"(in pass {p.name!r}, after {', '.join(done) or 'no other pass'})"
                kind = type(error) if isinstance(error, AdaptcError) else PassError
                raise kind(f"{str(error) or repr(error)} {where}") from error
            done.append(p.name)
            self.results.append(result)
            if self.observe is not None:
                self.observe(p, result)
            subject = result.output
        return PassResult(
            subject,
            sum(r.count for r in self.results),
            tuple(note for r in self.results for note in r.notes),
            tuple(r.data for r in self.results),
            tuple(step for r in self.results for step in r.trail),
        )
