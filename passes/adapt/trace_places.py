"""What a method makes of a place, as code for all sizes.

Before: a function of a method's, fakes of what it is called with. After: a graph of ATen alone, traced on sizes of
nobody's, so that one code serves every size that an adapter's slots may have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from adaptc.errors import MethodError
from adaptc.passes.ir.exclusive import exclusive
from adaptc.passes.ir.free_fakes import FreeFakes
from adaptc.passes.ir.ops import Op
from adaptc.passes.ir.program_method import Place, ProgramMethod


def values_of(nodes: Mapping[str, fx.Node]) -> dict[str, Tensor]:
    return {name: n.meta["val"] for name, n in nodes.items()}


def traced(
    method: ProgramMethod,
    place: Place,
    value: Tensor,
    slots: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    reads: Sequence[Tensor],
    op: Op,
    sums: Mapping[str, Sequence[str]],
) -> fx.Graph:
    """What a method makes of a place, as a graph whose placeholders are the value, the slots, what is given and
    what else the place reads. ``sums``: sizes that are the sum of others, by name; a slot's own is :data:`FREE`."""
    fakes = FreeFakes(sums)
    inputs = [fakes.like(value), *_own(fakes, method, slots, given, op), *(fakes.like(t) for t in reads)]

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        own, rest = dict(zip(slots, rest, strict=False)), rest[len(slots) :]
        more = dict(zip(given, rest, strict=False))
        return getattr(method, place.name)(x, own, more, *rest[len(more) :], **place.options)

    return code_of(function, fakes, inputs, f"{method.name}.{place.name}()")


def traced_opening(method: ProgramMethod, slots: Mapping[str, Tensor], op: Op) -> fx.Graph:
    """What a cache begins with, as a graph whose placeholders are the slots; what is given is zero."""
    fakes, name = FreeFakes(), method.opening()

    def function(*rest: Tensor) -> Tensor:
        given = {n: torch.zeros([1] * len(e.axes), dtype=e.dtype) for n, e in method.extras().items()}
        return getattr(method, name)(dict(zip(slots, rest, strict=True)), given)

    return code_of(function, fakes, _own(fakes, method, slots, {}, op), f"{method.name}.{name}()")


def traced_cached(method: ProgramMethod, slots: Mapping[str, Tensor], given: Mapping[str, Tensor], op: Op) -> fx.Graph:
    """``method.cached``, as a graph whose placeholders are the slots and what is given."""
    fakes = FreeFakes()

    def function(*rest: Tensor) -> Tensor:
        return method.cached(dict(zip(slots, rest, strict=False)), dict(zip(given, rest[len(slots) :], strict=True)))

    return code_of(function, fakes, _own(fakes, method, slots, given, op), f"{method.name}.cached()")


def _own(
    fakes: FreeFakes, method: ProgramMethod, slots: Mapping[str, Tensor], given: Mapping[str, Tensor], op: Op
) -> list[Tensor]:
    specs = method.slots(op)
    own = [fakes.like(t, specs[n].free, method.free_size(n)) for n, t in slots.items()]
    return [*own, *(fakes.like(t) for t in given.values())]


@exclusive
def code_of(function: Callable[..., Tensor], fakes: FreeFakes, inputs: Sequence[Tensor], what: str) -> fx.Graph:
    """A function of ``inputs``, of the mode of ``fakes``, as a graph without values; ``what`` it is, for errors."""
    # In the mode, so that an arange is one of its fakes and not a tensor.
    with fakes.mode:
        graph = make_fx(function, pre_dispatch=True)(*inputs).graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise MethodError(f"{what} may only use its arguments, but reads {node.target!r}")
        node.meta["val"] = None  # of an environment that is gone
    return graph
