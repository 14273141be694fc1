"""Remove the in-place writes of embeddings with ``max_norm``, and keep their outputs.

At each call, torch shortens in place the rows that the call looks up. Rows that are short already stay. So a call gives
what it would with all rows shortened beforehand.

Takes a program with such writes. Afterwards none of them writes to a parameter or buffer, and every output is that of
the first call:

- Where only such lookups read a weight, or none of its rows is too long, the weight itself holds the shortened rows. It
  is the program's own copy, or the old tensor where nothing changed. The lookups are marked with ``max_norm``.
- Where something else reads the weight as well (a tied head), it reads the rows as the lookups before it left them. The
  graph computes these in each call.

Weights without values (meta) stay as they are. So do those of the second kind that are written to inside a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind

from adaptc.passes.adapt.expose_subgraph_params import copy_of, own_bodies
from adaptc.passes.analysis.sites import consumers
from adaptc.passes.graph.higher_order import Call, calls
from adaptc.passes.graph.lifted import Lifted, lifted_names
from adaptc.passes.graph.ops import CASTS, argument, bound_of, mark_bound
from adaptc.passes.graph.pass_infra import Pass, PassResult

aten = torch.ops.aten
RENORM = aten.embedding_renorm_.default
RENORMED = aten.embedding_renorm.default
_LOOKUPS = (aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx)

#: (max_norm, norm_type) of an embedding
Bound = tuple[float, float]


@dataclass(frozen=True)
class BoundRows(Pass):
    """A pass that removes the writes of ``max_norm`` embeddings; its count is that of the weights.

    It returns the program itself where there are none.
    """

    name: ClassVar[str] = "bound_rows"

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        modules = [m for m in subject.graph_module.modules() if isinstance(m, fx.GraphModule)]
        if not any(m.graph.find_nodes(op="call_function", target=t) for m in modules for t in (RENORM, RENORMED)):
            return PassResult(subject, 0)
        lifted = Lifted(subject)
        _undo_functional(lifted)
        root = copy_of(subject.graph_module, lifted.graph)
        for call in calls(root):
            own_bodies(call)
        count = 0
        for source in dict.fromkeys(lifted.placeholders.values()):
            reads = list(_reads(source, root))
            if any(n.target is RENORM for n, _ in reads):
                count += _bound(lifted, source, reads)
        for body in root.modules():
            if isinstance(body, fx.GraphModule) and body is not root:
                body.recompile()
        return PassResult(lifted.finish(root), count) if count else PassResult(subject, 0)


def _undo_functional(lifted: Lifted) -> None:
    """Turn a decomposed program's ``max_norm`` writes, which are outputs there, back into in-place ops."""
    for spec in list(lifted.outputs):
        if spec.kind != OutputKind.PARAMETER_MUTATION or spec.target is None:
            continue
        source, chain = lifted.placeholders[spec.target], [lifted.nodes[spec.arg.name]]
        while chain[-1].target is RENORMED and (above := _root(argument(chain[-1], 0))) is not source:
            chain.append(above)
        if chain[-1].target is not RENORMED:
            continue
        lifted.write_back_nothing(spec.target)
        for node in chain:
            with lifted.graph.inserting_before(node):
                arguments = [argument(node, i) for i in range(1, 4)]
                lifted.graph.call_function(RENORM, (source, *arguments)).meta = dict(node.meta)
        for node in chain:
            node.replace_all_uses_with(source)
        for node in chain:
            lifted.graph.erase_node(node)


