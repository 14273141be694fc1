"""Trace the functions of a program method into graphs that hold for all sizes.

Takes a function of a method and fake values of its arguments. The graph has ATen ops alone. It is traced with free
symbolic sizes, so one graph serves every size that an adapter's slots may have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from adaptc.errors import MethodError
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.symbolic_fakes import FreeSizeFakes
from adaptc.passes.protocol.program_method import ProgramMethod, ProgramValue


def fake_values_of(nodes: Mapping[str, fx.Node]) -> dict[str, Tensor]:
    return {name: n.meta["val"] for name, n in nodes.items()}


def trace_place(
    method: ProgramMethod,
    place: ProgramValue,
    value: Tensor,
    slots: Mapping[str, Tensor],
    extra_inputs: Mapping[str, Tensor],
    other_values: Sequence[Tensor],
    op: Op,
    sums: Mapping[str, Sequence[str]],
) -> fx.Graph:
    """Return the method's function for ``place`` as a graph.

    Its placeholders are the place's value, the slots, the inputs that the method adds (``given``), and what else the
    place reads. ``sums`` maps sizes that are the sum of others to these, by name; a slot's free size is called
    :data:`~adaptc.passes.protocol.program_method.TOKEN_COUNT_SIZE`.
    """
    fakes = FreeSizeFakes(sums)
    inputs = [
        fakes.fake_like(value),
        *_fake_method_inputs(fakes, method, slots, extra_inputs, op),
        *(fakes.fake_like(t) for t in other_values),
    ]

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        own, rest = dict(zip(slots, rest, strict=False)), rest[len(slots) :]
        more = dict(zip(extra_inputs, rest, strict=False))
        return getattr(method, place.name)(x, own, more, *rest[len(more) :], **place.constants)

    return trace_for_all_sizes(function, fakes, inputs, f"{method.name}.{place.name}()")


def trace_cache_prefix(method: ProgramMethod, slots: Mapping[str, Tensor], op: Op) -> fx.Graph:
    """Return the method's function for the beginning of a cache, as a graph whose placeholders are the slots.

    Inputs that the method adds to a program are zero.
    """
    fakes, name = FreeSizeFakes(), method.opening()

    def function(*rest: Tensor) -> Tensor:
        given = {n: torch.zeros([1] * len(e.axes), dtype=e.dtype) for n, e in method.extra_inputs.extras().items()}
        return getattr(method, name)(dict(zip(slots, rest, strict=True)), given)

    return trace_for_all_sizes(
        function, fakes, _fake_method_inputs(fakes, method, slots, {}, op), f"{method.name}.{name}()"
    )


def trace_kv_prefix(
    method: ProgramMethod, slots: Mapping[str, Tensor], extra_inputs: Mapping[str, Tensor], op: Op
) -> fx.Graph:
    """Return ``method.past_key_values`` as a graph.

    Its placeholders are the slots and the inputs that the method adds.
    """
    fakes = FreeSizeFakes()

    def function(*rest: Tensor) -> Tensor:
        return method.past_key_values(
            dict(zip(slots, rest, strict=False)), dict(zip(extra_inputs, rest[len(slots) :], strict=True))
        )

    return trace_for_all_sizes(
        function, fakes, _fake_method_inputs(fakes, method, slots, extra_inputs, op), f"{method.name}.past_key_values()"
    )


def _fake_method_inputs(
    fakes: FreeSizeFakes, method: ProgramMethod, slots: Mapping[str, Tensor], extra_inputs: Mapping[str, Tensor], op: Op
) -> list[Tensor]:
    specs = method.slots(op)
    own = [fakes.fake_like(t, specs[n].free, method.free_size(n)) for n, t in slots.items()]
    return [*own, *(fakes.fake_like(t) for t in extra_inputs.values())]


@with_graph_lock
def trace_for_all_sizes(
    function: Callable[..., Tensor], fakes: FreeSizeFakes, inputs: Sequence[Tensor], function_name: str
) -> fx.Graph:
    """Return ``function`` as a graph without values, traced on ``inputs``, which belong to the mode of ``fakes``.

    ``function_name`` names the function in errors. Raises MethodError where it reads anything but its arguments.
    """
    # In the mode, so that an arange is one of its fakes and not a tensor.
    with fakes.mode:
        graph = make_fx(function, pre_dispatch=True)(*inputs).graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise MethodError(f"{function_name} may only use its arguments, but reads {node.target!r}")
        node.meta["val"] = None  # its symbolic sizes belong to the shape environment of ``fakes`` alone
    return graph
