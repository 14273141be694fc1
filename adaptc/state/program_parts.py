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
from adaptc.passes.graph.graph_lock import on_graphs
from adaptc.passes.graph.subprogram import part_of
from adaptc.passes.graph.torch_caches import forget_code
from adaptc.passes.protocol.regions import node_tag
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.dynamo_boundary import outside
from adaptc.runtime.executor import Arguments, Executor
from adaptc.state.bound import Bound
from adaptc.state.core import ProgramCore


@dataclass(frozen=True)
class ProgramPart:
    """A callable of some of a program's outputs, by name, and the names of the inputs that it takes. ``binding``: the
    adapter that it keeps, None where it keeps none."""

    run: Callable[..., dict[str, Tensor]]
    inputs: Collection[str]
    binding: Any = None


def pinned_parts(
    program: ProgramCore | Bound, parts: Mapping[str, Sequence[str]], scale: Any = None
) -> dict[str, ProgramPart]:
    """Return a callable for each entry of ``parts`` (name -> names of outputs), all pinned to the adapter of this
    moment.

    ``scale``: the ``adapter_scale`` of their calls. Raises ConfigError for a name that is not an output.
    """
    return _parts(*program.pinned_to(scale), parts)


def parts_with(
    program: ProgramCore, binding: Binding, state: Mapping[str, Tensor], parts: Mapping[str, Sequence[str]]
) -> dict[str, ProgramPart]:
    """Return a callable for each entry of ``parts``, pinned to ``binding`` and to the caller's own ``state``.

    ``state``: FQN -> a buffer that calls write to, in place of the program's. Raises ConfigError for a name that is not
    an output.
    """
    return _parts(program, program.executor(), binding, state, parts)


def codes_of(program: ProgramCore, parts: Mapping[str, Sequence[str]]) -> list[Executor]:
    """Return the code of each of ``parts``, made now where it was not made before."""
    anchor = program.executor()
    return [_executor(program, anchor, tuple(outputs)) for outputs in parts.values()]


def _parts(
    runs: ProgramCore,
    anchor: Executor,
    reads: Binding,
    state: Mapping[str, Tensor],
    parts: Mapping[str, Sequence[str]],
) -> dict[str, ProgramPart]:
    return {name: _pinned(_executor(runs, anchor, tuple(outputs)), reads, state) for name, outputs in parts.items()}


def _pinned(executor: Executor, reads: Binding, state: Mapping[str, Tensor]) -> ProgramPart:
    own = {n: t for n, t in state.items() if n in executor.base}
    arguments = executor.own_arguments(reads, own)
    # A partial of one function for all parts: torch keeps each function that its compilers leave alone, and a
    # closure would keep executor and arguments alive for as long.
    return ProgramPart(partial(outside(_called), executor, arguments), frozenset(executor.inputs.names), reads)


def _called(executor: Executor, arguments: Arguments, **kwargs: Any) -> dict[str, Tensor]:
    return executor(arguments, (), kwargs)


def _executor(runs: ProgramCore, anchor: Executor, outputs: tuple[str, ...]) -> Executor:
    """Return the code of the part with ``outputs``, remembered beside ``anchor``, the code of the whole program."""
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