def _reads(source: fx.Node, module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield (reader, the node it reads) for the readers of a parameter, inside blocks too."""
    for node, read in consumers(source):
        call = Call.of(node, module)
        if call is None:
            yield node, read
            continue
        for at, handed, fixed in call.operands():
            if handed is read and not fixed:
                yield node, read
            elif handed is read:
                for body in call.bodies():
                    yield from _reads(body.graph.find_nodes(op="placeholder")[at], body)


def _bound(lifted: Lifted, source: fx.Node, reads: Sequence[tuple[fx.Node, fx.Node]]) -> bool:
    """Remove the writes to the weight ``source``, whose ``reads`` are given; returns whether that could be done."""
    fqn = lifted.specs[source.name].target
    assert fqn is not None
    old = new = lifted.tensor(fqn)
    if old.is_meta:
        return False
    writers = [n for n, _ in reads if n.target is RENORM]
    lookups: dict[fx.Node, Bound] = {}
    others = False
    for node, read in reads:
        before = [w for w in writers if w.graph is node.graph and w < node and _indices(node, read) is _indices_of(w)]
        if before:
            lookups[node] = _limit(before[-1])
        elif node not in writers:
            others = True
    limits = sorted({_limit(w) for w in writers})
    for limit in limits:
        new = shortened(new, limit)
    if new is not old and (others or len(limits) > 1):
        if any(w.graph is not lifted.graph for w in writers):
            return False
        _in_the_graph(lifted, source, writers)
    else:
        for node, limit in lookups.items():
            mark_bound(node, limit)
        if new is not old:
            lifted.set(fqn, new)
    for writer in writers:
        _erase(writer)
    return True


def bounds_of(graph: fx.Graph, signature: ExportGraphSignature) -> dict[str, Bound]:
    """Return FQN -> (max_norm, norm_type) of each weight whose lookups are marked with a bound.

    Lookups that read an adapted weight are left out.
    """
    marked = [n for t in _LOOKUPS for n in graph.find_nodes(op="call_function", target=t) if bound_of(n) is not None]
    names = lifted_names(signature) if marked else {}
    found = {names.get(_root(argument(n, 0)).name): bound_of(n) for n in marked}
    return {fqn: limit for fqn, limit in found.items() if fqn is not None and limit is not None}


def shortened(weight: Tensor, limit: Bound) -> Tensor:
    """Return a weight (rows, width) with rows beyond ``limit`` shortened by torch's own op; itself where none is."""
    every = torch.arange(weight.shape[0], device=weight.device)
    with torch.no_grad():
        new = torch.embedding_renorm_(weight.detach().clone(), every, *limit)
        if torch.equal(new, weight):
            return weight
    return torch.nn.Parameter(new, weight.requires_grad) if isinstance(weight, torch.nn.Parameter) else new


def _in_the_graph(lifted: Lifted, source: fx.Node, writers: Sequence[fx.Node]) -> None:
    """Replace the writes by functional ops, which later readers of the weight read instead of it."""
    graph, now = lifted.graph, source
    reads = [n for n in graph.nodes if n in source.users or n in writers]
    for node in reads:
        if node in writers:
            with graph.inserting_before(node):
                arguments = [argument(node, i) for i in range(1, 4)]
                new = graph.call_function(RENORMED, (now, *arguments))
            new.meta = dict(node.meta)
            now = new
        elif now is not source:
            node.replace_input_with(source, now)


def _erase(writer: fx.Node) -> None:
    """Erase a write, and the casts before it that nothing else reads."""
    above: Any = argument(writer, 0)
    writer.replace_all_uses_with(above)
    writer.graph.erase_node(writer)
    while above.target in CASTS and not above.users:
        erased, above = above, above.args[0]
        erased.graph.erase_node(erased)


def _indices(node: fx.Node, read: fx.Node) -> fx.Node | None:
    """Return the node of the indices by which ``node`` looks up rows of ``read``; None where it does not."""
    if node.target not in _LOOKUPS or argument(node, 0) is not read:
        return None
    return _root(argument(node, 1))


def _indices_of(writer: fx.Node) -> Any:
    return _root(argument(writer, 1))


def _limit(writer: fx.Node) -> Bound:
    return float(argument(writer, 2)), float(argument(writer, 3))


def _root(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in CASTS and node.args:
        node = node.args[0]
    return node
