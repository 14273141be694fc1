"""Gradient checkpointing: repeated blocks of a training graph as segments that the backward computes again.

Takes the module that ``ExportedProgram.module()`` makes, fused or not. Parameters, buffers, outputs and gradients stay
the same. Each segment becomes one call of a :class:`RecomputedSegment` submodule, which gets the parameters it reads as
arguments. Between forward and backward only the values that flow from segment to segment are kept.

Blocks are those of ``analysis.block_chains``. A block that writes to memory it did not make itself (the running
statistics of batch norm) would write twice. It is left as it is, and a note says why. Writes of a method to its own
slots do not count: they write the same value again, for random numbers are the same, too.

Two tools of torch do not serve. ``fx.passes.split_module`` moves parameters into the submodules, under other names.
``fuser_utils.fuse_by_partitions`` sorts the graph anew, which changes the order in which dropout draws its masks.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from adaptc.errors import MAX_LISTED, AdaptcError, AdaptcWarning, ConfigError, and_more, short_repr
from adaptc.passes.analysis.block_chains import Block, BlockChain, find_block_chains, gradient_free_nodes
from adaptc.passes.graph.mutation import memory_groups, written_inputs
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.graph.train_eval import STATISTICS_ARGUMENTS
from adaptc.passes.protocol.regions import node_tag
from adaptc.passes.train.base_products import frozen_linear
from adaptc.passes.train.fused_cross_entropy import linear_cross_entropy
from adaptc.passes.train.fused_gated_activation import gated_activation
from adaptc.passes.train.fused_lora_linear import lora_linears
from adaptc.passes.train.recomputed import RecomputedSegment

#: functions in a fused graph whose results share no memory with their inputs
UNALIASED_FUNCTIONS = (lora_linears, gated_activation, linear_cross_entropy, frozen_linear)
#: the prefix of the submodules' names, before their number
SEGMENT_PREFIX = "recomputed"


def checkpoint(module: fx.GraphModule, every: int | Literal["auto"] = "auto") -> PassResult[fx.Graph]:
    """Rewrite ``module`` in place, so that its backward computes repeated blocks again.

    ``every`` is the number of consecutive blocks in a segment; "auto" stands for one. Longer segments keep less between
    forward and backward, and more within the backward of a segment. Checkpointing is on from then; see
    :func:`set_checkpointing`.

    The count is that of the segments. ``notes`` say which blocks were left as they are, and an AdaptcWarning repeats
    them. ``data`` has the names of each segment's nodes.

    Raises ConfigError for any other value of ``every``. Raises AdaptcError where no block is repeated, where none can
    be computed twice, or where the module has segments already. The module is unchanged then.
    """
    given: Any = every  # callers may give anything
    if given != "auto" and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ConfigError(f'every={short_repr(every)} is neither "auto" nor a number of blocks from 1')
    result = Checkpoint(1 if every == "auto" else every)(module.graph)
    module.recompile()
    if result.notes:
        warnings.warn(f"in gradient checkpointing {_shown_notes(result.notes)}", AdaptcWarning, stacklevel=2)
    return result


def _shown_notes(notes: Sequence[str]) -> str:
    return "; ".join(notes[:MAX_LISTED]) + and_more(notes)


def set_checkpointing(module: fx.GraphModule, on: bool) -> int:
    """Turn the segments of a module on or off, and return how many it has: 0 before :func:`checkpoint`.

    This sets flags only, so it takes no time.
    """
    segments = [m for m in module.modules() if isinstance(m, RecomputedSegment)]
    for segment in segments:
        segment.is_enabled = on
    return len(segments)


@dataclass(frozen=True)
class Checkpoint(GraphPass):
    """A pass that outlines segments of ``every`` blocks; see :func:`checkpoint`."""

    name: ClassVar[str] = "checkpoint"

    every: int = 1

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        module: Any = subject.owning_module
        if any(isinstance(m, RecomputedSegment) for m in module.modules()):
            raise AdaptcError("the module has checkpoints already: turn them on and off, or make a new module")
        chains = find_block_chains(module, UNALIASED_FUNCTIONS)
        if not chains:
            raise AdaptcError(
                "gradient checkpointing found no repeated block: no part of the graph with parameters repeats itself "
                "in a chain, and no counted modules do (layers.0, layers.1, ...). Train without it, or wrap parts of "
                "the model in torch.utils.checkpoint around its module"
            )
        segments, notes = self._find_segments(subject, chains)
        if not segments:
            raise AdaptcError(f"gradient checkpointing can compute no block twice: {_shown_notes(notes)}")
        movable = gradient_free_nodes(module, UNALIASED_FUNCTIONS)
        names = [tuple(n.name for n in segment) for segment in segments]
        for i, segment in enumerate(segments):
            _outline(module, segment, movable, f"{SEGMENT_PREFIX}_{i}")
        return PassResult(subject, len(segments), notes, names)

    def _find_segments(self, graph: fx.Graph, chains: Sequence[BlockChain]) -> tuple[list[Block], tuple[str, ...]]:
        why_not = _RecomputeCheck(graph)
        segments: list[Block] = []
        notes: list[str] = []
        for chain in chains:
            consecutive: list[Block] = []
            for block in chain.blocks:
                reason = why_not(block)
                if reason is None:
                    consecutive.append(block)
                else:
                    notes.append(f"the block from {block[0].name} to {block[-1].name} is left as it is: {reason}")
                if consecutive and (len(consecutive) == self.every or reason is not None or block is chain.blocks[-1]):
                    segments.append(tuple(n for b in consecutive for n in b))
                    consecutive = []
        return segments, tuple(notes)


class _RecomputeCheck:
    """A test of one graph that returns why a block must not run twice, or None where it may."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.memory_groups = memory_groups(graph, UNALIASED_FUNCTIONS)
        self.nodes_by_memory: dict[fx.Node, list[fx.Node]] = {}
        self.writers_by_memory: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self.nodes_by_memory.setdefault(self.memory_groups[node], []).append(node)
            for target in () if node_tag(node) else written_inputs(node):
                self.writers_by_memory.setdefault(self.memory_groups[target], []).append(node)

    def __call__(self, block: Block) -> str | None:
        inside = set(block)
        end = self.order[block[-1]]
        for node in block:
            statistics = [argument(node, i) for i in _statistics_positions(node.target)]
            if any(isinstance(s, fx.Node) for s in statistics):
                return f"{node.name} writes to running statistics in training"
        touched = {self.memory_groups[n] for node in block for n in (node, *node.all_input_nodes)}
        for group in touched & self.writers_by_memory.keys():
            for writer in self.writers_by_memory[group]:
                if writer in inside:
                    old = [n for n in self.nodes_by_memory[group] if n not in inside and self.order[n] < end]
                    if old:
                        return f"{writer.name} writes to {old[0].name}, which is not of the block"
                elif self.order[writer] > end:
                    return f"{writer.name} writes to what the block reads or makes, after it"
        return None


