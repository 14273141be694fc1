"""Make a program's fake values fit slots whose shapes changed (a swap to another rank).

Before: a program with injected regions and, for some slots, tensors of another size along their free axes. After: every
placeholder and region node carries the value it has with the new tensors, so that the program validates, saves and
compiles as if it had been injected with them. The code does not change: regions are the same for every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from adaptc.errors import PassError
from adaptc.passes._kinds import Op, operands
from adaptc.passes._method import Attachment
from adaptc.passes._regions import node_tag, slot_nodes
from adaptc.passes._trace import region_of, signature_of
from adaptc.passes.inject import behind_inputs
from adaptc.passes.lower import fused_inputs


def respecialize(
    graph: fx.Graph,
    attachments: Sequence[Attachment],
    ops: Mapping[str, Op],
    placeholders: Mapping[str, fx.Node],
    tensors: Mapping[str, Tensor],
    fake: Callable[[Tensor], Tensor],
    traces: dict[Any, fx.Graph] | None = None,
) -> int:
    """Update ``graph`` in place; returns how many regions changed. ``fake`` makes a fake value of a tensor. ``traces``
    keeps what was traced, for another call with fakes of the same mode."""
    stale: set[str] = set()
    for fqn, tensor in tensors.items():
        node = placeholders[fqn]
        if tuple(node.meta["val"].shape) != tuple(tensor.shape):
            node.meta["val"] = fake(tensor)
            stale.add(fqn)
    by_id = {a.id: a for a in attachments if stale & set(a.slots.values())}
    if not by_id:
        return 0
    traces = {} if traces is None else traces
    pending: dict[str, list[fx.Node]] = {}
    count = 0
    names = {n.name: n for n in graph.nodes}
    for node in graph.nodes:
        tag = node_tag(node)
        if tag is None or tag["site"] not in by_id:
            continue
        # Regions of one site do not interleave: each is complete when its "out" node comes.
        nodes = pending.setdefault(tag["site"], [])
        nodes.append(node)
        if tag["role"] == "out":
            _update(by_id[tag["site"]], ops[tag["site"]], tag, nodes, names, placeholders, traces)
            nodes.clear()
            count += 1
    return count


def _update(
    a: Attachment,
    op: Op,
    tag: Mapping[str, Any],
    nodes: Sequence[fx.Node],
    names: Mapping[str, fx.Node],
    placeholders: Mapping[str, fx.Node],
    traces: dict[Any, fx.Graph],
) -> None:
    base, consumer = names[tag["base"]], names[tag["node"]]
    inputs, form = [base], tag["form"]
    if tag.get("fused"):
        form, inputs = fused_inputs(consumer)
        op = op.at(consumer)
    elif form == "input":
        op = op.at(consumer)
    elif form.startswith("apply"):
        inputs, op = behind_inputs(consumer, base)[1], op.at(consumer)
    elif form == "bias":
        inputs.append(operands(consumer)[2])
    inputs += slot_nodes(a, placeholders)
    fakes = [n.meta["val"] for n in inputs]
    key = (a.method, form, op, signature_of(fakes))
    if key not in traces:
        traces[key] = region_of(a.method, op, form, list(a.slots), a.scale is not None, fakes)
    traced = [n for n in traces[key].nodes if n.op == "call_function"]
    if not traced:  # the region is an alias of one of its inputs
        nodes[-1].meta["val"] = nodes[-1].args[0].meta["val"]  # type: ignore[union-attr]
        return
    if [n.target for n in traced] != [n.target for n in nodes]:
        raise PassError(f"region of {a.id!r} depends on the rank: {[str(n.target) for n in traced]}")
    for old, new in zip(nodes, traced, strict=True):
        old.meta["val"] = new.meta["val"]
