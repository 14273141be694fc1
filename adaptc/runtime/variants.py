"""Which form of its graph the calls of a program run: cleaned, with siblings fused, with frozen work taken out.

A program has one graph. Up to four variants are made of it, each when it is first used, all equal up to rounding:

    plain     canonicalize, hoist                           where adapter tensors are trained, or nothing can be fused
    wide      and one product per group of siblings, of     for the fewest rows, where adapters are in half precision
              adapters in float32
    stacked   the same of adapters as they are              for few rows: the fewest operators
    apart     and adapters of siblings each on their own    for many rows: the fewest operations

Which of the last three costs least is a symbolic expression in the program's own sizes, evaluated for the sizes of each
call. A compiler gets the plain one; so does everybody where the limit on hoisted memory leaves no room for what
fusing stacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isfinite
from typing import Any

from torch import Tensor, dtype, fx

from adaptc.passes.ir.exclusive import exclusive_property, on_graphs
from adaptc.passes.ir.lifted import copy_graph
from adaptc.passes.ir.pass_infra import GraphPass, PassManager, PassResult, Trail
from adaptc.passes.lower.choose_products import Choice, ChooseProducts, Products
from adaptc.passes.lower.pack_products import Make, PackProducts
from adaptc.passes.optimize.add_in_place import AddInPlace
from adaptc.passes.optimize.bind_calls import BindCalls
from adaptc.passes.optimize.canonicalize import Canonicalize
from adaptc.passes.optimize.fold_scales import FoldScales
from adaptc.passes.optimize.fuse_siblings import FuseSiblings
from adaptc.passes.optimize.hoist import stages_of
from adaptc.passes.optimize.sibling_cost import Crossing, Speeds, crossing, speed, stacking, widening
from adaptc.passes.optimize.sibling_groups import Group
from adaptc.passes.optimize.write_siblings import Pack
from adaptc.runtime.held_values import Shared, SplitGraph
from adaptc.torch_modes import AUTOCAST_DEVICES

PLAIN, STACKED, APART, WIDE = "plain", "stacked", "apart", "wide"


@dataclass(frozen=True)
class Fusion:
    """What was fused: ``layers`` in ``groups`` that read one tensor each, ``adapted`` of them with an adapter; ``rows``
    up to which the adapters of a group are stacked; ``wide``: groups whose adapters, in half precision, are computed in
    float32 for up to ``wide_rows`` rows. On a GPU ``kernels``: regions that run as fused kernels, ``others``
    why those of other sites do not, and ``rows`` up to which layers are not grouped."""

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
    """A lifted graph that is about to be called, and what is frozen of its inputs.

    ``names``: its lifted placeholders, in order; ``base`` and ``slots``: those of them that are frozen, for all
    bindings or in each; ``packable``: those whose tensors may be moved into a buffer. ``limit``: bytes of memory for
    what is computed once. ``compiled``: a compiler gets it, and not an interpreter. ``fuse``: siblings may share
    products. ``differentiable``: gradients flow through it. ``choose``: see :class:`ChooseProducts`; ``pack``: see
    :class:`PackProducts`; ``speeds``: of the products of adapters.
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
    choose: Callable[[int, int, dtype], Choice] | None = None
    pack: Make | None = None
    speeds: Speeds = speed

    @cached_property
    def users(self) -> list[str]:
        """The user's placeholders."""
        lifted = set(self.names)
        return [n.name for n in self.module.graph.find_nodes(op="placeholder") if n.name not in lifted]

    @property
    def stages(self) -> list[Collection[str]]:
        return [self.base, self.slots]


@dataclass(frozen=True, eq=False)
class GraphVariant:
    """A graph and what was hoisted out of it, what calls of it run, as a graph and as a callable, the inputs that
    packing adds, what it shares between bindings, the passes it went through, and the products that were chosen for its
    base."""

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
        #: types of devices whose autocast would change what the graph computes
        self.devices = tuple({v.device.type for v in values if isinstance(v, Tensor)} & set(AUTOCAST_DEVICES))
        self._variants: dict[str, GraphVariant] = {}

    def may_fuse(self, compiled: bool) -> bool:
        """Not for a compiler on the CPU: it fuses additions into what reads them, and pieces of one product, which are
        strided, cost it more than the larger product saves (measured: prefill 1.16 of the base, and 1.06 without)."""
        return not compiled

    def get(self, kind: str) -> GraphVariant:
        """The variant of a kind, made now if it was not."""
        found = self._variants.get(kind)
        if found is None:
            with on_graphs():
                found = self._variants.get(kind)
                if found is None:
                    found = self._variants[kind] = self._make(kind)
        return found

    @property
    def kinds(self) -> list[str]:
        """Those that calls of some sizes take."""
        return [*([] if self._wide is None else [WIDE]), STACKED, APART] if self.fuses else [PLAIN]

    def kind(self, sizes: Mapping[str, int]) -> str:
        """The variant that costs least in a call with these sizes."""
        if not self.fuses:
            return PLAIN
        if self._wide is not None and self._wide.below(sizes):
            return WIDE
        return STACKED if self._stacked.below(sizes) else APART

    @property
    def trails(self) -> dict[str, Trail]:
        """The passes that each variant went through, by kind, of those that were made."""
        return {kind: v.trail for kind, v in self._variants.items()}

    @property
    def products(self) -> dict[str, Products]:
        """The products that were chosen in each variant, by kind, of those that were made."""
        return {kind: v.products for kind, v in self._variants.items()}

    @exclusive_property
    def fusion(self) -> Fusion:
        """For the report."""
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
        """None where all that may be computed in float32 always is."""
        return crossing(self.groups, widening, self.source.speeds) if any(g.narrow for g in self.groups) else None

    def cleaning(self) -> list[GraphPass]:
        """The passes that make of the graph what all variants are made from."""
        return [Canonicalize(self.source.users, self.source.differentiable)]

    def fusing(self, kind: str) -> list[GraphPass]:
        """The passes that make a fused variant of a cleaned graph. The last one fuses."""
        s = self.source
        return [FoldScales(s.stages), FuseSiblings(s.packable, s.stages, s.users, kind != APART, kind == WIDE)]

    @exclusive_property
    def cleaned(self) -> PassResult[fx.Graph]:
        return PassManager(self.cleaning())(copy_graph(self.source.module.graph))

    @exclusive_property
    def groups(self) -> list[Group]:
        """What can be fused, in a graph of its own."""
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
            # What was hoisted has its name still, as an input.
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
        # Not the module itself: while any thread traces, torch.fx has what calls modules patched for all of them.
        return GraphVariant(
            split, run, packs, run.forward, Shared(split.stages[0]) if split.stages else None, trail, products
        )


def sizes_of(flat: Sequence[Any], where: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Free size -> its value in a call; ``where`` says which axis of which flat input has it."""
    return {name: flat[i].shape[axis] for name, (i, axis) in where.items() if isinstance(flat[i], Tensor)}