def _statistics_positions(target: Any) -> Sequence[int]:
    return STATISTICS_ARGUMENTS.get(target, ())


def _outline(module: fx.GraphModule, segment: Block, movable: set[fx.Node], name: str) -> None:
    """Replace the segment's nodes by one call of a submodule.

    Nodes that stand between them but are not of the segment move before it.
    """
    graph, inside = module.graph, set(segment)
    _move_before_segment(segment, inside, movable)
    outside = dict.fromkeys(n for node in segment for n in node.all_input_nodes if n not in inside)
    subgraphs = [n for n in outside if n.op == "get_attr" and isinstance(_attribute(module, n), fx.GraphModule)]
    inputs = [n for n in outside if n not in set(subgraphs)]
    outputs = [n for n in segment if any(u not in inside for u in n.users)]

    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = body.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in (*subgraphs, *segment):
        copies[node] = body.node_copy(node, copies.__getitem__)
    body.output(tuple(copies[n] for n in outputs))
    body.lint()
    held = {str(n.target): _attribute(module, n) for n in subgraphs}
    written = {n for node in segment for n in written_inputs(node)}
    made = RecomputedSegment(fx.GraphModule(held, body, "Segment"), [i for i, n in enumerate(inputs) if n in written])
    made.train(module.training)
    module.add_submodule(name, made)

    with graph.inserting_before(segment[0]):
        call = graph.call_module(name, tuple(inputs))
        pieces = [graph.call_function(operator.getitem, (call, i)) for i in range(len(outputs))]
    call.meta = {"val": tuple(n.meta.get("val") for n in outputs)}
    for node, piece in zip(outputs, pieces, strict=True):
        piece.meta = dict(node.meta)
        node.replace_all_uses_with(piece)
    for node in reversed(segment):
        graph.erase_node(node)
    for node in subgraphs:
        if not node.users:
            graph.erase_node(node)


def _move_before_segment(segment: Block, inside: set[fx.Node], movable: set[fx.Node]) -> None:
    """Move the nodes between the segment's nodes before it, in their order; they read nothing of the segment."""
    node, last = segment[0], segment[-1]
    while node is not last:
        behind = node.next
        if node not in inside:
            if node not in movable and node.op != "get_attr":
                raise AssertionError(f"{node.name} lies in a segment, and is not of it")
            segment[0].prepend(node)
        node = behind


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(module)
