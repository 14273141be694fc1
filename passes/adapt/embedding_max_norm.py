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

from adaptc.passes.analysis.sites import find_consumers
from adaptc.passes.graph.higher_order import HigherOrderCall, copy_bodies, find_higher_order_calls, module_with_graph
from adaptc.passes.graph.lifted import LiftedProgram, fqns_by_placeholder
from adaptc.passes.graph.ops import CASTS, argument, mark_max_norm, max_norm_of
from adaptc.passes.graph.pass_infra import Pass, PassResult

aten = torch.ops.aten
RENORM_IN_PLACE = aten.embedding_renorm_.default
RENORM_FUNCTIONAL = aten.embedding_renorm.default
_LOOKUPS = (aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx)

#: (max_norm, norm_type) of an embedding
MaxNorm = tuple[float, float]


@dataclass(frozen=True)
class RemoveMaxNormWrites(Pass):
    """A pass that removes the writes of ``max_norm`` embeddings; its count is that of the weights.

    It returns the program itself where there are none.
    """

    name: ClassVar[str] = "remove_max_norm_writes"

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        modules = [m for m in subject.graph_module.modules() if isinstance(m, fx.GraphModule)]
        if not any(
            m.graph.find_nodes(op="call_function", target=t)
            for m in modules
            for t in (RENORM_IN_PLACE, RENORM_FUNCTIONAL)
        ):
            return PassResult(subject, 0)
        lifted = LiftedProgram(subject)
        _restore_in_place(lifted)
        root = module_with_graph(subject.graph_module, lifted.graph)
        for call in find_higher_order_calls(root):
            copy_bodies(call)
        count = 0
        for source in dict.fromkeys(lifted.placeholders.values()):
            reads = list(_parameter_reads(source, root))
            if any(n.target is RENORM_IN_PLACE for n, _ in reads):
                count += _remove_writes(lifted, source, reads)
        for body in root.modules():
            if isinstance(body, fx.GraphModule) and body is not root:
                body.recompile()
        return PassResult(lifted.finish(root), count) if count else PassResult(subject, 0)


def _restore_in_place(lifted: LiftedProgram) -> None:
    """Turn a decomposed program's ``max_norm`` writes, which are outputs there, back into in-place ops."""
    for spec in list(lifted.output_specs):
        if spec.kind != OutputKind.PARAMETER_MUTATION or spec.target is None:
            continue
        source, chain = lifted.placeholders[spec.target], [lifted.nodes[spec.arg.name]]
        while chain[-1].target is RENORM_FUNCTIONAL and (above := _without_casts(argument(chain[-1], 0))) is not source:
            chain.append(above)
        if chain[-1].target is not RENORM_FUNCTIONAL:
            continue
        lifted.drop_mutation_outputs(spec.target)
        for node in chain:
            with lifted.graph.inserting_before(node):
                arguments = [argument(node, i) for i in range(1, 4)]
                lifted.graph.call_function(RENORM_IN_PLACE, (source, *arguments)).meta = dict(node.meta)
        for node in chain:
            node.replace_all_uses_with(source)
        for node in chain:
            lifted.graph.erase_node(node)


