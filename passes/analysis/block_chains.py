"""Find the chains of repeated blocks of a graph: the layers of a transformer, whose values flow from one to the next.

Gradient checkpointing uses them. Takes the graph of a module to train, as ``ExportedProgram.module()`` gives it, fused
or not, and does not change it. Nodes that come from a capture have fake values in their meta.

There are two proposals, and each is verified on the graph. Of proposals that cover about as many nodes, the one with
more blocks is taken:
- structure: the longest stretch of nodes that repeats itself (``repeats``), cut where the fewest values are passed on.
  Names are not needed. A first or last block may do more than the others, as T5's first block computes a position bias.
- names: modules that are counted (``layers.0``, ``layers.1``, ...). They find blocks that differ, for example where
  only some are adapted.

Nodes that carry no gradient and come from no parameter (masks, rotary angles, sizes) are outside of all blocks. They
may run before any block that reads them, wherever they stand in the graph.

``repeats`` finds where a sequence repeats itself: stretches like abcabcabc, by their period.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from adaptc.passes.graph.module_paths import clean_path, owners
from adaptc.passes.graph.mutation import is_metadata_assert, memory_groups, pure, written
from adaptc.passes.protocol.regions import node_tag

#: the number that stands for a free size, where only the order of magnitude matters
FREE = 64
#: the fraction of the best coverage from which on a proposal counts as equally good
NEARLY = 0.9
#: how many periods are tried for a stretch of the graph, those that cover most of it first
TRIED = 12
_COUNTED = re.compile(r"^(?:(.*)\.)?\d+$")
_UNBACKED = re.compile(r"\bu\d+\b")

Block = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Chain:
    """Consecutive blocks, each as its nodes in graph order; no node lies between two blocks."""

    blocks: tuple[Block, ...]


def find_chains(module: fx.GraphModule, fresh: Collection[Any] = ()) -> list[Chain]:
    """Return the chains of a module's graph, in graph order; none where nothing is repeated.

    ``fresh`` lists Python functions in the graph that are no ops and whose results share no memory with their inputs.
    """
    stream = _Stream(module, context(module, fresh))
    proposed = [list(_by_structure(stream, 0, len(stream.nodes))), _by_names(stream)]
    covered = [sum(bounds[-1] - bounds[0] for bounds in chains) for chains in proposed]
    good = [chains for chains, n in zip(proposed, covered, strict=True) if n >= NEARLY * max(covered)]
    found = max(good, key=lambda chains: sum(map(len, chains)))
    return [Chain(tuple(tuple(stream.nodes[a:b]) for a, b in pairwise(bounds))) for bounds in sorted(found)]


def context(module: fx.GraphModule, fresh: Collection[Any] = ()) -> set[fx.Node]:
    """Return the nodes computed from integers, sizes and buffers alone, in memory that nothing writes to.

    No gradient flows through them, and they may move to the front of the graph. ``fresh`` is as for
    :func:`find_chains`.
    """
    found: set[fx.Node] = set()
    memory = memory_groups(module.graph, fresh)
    dirty = {memory[n] for node in module.graph.nodes for n in written(node)}
    for node in module.graph.nodes:
        if memory[node] in dirty:
            continue
        if node.op == "placeholder":
            value = node.meta.get("val")
            fixed = not isinstance(value, Tensor) or not value.is_floating_point()
        elif node.op == "get_attr":
            fixed = not is_parameter(module, node)
        else:
            fixed = (pure(node) or is_metadata_assert(node)) and all(n in found for n in node.all_input_nodes)
        if fixed:
            found.add(node)
    return found


def is_parameter(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(operator.attrgetter(str(node.target))(module), nn.Parameter)


class _Stream:
    """The nodes that blocks are made of, and facts about each by its position."""

    def __init__(self, module: fx.GraphModule, outside: Collection[fx.Node]) -> None:
        ops = ("call_function", "call_method")
        self.outside = outside
        self.nodes: list[fx.Node] = [n for n in module.graph.nodes if n.op in ops and n not in outside]
        self.at = {n: i for i, n in enumerate(self.nodes)}
        self.parameters = {n for n in module.graph.find_nodes(op="get_attr") if is_parameter(module, n)}
        self.known = owners([*dict(module.named_parameters()), *dict(module.named_buffers())])
        end = len(self.nodes)
        #: the position at which each value is read for the last time; the end for values that the graph returns
        self.last = [max((self.at.get(u, end) for u in n.users), default=i) for i, n in enumerate(self.nodes)]
        codes: dict[Any, int] = {}
        self.labels = [codes.setdefault(self._label(n), len(codes)) for n in self.nodes]

    def _label(self, node: fx.Node) -> Any:
        """Return a label that is equal for nodes that do the same in different blocks.

        It ignores numbers among the arguments, since dropout rates may differ. It ignores sizes inside adapters, since
        ranks may differ.
        """
        value = None if node_tag(node) else _type(node)
        return node.target, self._kinds(node.args), self._kinds(tuple(node.kwargs.values())), value

    def _kinds(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "parameter" if value in self.parameters else "context" if value in self.outside else "value"
        if isinstance(value, (list, tuple)):
            return tuple(map(self._kinds, value))
        return type(value)

    def handed_on(self, start: int, end: int) -> list[int]:
        """Return the positions of the values that nodes ``start`` to ``end`` make and later nodes read."""
        return [i for i in range(start, end) if self.last[i] >= end]

    def cost(self, start: int, end: int) -> tuple[int, int]:
        """Return how many values are passed on to later nodes, and about how many elements these have."""
        handed = self.handed_on(start, end)
        return len(handed), sum(_elements(self.nodes[i]) for i in handed)

    def holds(self, bounds: Sequence[int]) -> bool:
        """Return whether blocks are a chain.

        Each must have parameters. Each but the last must pass a value of the chain's shape and dtype to the next one.
        It may pass on at most half of the elements that it makes.
        """
        if len(bounds) < 3:
            return False
        links: set[Any] | None = None
        for block, behind in zip_longest(pairwise(bounds), pairwise(bounds[1:])):
            if not any(n in self.parameters for i in range(*block) for n in self.nodes[i].all_input_nodes):
                return False
            if behind is None:
                break
            handed = [self.nodes[i] for i in self.handed_on(*block)]
            readers = set(self.nodes[slice(*behind)])
            types = {_type(n) for n in handed if not readers.isdisjoint(n.users)}
            links = types if links is None else links & types
            made = sum(_elements(self.nodes[i]) for i in range(*block))
            if not links or 2 * self.cost(*block)[1] > made:
                return False
        return True


def _by_structure(stream: _Stream, start: int, end: int) -> Iterator[list[int]]:
    """Yield the bounds of the chains in a stretch: those before the best one, the best one, and those after it."""
    for first, period, length in repeats(stream.labels[start:end], TRIED):
        chain = _cut(stream, start + first, period, start + first + length, start, end)
        if chain is not None:
            yield from _by_structure(stream, start, chain[0])
            yield chain
            yield from _by_structure(stream, chain[-1], end)
            return


def _cut(stream: _Stream, first: int, period: int, last: int, start: int, end: int) -> list[int] | None:
    """Return the bounds of the blocks in a stretch that repeats itself; None where no cut gives a chain.

    The cut is where the fewest values are passed on. Among equal cuts, the one with the most blocks is taken.
    """
    phases: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
    for phase in range(period):
        bounds = list(range(first + phase, last + 1, period))
        if len(bounds) > 2:
            middle = (len(bounds) - 1) // 2
            phases[stream.cost(*bounds[middle : middle + 2])].append(bounds)
    for cost in sorted(phases):
        wider = [_extended(stream, bounds, start, end) for bounds in phases[cost]]
        good = [bounds for bounds in wider if stream.holds(bounds)]
        if good:
            return min(good, key=lambda bounds: (-len(bounds), bounds[-1] - bounds[0], bounds))
    return None


def _extended(stream: _Stream, bounds: list[int], start: int, end: int) -> list[int]:
    """Return ``bounds`` with one more block at either end, where one does the same as the others and something more."""
    labels, period = stream.labels, bounds[1] - bounds[0]
    template, spare = labels[bounds[0] : bounds[1]], period // 2 + 8
    before = _match(labels[max(start, bounds[0] - period - spare) : bounds[0]][::-1], template[::-1])
    behind = _match(labels[bounds[-1] : min(end, bounds[-1] + period + spare)], template)
    return [
        *([] if before is None else [bounds[0] - before]),
        *bounds,
        *([] if behind is None else [bounds[-1] + behind]),
    ]


def _match(labels: Sequence[int], template: Sequence[int]) -> int | None:
    """Return how many labels it takes to meet all of ``template`` in order; None where they do not."""
    met = 0
    for i, label in enumerate(labels):
        met += label == template[met]
        if met == len(template):
            return i + 1
    return None


def _by_names(stream: _Stream) -> list[list[int]]:
    """Return the bounds of the chains that counted module paths propose and that hold in the graph.

    Chains that cover most nodes come first. One that overlaps an earlier one is left out.
    """
    spans: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for i, node in enumerate(stream.nodes):
        for path in _paths(node, stream.known):
            counted = _COUNTED.match(path)
            if counted is not None:
                first = spans[counted[1] or ""].setdefault(path, (i, i))[0]
                spans[counted[1] or ""][path] = (first, i + 1)
    proposed = []
    for blocks in spans.values():
        ordered = sorted(blocks.values())
        if all(a[1] <= b[0] for a, b in pairwise(ordered)):
            bounds = [*(a for a, _ in ordered), ordered[-1][1]]
            if stream.holds(bounds):
                proposed.append(bounds)
    taken: list[list[int]] = []
    for bounds in sorted(proposed, key=lambda b: b[0] - b[-1]):
        if all(bounds[-1] <= other[0] or other[-1] <= bounds[0] for other in taken):
            taken.append(bounds)
    return taken


def _paths(node: fx.Node, known: Collection[str]) -> list[str]:
    stack = node.meta.get("nn_module_stack") or {}
    return [clean_path(entry[0], known) for entry in stack.values()]


def _type(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return type(value)
    return _UNBACKED.sub("u", str(tuple(value.shape))), value.dtype


def _elements(node: fx.Node) -> int:
    value, count = node.meta.get("val"), 1
    if not isinstance(value, Tensor):
        return 0
    for size in value.shape:
        count *= size if isinstance(size, int) else FREE
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


def repeats(sequence: Sequence[int], most: int) -> list[RepeatedStretch]:
    """Return the runs of at least two periods that cover most of ``sequence``, at most ``most`` of them.

    Of each period, only the longest run counts. The best comes first; of equal ones, that of the shorter period.
    """
    items, found, enough = torch.tensor(sequence, dtype=torch.int64), [], 0
    for period in range(1, len(sequence) // 2 + 1):
        same = items[period:] == items[:-period]
        # This cheap count rules out most periods.
        if int(same.sum()) < max(period, enough):
            continue
        breaks = torch.cat([torch.tensor([-1]), (~same).nonzero()[:, 0], torch.tensor([len(same)])])
        lengths = breaks.diff() - 1
        longest = int(lengths.argmax())
        run = RepeatedStretch(int(breaks[longest]) + 1, period, int(lengths[longest]) + period)
        if run.length >= 2 * period:
            found.append(run)
            # A period with fewer matches cannot cover half as much as this one.
            enough = max(enough, run.covered // 4)
    return sorted(found, key=lambda run: (-run.covered, run.period))[:most]
