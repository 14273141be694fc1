"""Make the variants of a program's graph that calls run: canonicalized, siblings fused, frozen work hoisted.

A program has one graph. Up to four variants are made of it, each when it is first used, all equal up to rounding.
"wide", "stacked" and "apart" compute the base layers of a group of siblings in one matmul:

    plain     canonicalized and hoisted, nothing fused      where slots are trained, or nothing can be fused
    wide      adapters of a group stacked, in float32       for the fewest rows, where adapters are in half precision
    stacked   adapters of a group stacked, in their dtype   for few rows: the fewest operators
    apart     each adapter of a group on its own            for many rows: the fewest operations

A symbolic cost in the program's free sizes picks one of the last three, evaluated for the sizes of each call. Compiled
code uses the plain variant. So does every call where the limit on hoisted memory leaves no room for stacked adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isfinite
from typing import Any

from torch import Tensor, dtype, fx

from adaptc.passes.graph.graph_lock import exclusive_property, on_graphs
from adaptc.passes.graph.lifted import copy_graph
from adaptc.passes.graph.pass_infra import GraphPass, PassManager, PassResult, Trail
from adaptc.passes.lower.choose_products import ChooseProducts, MatmulChoice, Products
from adaptc.passes.lower.pack_products import Make, PackProducts
from adaptc.passes.optimize.add_in_place import AddInPlace
from adaptc.passes.optimize.canonicalize import Canonicalize
from adaptc.passes.optimize.direct_calls import BindCalls
from adaptc.passes.optimize.emit_fused_siblings import Pack
from adaptc.passes.optimize.fold_scales import FoldScales
from adaptc.passes.optimize.fuse_siblings import FuseSiblings
from adaptc.passes.optimize.hoist import stages_of
from adaptc.passes.optimize.sibling_cost import Crossing, Speeds, crossing, speed, stacking, widening
from adaptc.passes.optimize.sibling_groups import Group
from adaptc.runtime.hoisted_values import Shared, SplitGraph
from adaptc.torch_modes import AUTOCAST_DEVICES

PLAIN, STACKED, APART, WIDE = "plain", "stacked", "apart", "wide"


@dataclass(frozen=True)
class Fusion:
    """The counts of what was fused: ``layers`` in ``groups`` that read one tensor each, ``adapted`` with an adapter.

    Adapters of a group are stacked for up to ``rows`` rows. ``wide`` groups have adapters in half precision that are
    computed in float32 for up to ``wide_rows`` rows. On a GPU, ``kernels`` regions run as fused kernels. There
    ``others`` says by site why its region does not, and layers are grouped above ``rows`` rows.
    """

    groups: int = 0
    layers: int = 0
    adapted: int = 0
    rows: float = 0.0
    wide: int = 0
    wide_rows: float = 0.0
    kernels: int = 0
    others: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        if self.groups:
            adapters = f", {self.adapted} with an adapter" if self.adapted else ""
            until = ""
            if adapters and isfinite(self.rows):
                until = f" (stacked for up to {self.rows:.0f} rows)" if self.rows >= 1 else " (each on its own)"
            if self.kernels:
                until = f" (above {self.rows:.0f} rows)"
            lines.append(f"fused: {self.layers} layers in {self.groups} products{adapters}{until}")
        if self.wide:
            why = "the processor does not multiply their type"
            if isfinite(self.wide_rows):
                why = f"for up to {self.wide_rows:.0f} rows, where products of half precision take longer"
            lines.append(f"adapters in half precision: computed in float32 in {self.wide} products ({why})")
        if self.kernels:
            lines.append(f"fused kernels: {self.kernels} regions")
        reasons = Counter(self.others.values())
        lines += [f"no fused kernel for {count}: {why}" for why, count in reasons.most_common()]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class LiftedGraph:
    """A lifted graph that is about to be called, and which of its inputs are frozen.

    ``names`` are its lifted placeholders, in order. Of these, ``base`` are frozen for all bindings, ``slots`` within
    each binding, and the tensors of ``packable`` may be moved into a buffer. ``limit`` bounds the bytes of hoisted
    values, None for any number. ``compiled`` says that a compiler gets the graph, not an interpreter. ``fuse`` lets
    siblings share matmuls. ``differentiable`` says that gradients flow through the graph. ``choose`` is that of
    :class:`ChooseProducts`, None to choose nothing. ``pack`` is ``make`` of :class:`PackProducts`, None to pack
    nothing. ``speeds`` gives the speed of adapter matmuls by dtype.
    """

    module: fx.GraphModule
    names: Sequence[str]
    base: Collection[str]
    slots: Collection[str]
    packable: Collection[str]
    limit: int | None = None
    compiled: bool = False
    fuse: bool = True
    differentiable: bool = False
    choose: Callable[[int, int, dtype], MatmulChoice] | None = None
    pack: Make | None = None
    speeds: Speeds = speed

    @cached_property
    def users(self) -> list[str]:
        """Return the names of the placeholders for the user's inputs."""
        lifted = set(self.names)
        return [n.name for n in self.module.graph.find_nodes(op="placeholder") if n.name not in lifted]

    @property
    def stages(self) -> list[Collection[str]]:
        return [self.base, self.slots]


