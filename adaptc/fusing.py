"""Which code the calls of a program run through: its graph cleaned, its siblings fused, its frozen work taken out.

A program has one graph and up to three codes made of it, each on first use, all equal up to rounding:

    plain     canonicalize, hoist                           where adapter tensors are trained, or nothing can be fused
    stacked   and one product per group of siblings         for few rows: the fewest operators
    apart     and adapters of siblings each on their own    for many rows: the fewest operations

Which of the last two costs less is a symbolic expression in the program's own sizes, evaluated for the sizes of each
call. Code for a compiler is plain; so is all code where the limit on hoisted memory leaves no room for what fusing
stacks.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Any

from torch import Tensor, fx

from adaptc.hoisting import DEVICES, Code, Shared
from adaptc.passes._lifted import copy_graph
from adaptc.passes.bind_calls import bind_calls
from adaptc.passes.canonicalize import canonicalize
from adaptc.passes.fold_scales import fold_scales
from adaptc.passes.fuse_siblings import Group, Pack, find_groups, fuse
from adaptc.passes.hoist import stages_of
from adaptc.passes.sibling_cost import stacked_is_cheaper

PLAIN, STACKED, APART = "plain", "stacked", "apart"


@dataclass(frozen=True)
class Fusion:
    """What was fused: ``layers`` in ``groups`` that read one tensor each, ``adapted`` of them with an adapter; ``rows``
    up to which the adapters of a group are stacked. On a GPU ``kernels``: regions that run as fused kernels, ``others``
    why those of other sites do not, and ``rows`` up to which layers are not grouped."""

    groups: int = 0
    layers: int = 0
    adapted: int = 0
    rows: float = 0.0
    kernels: int = 0
    others: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        if self.groups:
            adapters = f", {self.adapted} with an adapter" if self.adapted else ""
            until = f" (stacked for up to {self.rows:.0f} rows)" if adapters and isfinite(self.rows) else ""
            if self.kernels:
                until = f" (above {self.rows:.0f} rows)"
            lines.append(f"fused: {self.layers} layers in {self.groups} products{adapters}{until}")
        if self.kernels:
            lines.append(f"fused kernels: {self.kernels} regions")
        reasons = Counter(self.others.values())
        lines += [f"no fused kernel for {count}: {why}" for why, count in reasons.most_common()]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Variant:
    """A code, the inputs that packing adds to it, its callable, and what it shares between bindings."""

    code: Code
    packs: tuple[Pack, ...]
    call: Callable[..., Any]
    shared: Shared | None


class Codes:
    """The codes of one lifted graph. ``names``: its lifted placeholders; ``base`` and ``slots``: those of them that are
    frozen; ``packable``: those whose tensors may be packed; ``fuse`` False: plain code alone; ``differentiable``:
    gradients flow through it."""

    def __init__(
        self,
        module: fx.GraphModule,
        names: Sequence[str],
        base: Collection[str],
        slots: Collection[str],
        packable: Collection[str],
        limit: int | None,
        compiled: bool,
        fuse: bool,
        differentiable: bool,
    ) -> None:
        self.module, self.names, self.base, self.slots = module, list(names), set(base), set(slots)
        self.packable, self.limit, self.compiled = packable, limit, compiled
        self.fuses, self.differentiable = fuse and self.may_fuse(compiled), differentiable
        placeholders = module.graph.find_nodes(op="placeholder")
        self.users = [n.name for n in placeholders if n.name not in set(names)]
        values = (n.meta.get("val") for n in placeholders)
        #: types of devices whose autocast would change what the graph computes
        self.devices = tuple({v.device.type for v in values if isinstance(v, Tensor)} & set(DEVICES))
        self._variants: dict[str, Variant] = {}
        self._lock = threading.RLock()

    def may_fuse(self, compiled: bool) -> bool:
        """Not for a compiler on the CPU: it fuses additions into what reads them, and pieces of one product, which are
        strided, cost it more than the larger product saves (measured: prefill 1.16 of the base, and 1.06 without)."""
        return not compiled

    def get(self, kind: str) -> Variant:
        """The code of a kind, made now if it was not."""
        found = self._variants.get(kind)
        if found is None:
            with self._lock:
                found = self._variants.get(kind)
                if found is None:
                    found = self._variants[kind] = self._make(kind)
        return found

    def kind(self, sizes: Mapping[str, int]) -> str:
        """The kind of code that costs least in a call with these sizes."""
        if not self.fuses:
            return PLAIN
        return STACKED if self._stacked(sizes) else APART

    @cached_property
    def fusion(self) -> Fusion:
        """For the report."""
        if not self.fuses:
            return Fusion()
        _, groups = self.grouped()
        _, rows = stacked_is_cheaper(groups)
        layers = sum(len(g.members) for g in groups)
        return Fusion(len(groups), layers, sum(len(g.updates) for g in groups), rows)

    @cached_property
    def _stacked(self) -> Callable[[Mapping[str, int]], bool]:
        return stacked_is_cheaper(self.grouped()[1])[0]

    @cached_property
    def clean(self) -> fx.Graph:
        """The graph all codes are made from."""
        graph = copy_graph(self.module.graph)
        canonicalize(graph, self.users, self.differentiable)
        return graph

    def grouped(self) -> tuple[fx.Graph, list[Group]]:
        """A copy of the clean graph, and what can be fused in it."""
        graph = copy_graph(self.clean)
        stages = [self.base, self.slots]
        fold_scales(graph, stages_of(graph, stages))
        return graph, find_groups(graph, self.packable, stages_of(graph, stages), updates=True)

    def _make(self, kind: str) -> Variant:
        if kind == PLAIN:
            return self._variant(copy_graph(self.clean), ())
        graph, groups = self.grouped()
        if not groups:
            return self.get(PLAIN)
        before = {n.name for n in graph.nodes}
        packs = tuple(self.write(graph, groups, kind))
        made = self._variant(graph, packs)
        if self.limit is not None:
            stages = stages_of(graph, [self.base | {p.name for p in packs}, self.slots])
            new = {n.name for n in stages if n.op == "call_function" and n.name not in before}
            if new & {n.name for n in made.code.main.graph.nodes}:
                return self.get(PLAIN)
        return made

    def write(self, graph: fx.Graph, groups: Sequence[Group], kind: str) -> Sequence[Pack]:
        """Fuse the groups of a graph."""
        return fuse(graph, groups, self.users, kind == STACKED)

    def _variant(self, graph: fx.Graph, packs: tuple[Pack, ...]) -> Variant:
        names = [p.name for p in packs]
        module = fx.GraphModule(self.module, graph)
        code = Code(module, [*self.names, *names], self.base | set(names), self.slots, self.limit, self.compiled)
        call: Callable[..., Any] = code.main
        if not self.compiled:
            bound = copy_graph(code.main.graph)
            bind_calls(bound)
            call = fx.GraphModule(code.main, bound)
        return Variant(code, packs, call, Shared(code.stages[0]) if code.stages else None)


def sizes_of(flat: Sequence[Any], where: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Free size -> its value in a call; ``where`` says which axis of which flat input has it."""
    return {name: flat[i].shape[axis] for name, (i, axis) in where.items() if isinstance(flat[i], Tensor)}
