"""Make the variants of a program's graph that calls run: canonicalized, siblings fused, frozen work hoisted.

A program has one graph. Up to four variants are made of it, each when it is first used, all equal up to rounding.
"wide", "stacked" and "apart" compute the base layers of a group of siblings in one matmul:

    plain     canonicalized and hoisted, nothing fused      where slots are trained, or nothing can be fused
    wide      adapters of a group stacked, in float32       for the fewest rows, where adapters are in half precision
    stacked   adapters of a group stacked, in their dtype   for few rows: the fewest operators
    apart     each adapter of a group on its own            for many rows: the fewest operations

A symbolic cost in the program's free sizes picks one of the last three, evaluated for the sizes of each call. Compiled
code uses the plain variant. So does every call where the limit on hoisted memory leaves no room for stacked adapters.

An adapter may leave sites of the program out. It has variants of a graph without these sites, which are named like
``stacked/1``: the kind, and the number of that graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, isfinite
from typing import Any

from torch import Tensor, dtype, fx

from adaptc.passes.graph.graph_lock import graph_locked_property, hold_graph_lock
from adaptc.passes.graph.lifted import copy_graph
from adaptc.passes.graph.pass_infra import GraphPass, PassManager, PassResult, PassTrail
from adaptc.passes.lower.choose_products import ChooseMatmuls, MatmulChoice, MatmulChoices
from adaptc.passes.lower.pack_products import MakePackedLayer, PackWeights
from adaptc.passes.optimize.add_in_place import AddInPlace
from adaptc.passes.optimize.canonicalize import Canonicalize
from adaptc.passes.optimize.direct_calls import CallDirectly
from adaptc.passes.optimize.emit_fused_siblings import StackedWeight
from adaptc.passes.optimize.fold_scales import FoldScales
from adaptc.passes.optimize.fuse_siblings import FuseSiblings
from adaptc.passes.optimize.hoist import stage_by_node
from adaptc.passes.optimize.sibling_cost import (
    BreakEven,
    SpeedByDtype,
    default_speed,
    find_break_even,
    float32_cost_difference,
    stacked_cost_difference,
)
from adaptc.passes.optimize.sibling_groups import SiblingGroup
from adaptc.passes.protocol.regions import bypass_regions
from adaptc.passes.train.choose_base_products import ChooseBaseMatmuls
from adaptc.runtime.hoisted_values import SharedValues, SplitGraph
from adaptc.runtime.mutated_buffers import written_placeholders
from adaptc.torch_modes import AUTOCAST_DEVICES

PLAIN, STACKED, APART, WIDE = "plain", "stacked", "apart", "wide"
#: how many graphs without some sites there may be, so that a program with adapters of any layers does not go on making
#: them
MAX_FEWER_SITES = 4


@dataclass(frozen=True)
class Fusion:
    """The counts of what was fused: ``layers`` in ``groups`` that read one tensor each, ``adapted`` with an adapter.

    Adapters of a group are stacked for up to ``rows`` rows. ``wide`` groups have adapters in half precision that are
    computed in float32 for up to ``wide_rows`` rows. On a GPU, ``kernels`` regions run as fused kernels, and ``others``
    says by site why its region does not.
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
                until = ""
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

    ``names`` are its lifted placeholders, in order. Of these, ``frozen_base`` are frozen for all bindings,
    ``frozen_slots`` within each binding, and the tensors of ``movable`` may be moved into a buffer. ``hoist_limit``
    bounds the bytes of hoisted values, None for any number. ``is_for_compiler`` says that a compiler gets the graph,
    not an interpreter. ``may_fuse`` lets siblings share matmuls. ``is_differentiable`` says that gradients flow through
    the graph. ``choose_matmul`` is that of :class:`ChooseMatmuls`, None to choose nothing. ``choose_trained`` is the
    pass that chooses for graphs that gradients flow through, None likewise. ``make_packed_layer`` is ``make`` of
    :class:`PackWeights`, None to pack nothing. ``speed_of_dtype`` gives the speed of adapter matmuls by dtype.
    """

    module: fx.GraphModule
    names: Sequence[str]
    frozen_base: Collection[str]
    frozen_slots: Collection[str]
    movable: Collection[str]
    hoist_limit: int | None = None
    is_for_compiler: bool = False
    may_fuse: bool = True
    is_differentiable: bool = False
    choose_matmul: Callable[[int, int, dtype], MatmulChoice] | None = None
    choose_trained: ChooseBaseMatmuls | None = None
    make_packed_layer: MakePackedLayer | None = None
    speed_of_dtype: SpeedByDtype = default_speed

    @cached_property
    def user_inputs(self) -> list[str]:
        """Return the names of the placeholders for the user's inputs."""
        lifted = set(self.names)
        return [n.name for n in self.module.graph.find_nodes(op="placeholder") if n.name not in lifted]

    @property
    def frozen_stages(self) -> list[Collection[str]]:
        return [self.frozen_base, self.frozen_slots]


