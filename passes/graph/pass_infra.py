"""Define passes: frozen dataclasses with their options as fields, results with a count, and a runner that checks them.

There are two kinds of pass. A :class:`Pass` takes an exported program and returns a new one; the given program stays as
it was. A :class:`GraphPass` takes an ``fx.Graph`` that the caller owns. It may change the graph in place or return
another. Both may break their subject in between, but not on exit. Whoever calls a pass, alone or through a
:class:`PassManager`, gets a checked result, or a :class:`PassError` that names the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Generic, TypeVar

from torch import fx
from torch.export import ExportedProgram

from adaptc.errors import AdaptcError, PassError
from adaptc.passes.graph.graph_lock import with_graph_lock

T = TypeVar("T")
#: names of passes, each with its count
PassTrail = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class PassResult(Generic[T]):
    """The result of a pass: ``output`` is the program or the graph.

    ``count`` is the number of sites or nodes changed, and ``notes`` say why others were not. ``data`` is the pass's own
    report. ``trail`` names the passes that the subject went through, with their counts.
    """

    output: T
    count: int
    notes: tuple[str, ...] = ()
    data: Any = None
    trail: PassTrail = ()

    @property
    def program(self) -> T:
        """Return the output of a pass on programs."""
        return self.output

    @property
    def graph(self) -> T:
        """Return the output of a pass on graphs."""
        return self.output


@dataclass(frozen=True)
class PassBase(Generic[T]):
    """The base class of passes. Subclasses set ``name`` and define ``apply``."""

    name: ClassVar[str] = ""

    def apply(self, subject: T) -> PassResult[T]:
        raise AssertionError(f"{type(self).__name__} must define apply()")

    @with_graph_lock
    def __call__(self, subject: T) -> PassResult[T]:
        facts = self.facts_for_check(subject)
        result = self.apply(subject)
        try:
            self.check(facts, result.output)
        except Exception as error:
            raise PassError(f"pass {self.name!r} left an invalid {self.subject_kind}: {error}") from error
        return replace(result, trail=(*result.trail, (self.name, result.count)))

    #: the kind of its subject, for messages
    subject_kind: ClassVar[str] = "program"

    def facts_for_check(self, subject: T) -> Any:
        """Return what :meth:`check` has to know of the unchanged subject."""
        return None

    def check(self, facts: Any, output: T) -> None:
        """Raise any exception where the output is not valid."""

    def __str__(self) -> str:
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
        return f"{self.name}({shown})"


@dataclass(frozen=True)
class Pass(PassBase[ExportedProgram]):
    """A rewrite of a program. Its output must have a graph that lints, and must validate."""

    def check(self, facts: Any, output: ExportedProgram) -> None:
        output.graph.lint()
        output.validate()


@dataclass(frozen=True)
class GraphPass(PassBase[fx.Graph]):
    """A rewrite of a graph.

    Its output must lint and return as many values as before. It must have all the inputs that it had, in their order,
    unless ``keeps_inputs`` is False.
    """

    subject_kind: ClassVar[str] = "graph"
    #: whether all inputs stay; further ones may be added
    keeps_inputs: ClassVar[bool] = True

    def facts_for_check(self, subject: fx.Graph) -> Any:
        return [n.name for n in subject.find_nodes(op="placeholder")], _output_count(subject)

    def check(self, facts: Any, output: fx.Graph) -> None:
        output.lint()
        inputs, results = facts
        new_inputs = [n.name for n in output.find_nodes(op="placeholder")]
        if self.keeps_inputs and [n for n in new_inputs if n in set(inputs)] != inputs:
            raise ValueError(f"inputs are lost: {[n for n in inputs if n not in new_inputs] or 'their order'}")
        if _output_count(output) != results:
            raise ValueError(f"it returns {_output_count(output)} values, and returned {results}")


def _output_count(graph: fx.Graph) -> int:
    values = graph.output_node().args[0]
    return len(values) if isinstance(values, (tuple, list)) else 1


@dataclass
class PassManager(Generic[T]):
    """A runner of passes of one kind, in order.

    It calls ``observe`` after each pass with the pass and its result, for dumps, timing or further checks. ``results``
    holds the results of the last run. The ``data`` of the returned result is the ``data`` of these, in order.

    An error of a pass keeps its type, and its message names the pass and the passes before it. An error that is no
    AdaptcError is a bug of the pass and becomes a PassError.
    """

    passes: Sequence[PassBase[T]]
    observe: Callable[[PassBase[T], PassResult[T]], None] | None = None
    results: list[PassResult[T]] = field(default_factory=list[PassResult[T]])

    @with_graph_lock
    def __call__(self, subject: T) -> PassResult[T]:
        self.results = []
        finished: list[str] = []
        for p in self.passes:
            try:
                result = p(subject)
            except Exception as error:
                where = f"(in pass {p.name!r}, after {', '.join(finished) or 'no other pass'})"
                kind = type(error) if isinstance(error, AdaptcError) else PassError
                raise kind(f"{str(error) or repr(error)} {where}") from error
            finished.append(p.name)
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
