"""Find the chains of repeated blocks of a graph: the layers of a transformer, whose values flow from one to the next.

For: gradient checkpointing. Before: the graph of a module to train, as ``ExportedProgram.module()`` gives it, fused or
not; values have fakes in their meta, as far as they come from a capture. After: nothing is changed.

Two proposals, each verified on the graph; of those that cover about as much of it, the one of more blocks is taken:
- structure: the longest stretch of nodes that repeats itself, cut where least is handed on (``repeats``); names are not
  needed. A first or last block may do more than the others, as the one of T5 that makes the position bias does.
- names: modules that are counted (``layers.0``, ``layers.1``, ...), for blocks that differ, such as those of which only
  some are adapted.

What holds no gradient and comes from no parameter (masks, rotary angles, sizes) is outside of all blocks: such nodes
may run before any block that reads them, wherever they were written.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

from torch import Tensor, fx, nn

from adaptc.passes.analysis.repeats import repeats
from adaptc.passes.ir.effects import is_metadata_assert, memory_groups, pure, written
from adaptc.passes.ir.module_paths import clean_path, owners
from adaptc.passes.ir.regions import node_tag

#: stands for a size that is free, where only the order of magnitude matters
FREE = 64
#: the part of the best coverage with which a proposal is as good
NEARLY = 0.9
#: how many periods are tried for a stretch of the graph, those that cover most of it first
TRIED = 12
_COUNTED = re.compile(r"^(?:(.*)\.)?\d+$")
_UNBACKED = re.compile(r"\bu\d+\b")

Block = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Chain:
    """Blocks one behind the other, each the nodes it computes, in graph order; nothing lies between them."""

    blocks: tuple[Block, ...]


def find_chains(module: fx.GraphModule, fresh: Collection[Any] = ()) -> list[Chain]:
    """The chains of a module's graph, in order; none where nothing is repeated. ``fresh``: functions that are no ops,
    and whose values are memory of their own."""
    stream = _Stream(module, context(module, fresh))
    proposed = [list(_by_structure(stream, 0, len(stream.nodes))), _by_names(stream)]
    covered = [sum(bounds[-1] - bounds[0] for bounds in chains) for chains in proposed]
    good = [chains for chains, n in zip(proposed, covered, strict=True) if n >= NEARLY * max(covered)]
    found = max(good, key=lambda chains: sum(map(len, chains)))
    return [Chain(tuple(tuple(stream.nodes[a:b]) for a, b in pairwise(bounds))) for bounds in sorted(found)]


def context(module: fx.GraphModule, fresh: Collection[Any] = ()) -> set[fx.Node]:
    """Nodes that follow from integers, sizes and buffers alone, in memory that nothing writes to: no gradient flows
    through them, and they may move to the front of the graph."""
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
    """The nodes that blocks are made of, and what is known of each by its position."""

    def __init__(self, module: fx.GraphModule, outside: Collection[fx.Node]) -> None:
        ops = ("call_function", "call_method")
        self.outside = outside
        self.nodes: list[fx.Node] = [n for n in module.graph.nodes if n.op in ops and n not in outside]
        self.at = {n: i for i, n in enumerate(self.nodes)}
        self.parameters = {n for n in module.graph.find_nodes(op="get_attr") if is_parameter(module, n)}
        self.known = owners([*dict(module.named_parameters()), *dict(module.named_buffers())])
        end = len(self.nodes)
        #: where each value is read for the last time; the end for what the graph returns
        self.last = [max((self.at.get(u, end) for u in n.users), default=i) for i, n in enumerate(self.nodes)]
        codes: dict[Any, int] = {}
        self.labels = [codes.setdefault(self._label(n), len(codes)) for n in self.nodes]

    def _label(self, node: fx.Node) -> Any:
        """Equal for nodes that do the same in different blocks. Numbers among the arguments may differ, as rates of
        dropout do, and sizes inside adapters, as ranks do."""
        value = None if node_tag(node) else _type(node)
        return node.target, self._kinds(node.args), self._kinds(tuple(node.kwargs.values())), value

    def _kinds(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "parameter" if value in self.parameters else "context" if value in self.outside else "value"
        if isinstance(value, (list, tuple)):
            return tuple(map(self._kinds, value))
        return type(value)

    def handed_on(self, start: int, end: int) -> list[int]:
        """Of the values made in a block those that are read behind it."""
        return [i for i in range(start, end) if self.last[i] >= end]

    def cost(self, start: int, end: int) -> tuple[int, int]:
        """How many values are handed on, and about how many numbers these are."""
        handed = self.handed_on(start, end)
        return len(handed), sum(_elements(self.nodes[i]) for i in handed)

    def holds(self, bounds: Sequence[int]) -> bool:
        """Whether blocks are a chain: each has parameters, hands a value of one type to the next, and keeps less than
        half of what it makes."""
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
    """Bounds of the chains in a stretch: of the best one, and of those before and behind it."""
    for first, period, length in repeats(stream.labels[start:end], TRIED):
        chain = _cut(stream, start + first, period, start + first + length, start, end)
        if chain is not None:
            yield from _by_structure(stream, start, chain[0])
            yield chain
            yield from _by_structure(stream, chain[-1], end)
            return


def _cut(stream: _Stream, first: int, period: int, last: int, start: int, end: int) -> list[int] | None:
    """Bounds of the blocks in a stretch that repeats itself: where least is handed on, and as many as can be."""
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
    """Bounds with a block more at either end, where it does the same as the others and something more."""
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
    """How many labels it takes to meet all of the template, in order."""
    met = 0
    for i, label in enumerate(labels):
        met += label == template[met]
        if met == len(template):
            return i + 1
    return None


def _by_names(stream: _Stream) -> list[list[int]]:
    """Bounds of the chains that module paths propose, those that cover most first, as far as the graph agrees."""
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