@dataclass(frozen=True, eq=False)
class GraphVariant:
    """A variant of a graph, ready to be called.

    ``split`` is the graph with its hoisted part taken out. Calls run ``code`` by the callable ``call``.
    ``sibling_packs`` are the inputs that packing adds. ``shared_values`` holds values hoisted from the base, for all
    bindings; None where nothing is hoisted. ``trail`` are the passes it went through, ``matmuls`` the matmuls chosen
    for its base.
    """

    split: SplitGraph
    code: fx.GraphModule
    sibling_packs: tuple[StackedWeight, ...]
    call: Callable[..., Any]
    shared_values: SharedValues | None
    trail: PassTrail
    matmuls: MatmulChoices


class GraphVariants:
    """The variants of one lifted graph, each made when it is first asked for."""

    def __init__(self, source: LiftedGraph) -> None:
        self.source = source
        #: sites left out -> the number of the graph without them, and its variants
        self._fewer_sites: dict[frozenset[str], tuple[int, GraphVariants]] = {}
        self._adds_graphs = True
        self.is_fused = source.may_fuse and self.may_fuse(source.is_for_compiler)
        values = (n.meta.get("val") for n in source.module.graph.find_nodes(op="placeholder"))
        devices = {v.device.type for v in values if isinstance(v, Tensor)}
        #: device types whose autocast would change what the graph computes
        self.autocast_devices = tuple(devices & set(AUTOCAST_DEVICES))
        #: whether there are variants without the sites that an adapter leaves out. It was not tried on a GPU, where
        #: callers may have captured a CUDA graph of the calls
        self.leaves_sites_out = devices <= {"cpu", "meta"}
        self._variants: dict[str, GraphVariant] = {}

    def may_fuse(self, compiled: bool) -> bool:
        """Return whether siblings may share matmuls: not where a compiler gets the graph.

        On the CPU inductor fuses additions into their readers. Slices of a shared matmul are strided, which costs it
        more than the larger matmul saves. Measured: prefill took 1.16 of the base's time with fusing, 1.06 without.
        """
        return not compiled

    def get(self, variant_name: str) -> GraphVariant:
        """Return the variant ``variant_name``, made now if it was not."""
        kind, _, number = variant_name.partition("/")
        if number:
            return next(v for n, v in list(self._fewer_sites.values()) if n == int(number)).get(kind)
        found = self._variants.get(variant_name)
        if found is None:
            with hold_graph_lock():
                found = self._variants.get(variant_name)
                if found is None:
                    found = self._variants[variant_name] = self._make_variant(variant_name)
        return found

    def for_call(self, sizes: Mapping[str, int], without: frozenset[str]) -> str:
        """Return the variant that costs least in a call with these sizes and an adapter that leaves out the sites
        ``without``."""
        found = self._graph_without(without)
        if found is None:
            return self.cheapest_variant(sizes)
        number, variants = found
        return f"{variants.cheapest_variant(sizes)}/{number}"

    def for_warm_up(self, without: frozenset[str]) -> list[str]:
        """Return the variants that calls with an adapter may run which leaves out the sites ``without``.

        A graph without these sites is made even after :meth:`stop_adding_graphs`.
        """
        found = self._graph_without(without, is_warm_up=True)
        return self.variant_names if found is None else [f"{kind}/{found[0]}" for kind in found[1].variant_names]

    def stop_adding_graphs(self) -> None:
        """Let calls with adapters that leave other sites out run the whole graph from now on."""
        self._adds_graphs = False

    def _graph_without(self, without: frozenset[str], is_warm_up: bool = False) -> tuple[int, GraphVariants] | None:
        """Return the number of the graph without these sites and its variants, made now if they were not.

        None where all sites are used, or where there are as many such graphs as there may be. So a set of sites has one
        graph for good, and equal calls give equal bits.
        """
        found = self._fewer_sites.get(without)
        if found is not None or not without or not self.leaves_sites_out or not (self._adds_graphs or is_warm_up):
            return found
        with hold_graph_lock():
            if without not in self._fewer_sites and len(self._fewer_sites) < MAX_FEWER_SITES:
                graph = copy_graph(self.source.module.graph)
                bypass_regions(graph, without)
                module = fx.GraphModule(self.source.module, graph)
                made = type(self)(replace(self.source, module=module))
                self._fewer_sites[without] = len(self._fewer_sites) + 1, made
            return self._fewer_sites.get(without)

    @property
    def variant_names(self) -> list[str]:
        """Return the kinds of variants that calls may run, over all sizes of calls."""
        return [*([] if self._wide_crossing is None else [WIDE]), STACKED, APART] if self.is_fused else [PLAIN]

    def cheapest_variant(self, sizes: Mapping[str, int]) -> str:
        """Return the kind of variant that costs least in a call with these sizes (free size -> value)."""
        if not self.is_fused:
            return PLAIN
        if self._wide_crossing is not None and self._wide_crossing.prefers_first(sizes):
            return WIDE
        return STACKED if self._stacked_crossing.prefers_first(sizes) else APART

    def siblings(self, fqn_of: Mapping[str, str], variant_name: str) -> list[list[str]]:
        """Return, for each buffer of a variant, the FQNs of the weights that lie in it; ``fqn_of`` placeholders."""
        return [[fqn_of[m] for m in p.parameter_names] for p in self.get(variant_name).sibling_packs]

    def slots_and_written(self, is_slot: Sequence[bool], variant_name: str) -> tuple[set[int], set[int]]:
        """Return two sets of positions of a variant's inputs.

        The first are those of the adapter's tensors, among the inputs that a binding gives. The second are those that
        calls write to, among the user's inputs. ``is_slot`` says for each lifted input whether it is a slot.
        """
        variant = self.get(variant_name)
        bound = variant.split.slot_values([*is_slot, *(False for _ in variant.sibling_packs)])
        graph = variant.split.main.graph
        written, users = written_placeholders(graph), graph.find_nodes(op="placeholder")[len(bound) :]
        return {i for i, b in enumerate(bound) if b}, {i for i, n in enumerate(users) if n.name in written}

    @property
    def trails(self) -> dict[str, PassTrail]:
        """Return the passes that each variant made so far went through, by kind."""
        return {kind: v.trail for kind, v in self.made_variants()}

    @property
    def matmuls(self) -> dict[str, MatmulChoices]:
        """Return the matmuls chosen in each variant made so far, by kind."""
        return {kind: v.matmuls for kind, v in self.made_variants()}

    def made_variants(self) -> Iterator[tuple[str, GraphVariant]]:
        """Return the variants made so far, by name."""
        yield from list(self._variants.items())
        for number, fewer in list(self._fewer_sites.values()):
            yield from ((f"{kind}/{number}", v) for kind, v in fewer.made_variants())

    @graph_locked_property
    def fusion(self) -> Fusion:
        """Return what is fused, for the report."""
        if not self.is_fused:
            return Fusion()
        groups = self.sibling_groups
        layers = sum(len(g.layers) for g in groups)
        wide = sum(g.compute_dtype(in_float32=True) != g.adapter_dtype for g in groups)
        wide_rows = inf if self._wide_crossing is None else self._wide_crossing.rows
        return Fusion(
            len(groups),
            layers,
            sum(len(g.updates) for g in groups),
            self._stacked_crossing.rows,
            wide,
            wide_rows if wide else 0.0,
        )

    @graph_locked_property
    def _stacked_crossing(self) -> BreakEven:
        return find_break_even(self.sibling_groups, stacked_cost_difference, self.source.speed_of_dtype)

    @graph_locked_property
    def _wide_crossing(self) -> BreakEven | None:
        """Return where float32 adapters begin to cost more than half precision.

        None where no group has the choice of a dtype (``SiblingGroup.has_dtype_choice``).
        """
        return (
            find_break_even(self.sibling_groups, float32_cost_difference, self.source.speed_of_dtype)
            if any(g.has_dtype_choice for g in self.sibling_groups)
            else None
        )

    def cleaning_passes(self) -> list[GraphPass]:
        """Return the passes that clean the graph before variants are made of it."""
        return [Canonicalize(self.source.user_inputs, self.source.is_differentiable)]

    def fusing_passes(self, variant_name: str) -> list[GraphPass]:
        """Return the passes that make the fused variant ``variant_name`` of a cleaned graph. The last one fuses."""
        s = self.source
        return [
            FoldScales(s.frozen_stages),
            FuseSiblings(s.movable, s.frozen_stages, s.user_inputs, variant_name != APART, variant_name == WIDE),
        ]

    def calling_passes(self) -> list[GraphPass]:
        """Return the passes that make calls by an interpreter faster, for the part of a variant that calls run."""
        chosen = self.source.choose_trained
        return [AddInPlace(), *([] if chosen is None else [chosen]), CallDirectly()]

    @graph_locked_property
    def clean_result(self) -> PassResult[fx.Graph]:
        return PassManager(self.cleaning_passes())(copy_graph(self.source.module.graph))

    @graph_locked_property
    def sibling_groups(self) -> list[SiblingGroup]:
        """Return the groups of siblings that can be fused, as nodes of a copy of the graph."""
        *before, last = self.fusing_passes(APART)
        assert isinstance(last, FuseSiblings)
        return last.find_groups_in(PassManager(before)(copy_graph(self.clean_result.output)).output)

    def _make_variant(self, variant_name: str) -> GraphVariant:
        graph = copy_graph(self.clean_result.output)
        if variant_name == PLAIN:
            return self._hoist_variant(graph, (), ())
        if not self.sibling_groups:
            return self.get(PLAIN)
        before = {n.name for n in graph.nodes}
        done = PassManager(self.fusing_passes(variant_name))(graph)
        packs: tuple[StackedWeight, ...] = done.data[-1]
        made = self._hoist_variant(done.output, packs, done.trail)
        if self.source.hoist_limit is not None:
            stages = stage_by_node(
                done.output, [{*self.source.frozen_base, *(p.name for p in packs)}, self.source.frozen_slots]
            )
            new = {n.name for n in stages if n.op == "call_function" and n.name not in before}
            # A hoisted value keeps its name, as a placeholder; one that is still computed found no room in the limit.
            if new & {n.name for n in made.split.main.graph.nodes if n.op != "placeholder"}:
                return self.get(STACKED if variant_name == WIDE else PLAIN)
        return made

    def _hoist_variant(self, graph: fx.Graph, packs: tuple[StackedWeight, ...], trail: PassTrail) -> GraphVariant:
        s, names = self.source, [p.name for p in packs]
        module = fx.GraphModule(s.module, graph)
        split = SplitGraph(
            module, [*s.names, *names], {*s.frozen_base, *names}, s.frozen_slots, s.hoist_limit, s.is_for_compiler
        )
        called_graph, trail = split.main, (*self.clean_result.trail, *trail, *split.trail)
        products = MatmulChoices()
        passes = [] if s.is_for_compiler else self.calling_passes()
        if s.make_packed_layer is not None:
            passes = [PackWeights({*s.frozen_base, *names}, s.make_packed_layer), *passes]
        if s.choose_matmul is not None:
            passes = [ChooseMatmuls({*s.frozen_base, *names}, s.choose_matmul, s.is_for_compiler), *passes]
        if passes:
            bound = PassManager(passes)(copy_graph(split.main.graph))
            called_graph, trail = fx.GraphModule(split.main, bound.output), (*trail, *bound.trail)
            products = next((found for data in bound.data if (found := _choices_in(data))), products)
        # Not ``called_graph`` itself: while any thread traces, torch.fx has patched ``nn.Module.__call__`` for all
        # threads.
        return GraphVariant(
            split,
            called_graph,
            packs,
            called_graph.forward,
            SharedValues(split.stages[0]) if split.stages else None,
            trail,
            products,
        )


def _choices_in(data: Any) -> MatmulChoices | None:
    """Return the choices for the forward in what a pass found; None where it chose no matmuls."""
    if isinstance(data, dict):
        return next((MatmulChoices(choices, caption) for caption, choices in data.items()), None)
    return data if isinstance(data, MatmulChoices) else None


def read_sizes(flat: Sequence[Any], size_locations: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return free size -> its value in a call with the inputs ``flat``.

    ``size_locations`` maps a free size to the (flat input, axis) that has it.
    """
    return {name: flat[i].shape[axis] for name, (i, axis) in size_locations.items() if isinstance(flat[i], Tensor)}