@dataclass(frozen=True, eq=False)
class GraphVariant:
    """A variant of a graph, ready to be called.

    ``split`` is the graph with its hoisted part taken out. Calls run ``code`` by the callable ``call``. ``packs`` are
    the inputs that packing adds. ``shared`` holds values hoisted from the base, for all bindings; None where nothing
    is hoisted. ``trail`` are the passes it went through, ``products`` the matmuls chosen for its base.
    """

    split: SplitGraph
    code: fx.GraphModule
    packs: tuple[Pack, ...]
    call: Callable[..., Any]
    shared: Shared | None
    trail: Trail
    products: Products


class GraphVariants:
    """The variants of one lifted graph, each made when it is first asked for."""

    def __init__(self, source: LiftedGraph) -> None:
        self.source = source
        self.fuses = source.fuse and self.may_fuse(source.compiled)
        values = (n.meta.get("val") for n in source.module.graph.find_nodes(op="placeholder"))
        #: device types whose autocast would change what the graph computes
        self.devices = tuple({v.device.type for v in values if isinstance(v, Tensor)} & set(AUTOCAST_DEVICES))
        self._variants: dict[str, GraphVariant] = {}

    def may_fuse(self, compiled: bool) -> bool:
        """Return whether siblings may share matmuls: not where a compiler gets the graph.

        On the CPU inductor fuses additions into their readers. Slices of a shared matmul are strided, which costs it
        more than the larger matmul saves. Measured: prefill took 1.16 of the base's time with fusing, 1.06 without.
        """
        return not compiled

    def get(self, kind: str) -> GraphVariant:
        """Return the variant ``kind``, made now if it was not."""
        found = self._variants.get(kind)
        if found is None:
            with on_graphs():
                found = self._variants.get(kind)
                if found is None:
                    found = self._variants[kind] = self._make(kind)
        return found

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of variants that calls may run, over all sizes of calls."""
        return [*([] if self._wide is None else [WIDE]), STACKED, APART] if self.fuses else [PLAIN]

    def kind(self, sizes: Mapping[str, int]) -> str:
        """Return the kind of variant that costs least in a call with these sizes (free size -> value)."""
        if not self.fuses:
            return PLAIN
        if self._wide is not None and self._wide.below(sizes):
            return WIDE
        return STACKED if self._stacked.below(sizes) else APART

    @property
    def trails(self) -> dict[str, Trail]:
        """Return the passes that each variant made so far went through, by kind."""
        return {kind: v.trail for kind, v in self._variants.items()}

    @property
    def products(self) -> dict[str, Products]:
        """Return the matmuls chosen in each variant made so far, by kind."""
        return {kind: v.products for kind, v in self._variants.items()}

    @exclusive_property
    def fusion(self) -> Fusion:
        """Return what is fused, for the report."""
        if not self.fuses:
            return Fusion()
        groups = self.groups
        layers = sum(len(g.members) for g in groups)
        wide = sum(g.computed(wide=True) != g.adapters for g in groups)
        wide_rows = inf if self._wide is None else self._wide.rows
        return Fusion(
            len(groups),
            layers,
            sum(len(g.updates) for g in groups),
            self._stacked.rows,
            wide,
            wide_rows if wide else 0.0,
        )

    @exclusive_property
    def _stacked(self) -> Crossing:
        return crossing(self.groups, stacking, self.source.speeds)

    @exclusive_property
    def _wide(self) -> Crossing | None:
        """Return where float32 adapters begin to cost more than half precision.

        None where no group has the choice of a dtype (``Group.narrow``).
        """
        return crossing(self.groups, widening, self.source.speeds) if any(g.narrow for g in self.groups) else None

    def cleaning(self) -> list[GraphPass]:
        """Return the passes that clean the graph before variants are made of it."""
        return [Canonicalize(self.source.users, self.source.differentiable)]

    def fusing(self, kind: str) -> list[GraphPass]:
        """Return the passes that make the fused variant ``kind`` of a cleaned graph. The last one fuses."""
        s = self.source
        return [FoldScales(s.stages), FuseSiblings(s.packable, s.stages, s.users, kind != APART, kind == WIDE)]

    @exclusive_property
    def cleaned(self) -> PassResult[fx.Graph]:
        return PassManager(self.cleaning())(copy_graph(self.source.module.graph))

    @exclusive_property
    def groups(self) -> list[Group]:
        """Return the groups of siblings that can be fused, as nodes of a copy of the graph."""
        *before, last = self.fusing(APART)
        assert isinstance(last, FuseSiblings)
        return last.groups(PassManager(before)(copy_graph(self.cleaned.output)).output)

    def _make(self, kind: str) -> GraphVariant:
        graph = copy_graph(self.cleaned.output)
        if kind == PLAIN:
            return self._variant(graph, (), ())
        if not self.groups:
            return self.get(PLAIN)
        before = {n.name for n in graph.nodes}
        done = PassManager(self.fusing(kind))(graph)
        packs: tuple[Pack, ...] = done.data[-1]
        made = self._variant(done.output, packs, done.trail)
        if self.source.limit is not None:
            stages = stages_of(done.output, [{*self.source.base, *(p.name for p in packs)}, self.source.slots])
            new = {n.name for n in stages if n.op == "call_function" and n.name not in before}
            # A hoisted value keeps its name, as a placeholder; one that is still computed found no room in the limit.
            if new & {n.name for n in made.split.main.graph.nodes if n.op != "placeholder"}:
                return self.get(STACKED if kind == WIDE else PLAIN)
        return made

    def _variant(self, graph: fx.Graph, packs: tuple[Pack, ...], trail: Trail) -> GraphVariant:
        s, names = self.source, [p.name for p in packs]
        module = fx.GraphModule(s.module, graph)
        split = SplitGraph(module, [*s.names, *names], {*s.base, *names}, s.slots, s.limit, s.compiled)
        run, trail = split.main, (*self.cleaned.trail, *trail, *split.trail)
        products = Products()
        passes: list[GraphPass] = [] if s.compiled else [AddInPlace(), BindCalls()]
        if s.pack is not None:
            passes = [PackProducts({*s.base, *names}, s.pack), *passes]
        if s.choose is not None:
            passes = [ChooseProducts({*s.base, *names}, s.choose, s.compiled), *passes]
        if passes:
            bound = PassManager(passes)(copy_graph(split.main.graph))
            run, trail = fx.GraphModule(split.main, bound.output), (*trail, *bound.trail)
            products = bound.data[0] or products
        # Not ``run`` itself: while any thread traces, torch.fx has patched ``nn.Module.__call__`` for all threads.
        return GraphVariant(
            split, run, packs, run.forward, Shared(split.stages[0]) if split.stages else None, trail, products
        )


def sizes_of(flat: Sequence[Any], where: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return free size -> its value in a call with the inputs ``flat``.

    ``where`` maps a free size to the (flat input, axis) that has it.
    """
    return {name: flat[i].shape[axis] for name, (i, axis) in where.items() if isinstance(flat[i], Tensor)}
