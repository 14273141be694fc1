"""Find the chains of repeated blocks of a graph: the layers of a transformer, whose values flow from one to the next.

Gradient checkpointing uses them. Takes the graph of a module to train, as ``ExportedProgram.module()`` gives it, fused
or not, and does not change it. Nodes that come from a capture have fake values in their meta.

There are two proposals, and each is verified on the graph. Of proposals that cover about as many nodes, the one with
more blocks is taken:
- structure: the longest stretch of nodes that repeats itself (``find_repeats``), cut where the fewest values are passed
  on. Names are not needed. A first or last block may do more than the others, as T5's first block computes a position
  bias.
- names: modules that are counted (``layers.0``, ``layers.1``, ...). They find blocks that differ, for example where
  only some are adapted.

Nodes that carry no gradient and come from no parameter (masks, rotary angles, sizes) are outside of all blocks. They
may run before any block that reads them, wherever they stand in the graph.

``find_repeats`` finds where a sequence repeats itself: stretches like abcabcabc, by their period.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from adaptc.passes.graph.module_paths import clean_path, module_paths_of
from adaptc.passes.graph.mutation import is_metadata_assert, is_pure, memory_groups, written_inputs
from adaptc.passes.protocol.regions import node_tag
from adaptc.torch_typing import is_list_or_tuple, shape_of

#: the number that stands for a free size, where only the order of magnitude matters
FREE_SIZE_GUESS = 64
#: the fraction of the best coverage from which on a proposal counts as equally good
NEAR_BEST = 0.9
#: how many periods are tried for a stretch of the graph, those that cover most of it first
MAX_PERIODS = 12
_NUMBERED_PATH = re.compile(r"^(?:(.*)\.)?\d+$")
_UNBACKED = re.compile(r"\bu\d+\b")

Block = tuple[fx.Node, ...]


@dataclass(frozen=True)
class BlockChain:
    """Consecutive blocks, each as its nodes in graph order; no node lies between two blocks."""

    blocks: tuple[Block, ...]


def find_block_chains(module: fx.GraphModule, non_aliasing: Collection[Any] = ()) -> list[BlockChain]:
    """Return the chains of a module's graph, in graph order; none where nothing is repeated.

    ``non_aliasing`` lists Python functions in the graph that are no ops and whose results share no memory with their
    inputs.
    """
    stream = _NodeStream(module, gradient_free_nodes(module, non_aliasing))
    proposed = [list(_chains_by_structure(stream, 0, len(stream.nodes))), _chains_by_names(stream)]
    coverage = [sum(bounds[-1] - bounds[0] for bounds in chains) for chains in proposed]
    candidates = [chains for chains, n in zip(proposed, coverage, strict=True) if n >= NEAR_BEST * max(coverage)]
    found = max(candidates, key=lambda chains: sum(map(len, chains)))
    return [BlockChain(tuple(tuple(stream.nodes[a:b]) for a, b in pairwise(bounds))) for bounds in sorted(found)]


def gradient_free_nodes(module: fx.GraphModule, non_aliasing: Collection[Any] = ()) -> set[fx.Node]:
    """Return the nodes computed from integers, sizes and buffers alone, in memory that nothing writes to.

    No gradient flows through them, and they may move to the front of the graph. ``non_aliasing`` is as for
    :func:`find_block_chains`.
    """
    found: set[fx.Node] = set()
    memory = memory_groups(module.graph, non_aliasing)
    written_memory = {memory[n] for node in module.graph.nodes for n in written_inputs(node)}
    for node in module.graph.nodes:
        if memory[node] in written_memory:
            continue
        if node.op == "placeholder":
            value = node.meta.get("val")
            fixed = not isinstance(value, Tensor) or not value.is_floating_point()
        elif node.op == "get_attr":
            fixed = not is_parameter(module, node)
        else:
            fixed = (is_pure(node) or is_metadata_assert(node)) and all(n in found for n in node.all_input_nodes)
        if fixed:
            found.add(node)
    return found


def is_parameter(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(operator.attrgetter(str(node.target))(module), nn.Parameter)


class _NodeStream:
    """The nodes that blocks are made of, and facts about each by its position."""

    def __init__(self, module: fx.GraphModule, gradient_free: Collection[fx.Node]) -> None:
        ops = ("call_function", "call_method")
        self.gradient_free = gradient_free
        self.nodes: list[fx.Node] = [n for n in module.graph.nodes if n.op in ops and n not in gradient_free]
        self.positions = {n: i for i, n in enumerate(self.nodes)}
        self.parameters = {n for n in module.graph.find_nodes(op="get_attr") if is_parameter(module, n)}
        self.module_paths = module_paths_of([*dict(module.named_parameters()), *dict(module.named_buffers())])
        end = len(self.nodes)
        #: the position at which each value is read for the last time; the end for values that the graph returns
        self.last_reads = [
            max((self.positions.get(u, end) for u in n.users), default=i) for i, n in enumerate(self.nodes)
        ]
        codes: dict[Any, int] = {}
        self.labels = [codes.setdefault(self._label(n), len(codes)) for n in self.nodes]

    def _label(self, node: fx.Node) -> Any:
        """Return a label that is equal for nodes that do the same in different blocks.

        It ignores numbers among the arguments, since dropout rates may differ. It ignores sizes inside adapters, since
        ranks may differ.
        """
        value = None if node_tag(node) else _value_type(node)
        return node.target, self._argument_kinds(node.args), self._argument_kinds(tuple(node.kwargs.values())), value

    def _argument_kinds(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "parameter" if value in self.parameters else "context" if value in self.gradient_free else "value"
        if is_list_or_tuple(value):
            return tuple(map(self._argument_kinds, value))
        return cast(Any, type(value))  # of anything

    def passed_on(self, start: int, end: int) -> list[int]:
        """Return the positions of the values that nodes ``start`` to ``end`` make and later nodes read."""
        return [i for i in range(start, end) if self.last_reads[i] >= end]

    def passing_cost(self, start: int, end: int) -> tuple[int, int]:
        """Return how many values are passed on to later nodes, and about how many elements these have."""
        passed = self.passed_on(start, end)
        return len(passed), sum(_element_count(self.nodes[i]) for i in passed)

    def is_chain(self, bounds: Sequence[int]) -> bool:
        """Return whether blocks are a chain.

        Each must have parameters. Each but the last must pass a value of the chain's shape and dtype to the next one.
        It may pass on at most half of the elements that it makes.
        """
        if len(bounds) < 3:
            return False
        common_types: set[Any] | None = None
        for block, next_block in zip_longest(pairwise(bounds), pairwise(bounds[1:])):
            if not any(n in self.parameters for i in range(*block) for n in self.nodes[i].all_input_nodes):
                return False
            if next_block is None:
                break
            handed = [self.nodes[i] for i in self.passed_on(*block)]
            readers = set(self.nodes[slice(*next_block)])
            types = {_value_type(n) for n in handed if not readers.isdisjoint(n.users)}
            common_types = types if common_types is None else common_types & types
            made = sum(_element_count(self.nodes[i]) for i in range(*block))
            if not common_types or 2 * self.passing_cost(*block)[1] > made:
                return False
        return True


def _chains_by_structure(stream: _NodeStream, start: int, end: int) -> Iterator[list[int]]:
    """Yield the bounds of the chains in a stretch: those before the best one, the best one, and those after it."""
    for first, period, length in find_repeats(stream.labels[start:end], MAX_PERIODS):
        chain = _cut_blocks(stream, start + first, period, start + first + length, start, end)
        if chain is not None:
            yield from _chains_by_structure(stream, start, chain[0])
            yield chain
            yield from _chains_by_structure(stream, chain[-1], end)
            return


def _cut_blocks(stream: _NodeStream, first: int, period: int, last: int, start: int, end: int) -> list[int] | None:
    """Return the bounds of the blocks in a stretch that repeats itself; None where no cut gives a chain.

    The cut is where the fewest values are passed on. Among equal cuts, the one with the most blocks is taken.
    """
    phases: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
    for phase in range(period):
        bounds = list(range(first + phase, last + 1, period))
        if len(bounds) > 2:
            middle = (len(bounds) - 1) // 2
            phases[stream.passing_cost(*bounds[middle : middle + 2])].append(bounds)
    for cost in sorted(phases):
        extended = [_extend_bounds(stream, bounds, start, end) for bounds in phases[cost]]
        chains = [bounds for bounds in extended if stream.is_chain(bounds)]
        if chains:
            return min(chains, key=lambda bounds: (-len(bounds), bounds[-1] - bounds[0], bounds))
    return None


def _extend_bounds(stream: _NodeStream, bounds: list[int], start: int, end: int) -> list[int]:
    """Return ``bounds`` with one more block at either end, where one does the same as the others and something more."""
    labels, period = stream.labels, bounds[1] - bounds[0]
    template, extra_nodes = labels[bounds[0] : bounds[1]], period // 2 + 8
    first_length = _match_length(labels[max(start, bounds[0] - period - extra_nodes) : bounds[0]][::-1], template[::-1])
    last_length = _match_length(labels[bounds[-1] : min(end, bounds[-1] + period + extra_nodes)], template)
    return [
        *([] if first_length is None else [bounds[0] - first_length]),
        *bounds,
        *([] if last_length is None else [bounds[-1] + last_length]),
    ]


def _match_length(labels: Sequence[int], template: Sequence[int]) -> int | None:
    """Return how many labels it takes to meet all of ``template`` in order; None where they do not."""
    matched = 0
    for i, label in enumerate(labels):
        matched += label == template[matched]
        if matched == len(template):
            return i + 1
    return None


def _chains_by_names(stream: _NodeStream) -> list[list[int]]:
    """Return the bounds of the chains that counted module paths propose and that hold in the graph.

    Chains that cover most nodes come first. One that overlaps an earlier one is left out.
    """
    spans: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for i, node in enumerate(stream.nodes):
        for path in _stack_paths(node, stream.module_paths):
            counted = _NUMBERED_PATH.match(path)
            if counted is not None:
                first = spans[counted[1] or ""].setdefault(path, (i, i))[0]
                spans[counted[1] or ""][path] = (first, i + 1)
    proposed: list[list[int]] = []
    for blocks in spans.values():
        ordered = sorted(blocks.values())
        if all(a[1] <= b[0] for a, b in pairwise(ordered)):
            bounds = [*(a for a, _ in ordered), ordered[-1][1]]
            if stream.is_chain(bounds):
                proposed.append(bounds)
    chosen: list[list[int]] = []
    for bounds in sorted(proposed, key=lambda b: b[0] - b[-1]):
        if all(bounds[-1] <= other[0] or other[-1] <= bounds[0] for other in chosen):
            chosen.append(bounds)
    return chosen


def _stack_paths(node: fx.Node, module_paths: Collection[str]) -> list[str]:
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return [clean_path(entry[0], module_paths) for entry in stack.values()]


def _value_type(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return cast(Any, type(value))  # of anything
    return _UNBACKED.sub("u", str(tuple(value.shape))), value.dtype


def _element_count(node: fx.Node) -> int:
    value, count = node.meta.get("val"), 1
    if not isinstance(value, Tensor):
        return 0
    for size in shape_of(value):
        count *= size if isinstance(size, int) else FREE_SIZE_GUESS
    return count


class RepeatedStretch(NamedTuple):
    """A stretch of ``length`` items from ``first`` on, that repeats itself after ``period`` items.

    ``sequence[i] == sequence[i + period]`` where both lie in it.
    """

    first: int
    period: int
    length: int

    @property
    def covered(self) -> int:
        """Return the number of items in whole periods."""
        return self.length // self.period * self.period


def find_repeats(sequence: Sequence[int], limit: int) -> list[RepeatedStretch]:
    """Return the runs of at least two periods that cover most of ``sequence``, at most ``limit`` of them.

    Of each period, only the longest run counts. The best comes first; of equal ones, that of the shorter period.
    """
    items, found, min_matches = torch.tensor(sequence, dtype=torch.int64), list[RepeatedStretch](), 0
    for period in range(1, len(sequence) // 2 + 1):
        same = items[period:] == items[:-period]
        # This cheap count rules out most periods.
        if int(same.sum()) < max(period, min_matches):
            continue
        breaks = torch.cat([torch.tensor([-1]), (~same).nonzero()[:, 0], torch.tensor([len(same)])])
        lengths = breaks.diff() - 1
        longest = int(lengths.argmax())
        run = RepeatedStretch(int(breaks[longest]) + 1, period, int(lengths[longest]) + period)
        if run.length >= 2 * period:
            found.append(run)
            # A period with fewer matches cannot cover half as much as this one.
            min_matches = max(min_matches, run.covered // 4)
    return sorted(found, key=lambda run: (-run.covered, run.period))[:limit]
