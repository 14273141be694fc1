"""Call a part of a program: some of its outputs, computed from the inputs that these need.

The program, or what is bound to one, has a dict of tensors as its outputs. The parts made at once all keep the adapter
that is current then. The code of a part is made when it is first needed, and the program remembers it beside its own. A
part has no state, adapter or base of its own, so only the program needs to be swapped, merged or saved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.subprogram import extract_subprogram
from adaptc.passes.graph.torch_caches import drop_dead_code
from adaptc.passes.protocol.regions import node_tag
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.dynamo_boundary import not_traced
from adaptc.runtime.executor import Arguments, Executor
from adaptc.state.bound import BoundProgram
from adaptc.state.core import ProgramCore


@dataclass(frozen=True)
class ProgramPart:
    """A callable of some of a program's outputs, by name, and the names of the inputs that it takes. ``binding``: the
    adapter that it keeps, None where it keeps none."""

    run: Callable[..., dict[str, Tensor]]
    inputs: Collection[str]
    binding: Any = None


def pin_parts(program: ProgramCore | BoundProgram, parts: Mapping[str, Sequence[str]]) -> dict[str, ProgramPart]:
    """Return a callable for each entry of ``parts`` (name -> names of outputs), all pinned to the adapter of this
    moment.

    Raises ConfigError for a name that is not an output.
    """
    return _make_parts(*program.snapshot_executor(), parts)


def bind_parts(
    program: ProgramCore, binding: Binding, state: Mapping[str, Tensor], parts: Mapping[str, Sequence[str]]
) -> dict[str, ProgramPart]:
    """Return a callable for each entry of ``parts``, pinned to ``binding`` and to the caller's own ``state``.

    ``state``: FQN -> a buffer that calls write to, in place of the program's. Raises ConfigError for a name that is not
    an output.
    """
    return _make_parts(program, program.executor(), binding, state, parts)


def executors_of_parts(program: ProgramCore, parts: Mapping[str, Sequence[str]]) -> list[Executor]:
    """Return the code of each of ``parts``, made now where it was not made before."""
    anchor = program.executor()
    return [_part_executor(program, anchor, tuple(outputs)) for outputs in parts.values()]


def _make_parts(
    program: ProgramCore,
    whole_executor: Executor,
    binding: Binding,
    state: Mapping[str, Tensor],
    parts: Mapping[str, Sequence[str]],
) -> dict[str, ProgramPart]:
    return {
        name: _pin_part(_part_executor(program, whole_executor, tuple(outputs)), binding, state)
        for name, outputs in parts.items()
    }


def _pin_part(executor: Executor, binding: Binding, state: Mapping[str, Tensor]) -> ProgramPart:
    own = {n: t for n, t in state.items() if n in executor.base}
    arguments = executor.arguments_with_state(binding, own)
    # A partial of one function for all parts: torch keeps each function that its compilers leave alone, and a
    # closure would keep executor and arguments alive for as long.
    return ProgramPart(partial(not_traced(_call_part), executor, arguments), frozenset(executor.inputs.names), binding)


def _call_part(executor: Executor, arguments: Arguments, **kwargs: Any) -> dict[str, Tensor]:
    return executor(arguments, (), kwargs)


def _part_executor(program: ProgramCore, whole_executor: Executor, outputs: tuple[str, ...]) -> Executor:
    """Return the code of the part with ``outputs``, remembered beside ``whole_executor``, the code of the whole
    program."""
    known = program.run_state.part_executors.setdefault(whole_executor, {})
    made = known.get(outputs)
    if made is None:
        with hold_graph_lock():
            made = known.get(outputs)
            if made is None:
                made = known[outputs] = _make_executor(program, whole_executor, outputs)
    return made


def _make_executor(program: ProgramCore, whole_executor: Executor, outputs: tuple[str, ...]) -> Executor:
    drop_dead_code()
    part = extract_subprogram(program.snapshot(), outputs)
    tags = [tag for node in part.graph.nodes if (tag := node_tag(node)) is not None]
    sites = {tag["site"] for tag in tags}
    attachments = [a for a in whole_executor.attachments if a.id in sites]
    return Executor(
        part,
        attachments,
        whole_executor.ops,
        whole_executor.options,
        Inputs.from_program(part, {}),
        False,
        whole_executor.base,
    )
