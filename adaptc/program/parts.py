"""Calls of a part of a program: of some of its outputs, with the inputs that these need.

Before: a program, or what is bound to one, whose outputs are a dict of tensors. After: callables of its parts that keep
the adapter that is current now, all of them the same one. Code of a part is made when it is first called and is
remembered with the program's own; of state, adapter and base a part has none of its own, so nothing but the program
needs to be swapped, merged or saved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.passes.ir.exclusive import on_graphs
from adaptc.passes.ir.forgetting import forget_code
from adaptc.passes.ir.part import part_of
from adaptc.passes.ir.regions import node_tag
from adaptc.program.bound import Bound
from adaptc.program.core import ProgramCore
from adaptc.runtime.call_inputs import Inputs
from adaptc.runtime.executor import Arguments, Executor
from adaptc.runtime.outside_compilers import outside


@dataclass(frozen=True)
class Part:
    """A callable of some outputs, by name, and the names of the inputs that it takes. ``binding``: the adapter that it
    keeps, where it keeps one."""

    run: Callable[..., dict[str, Tensor]]
    inputs: Collection[str]
    binding: Any = None


def pinned_parts(
    program: ProgramCore | Bound, parts: Mapping[str, Sequence[str]], scale: Any = None
) -> dict[str, Part]:
    """One for each of ``parts``, which are names of outputs. ``scale``: as ``adapter_scale`` of calls. Raises
    ConfigError for a name that is none."""
    return _parts(*program.pinned_to(scale), parts)


def parts_with(
    program: ProgramCore, binding: Binding, state: Mapping[str, Tensor], parts: Mapping[str, Sequence[str]]
) -> dict[str, Part]:
    """The same of a binding, and of a caller's own ``state``: by FQN what calls write to."""
    return _parts(program, program.executor(), binding, state, parts)


def codes_of(program: ProgramCore, parts: Mapping[str, Sequence[str]]) -> list[Executor]:
    """What computes them, made now if it was not."""
    anchor = program.executor()
    return [_executor(program, anchor, tuple(outputs)) for outputs in parts.values()]


def _parts(
    runs: ProgramCore,
    anchor: Executor,
    reads: Binding,
    state: Mapping[str, Tensor],
    parts: Mapping[str, Sequence[str]],
) -> dict[str, Part]:
    return {name: _pinned(_executor(runs, anchor, tuple(outputs)), reads, state) for name, outputs in parts.items()}


def _pinned(executor: Executor, reads: Binding, state: Mapping[str, Tensor]) -> Part:
    own = {n: t for n, t in state.items() if n in executor.base}
    arguments = executor.own_arguments(reads, own)
    # No function of its own: torch remembers those that its compilers leave alone, with all that they hold.
    return Part(partial(outside(_called), executor, arguments), frozenset(executor.inputs.names), reads)


def _called(executor: Executor, arguments: Arguments, **kwargs: Any) -> dict[str, Tensor]:
    return executor(arguments, (), kwargs)


def _executor(runs: ProgramCore, anchor: Executor, outputs: tuple[str, ...]) -> Executor:
    """The code of one part, beside that of the whole."""
    known = runs.memory.parts.setdefault(anchor, {})
    made = known.get(outputs)
    if made is None:
        with on_graphs():
            made = known.get(outputs)
            if made is None:
                made = known[outputs] = _made(runs, anchor, outputs)
    return made


def _made(runs: ProgramCore, anchor: Executor, outputs: tuple[str, ...]) -> Executor:
    forget_code()
    part = part_of(runs.snapshot(), outputs)
    tags = [tag for node in part.graph.nodes if (tag := node_tag(node)) is not None]
    sites = {tag["site"] for tag in tags}
    attachments = [a for a in anchor.attachments if a.id in sites]
    return Executor(part, attachments, anchor.ops, anchor.options, Inputs.of(part, {}), False, anchor.base)