def _parameter_reads(source: fx.Node, module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield (reader, the node it reads) for the readers of a parameter, inside blocks too."""
    for node, read in find_consumers(source):
        call = HigherOrderCall.from_node(node, module)
        if call is None:
            yield node, read
            continue
        for at, handed, fixed in call.operands():
            if handed is read and not fixed:
                yield node, read
            elif handed is read:
                for body in call.bodies():
                    yield from _parameter_reads(body.graph.find_nodes(op="placeholder")[at], body)


def _remove_writes(lifted: LiftedProgram, source: fx.Node, reads: Sequence[tuple[fx.Node, fx.Node]]) -> bool:
    """Remove the writes to the weight ``source``, whose ``reads`` are given; returns whether that could be done."""
    fqn = lifted.input_specs[source.name].target
    assert fqn is not None
    old = limited = lifted.tensor(fqn)
    if old.is_meta:
        return False
    writers = [n for n, _ in reads if n.target is RENORM_IN_PLACE]
    lookups: dict[fx.Node, MaxNorm] = {}
    is_read_elsewhere = False
    for node, read in reads:
        before = [
            w
            for w in writers
            if w.graph is node.graph and w < node and _lookup_indices(node, read) is _write_indices(w)
        ]
        if before:
            lookups[node] = _max_norm_of_write(before[-1])
        elif node not in writers:
            is_read_elsewhere = True
    limits = sorted({_max_norm_of_write(w) for w in writers})
    for limit in limits:
        limited = limit_row_norms(limited, limit)
    if limited is not old and (is_read_elsewhere or len(limits) > 1):
        if any(w.graph is not lifted.graph for w in writers):
            return False
        _limit_in_graph(lifted, source, writers)
    else:
        for node, limit in lookups.items():
            mark_max_norm(node, limit)
        if limited is not old:
            lifted.set_tensor(fqn, limited)
    for writer in writers:
        _erase_write(writer)
    return True


def max_norms_of(graph: fx.Graph, signature: ExportGraphSignature) -> dict[str, MaxNorm]:
    """Return FQN -> (max_norm, norm_type) of each weight whose lookups are marked with a bound.

    Lookups that read an adapted weight are left out.
    """
    marked = [n for t in _LOOKUPS for n in graph.find_nodes(op="call_function", target=t) if max_norm_of(n) is not None]
    names = fqns_by_placeholder(signature) if marked else {}
    found = {names.get(_without_casts(argument(n, 0)).name): max_norm_of(n) for n in marked}
    return {fqn: limit for fqn, limit in found.items() if fqn is not None and limit is not None}


def limit_row_norms(weight: Tensor, limit: MaxNorm) -> Tensor:
    """Return a weight (rows, width) with rows beyond ``limit`` shortened by torch's own op; itself where none is."""
    every = torch.arange(weight.shape[0], device=weight.device)
    with torch.no_grad():
        new = torch.embedding_renorm_(weight.detach().clone(), every, *limit)
        if torch.equal(new, weight):
            return weight
    return torch.nn.Parameter(new, weight.requires_grad) if isinstance(weight, torch.nn.Parameter) else new


def _limit_in_graph(lifted: LiftedProgram, source: fx.Node, writers: Sequence[fx.Node]) -> None:
    """Replace the writes by functional ops, which later readers of the weight read instead of it."""
    graph, current_weight = lifted.graph, source
    reads = [n for n in graph.nodes if n in source.users or n in writers]
    for node in reads:
        if node in writers:
            with graph.inserting_before(node):
                arguments = [argument(node, i) for i in range(1, 4)]
                new = graph.call_function(RENORM_FUNCTIONAL, (current_weight, *arguments))
            new.meta = dict(node.meta)
            current_weight = new
        elif current_weight is not source:
            node.replace_input_with(source, current_weight)


def _erase_write(writer: fx.Node) -> None:
    """Erase a write, and the casts before it that nothing else reads."""
    above: Any = argument(writer, 0)
    writer.replace_all_uses_with(above)
    writer.graph.erase_node(writer)
    while above.target in CASTS and not above.users:
        erased, above = above, above.args[0]
        erased.graph.erase_node(erased)


def _lookup_indices(node: fx.Node, read: fx.Node) -> fx.Node | None:
    """Return the node of the indices by which ``node`` looks up rows of ``read``; None where it does not."""
    if node.target not in _LOOKUPS or argument(node, 0) is not read:
        return None
    return _without_casts(argument(node, 1))


def _write_indices(writer: fx.Node) -> Any:
    return _without_casts(argument(writer, 1))


def _max_norm_of_write(writer: fx.Node) -> MaxNorm:
    return float(argument(writer, 2)), float(argument(writer, 3))


def _without_casts(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in CASTS and node.args:
        node = node.args[0]
    return node
