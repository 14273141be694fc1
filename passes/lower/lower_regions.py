"""Lower adapter regions to the fused GPU kernels of their methods.

Takes a program with tagged regions of pure ATen. Where a method has kernels for a site, its region computes the layer
and the adapter together, by ops of ``adaptc.kernels``. The result is equal up to rounding. On other devices the ops
compute their references.

The tags stay, so swap, merge, unload, save and load go on as before. The layer's own node stays too, without readers:
unload puts it back, and whatever compiles or cleans the graph drops it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx
from torch.export import ExportedProgram

from adaptc.errors import BackendError
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.pass_infra import GraphPass, Pass, PassResult
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.regions import node_tag, region_tag, slot_nodes
from adaptc.passes.protocol.trace import fused_region_inputs, inline, trace_key, trace_region


@dataclass(frozen=True)
class LoweringSummary:
    """The number of ``regions`` that are kernels now, and site -> why it is not one for the ``reasons_by_site``."""

    regions: int
    reasons_by_site: Mapping[str, str]


@dataclass(frozen=True)
class Lower(Pass):
    """A pass that lowers a program; its count is that of the regions that are kernels now.

    ``attachments`` are those of the program, and ``ops`` has the op of each by its id. The notes say which regions are
    not lowered and why. ``data`` is a :class:`LoweringSummary`.
    """

    name: ClassVar[str] = "lower"

    attachments: Sequence[Attachment] = field(repr=False)
    ops: Mapping[str, Op] = field(repr=False)

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        names = {fqn: node.name for fqn, node in lifted.placeholders.items()}
        done = LowerGraph(self.attachments, self.ops, names)(lifted.graph)
        return PassResult(lifted.finish(), done.count, done.notes, done.data)


@dataclass(frozen=True)
class LowerGraph(GraphPass):
    """A pass that lowers a lifted graph in place; its count is that of the regions that are kernels now.

    ``placeholders`` maps the FQN of each slot and scale to the name of its placeholder. The rest is as for
    :class:`Lower`.
    """

    name: ClassVar[str] = "lower"

    attachments: Sequence[Attachment] = field(repr=False)
    ops: Mapping[str, Op] = field(repr=False)
    placeholders: Mapping[str, str] = field(repr=False)

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        by_id = {a.id: a for a in self.attachments}
        regions: dict[fx.Node, list[fx.Node]] = {}
        open_regions: dict[str, list[fx.Node]] = {}
        names = {n.name: n for n in subject.nodes}
        inputs = {fqn: names[name] for fqn, name in self.placeholders.items()}
        for node in subject.nodes:
            tag = node_tag(node)
            if tag is not None:
                nodes = open_regions.setdefault(tag["site"], [])
                nodes.append(node)
                if tag["role"] == "out":
                    regions[node] = open_regions.pop(tag["site"])
        traces: dict[Any, fx.Graph | str] = {}
        notes: dict[str, str] = {}
        renamed: dict[str, str] = {}
        count = 0
        for out, nodes in regions.items():
            tag = node_tag(out)
            assert tag is not None
            a, reason = by_id[tag["site"]], ""
            if not tag.get("fused"):
                reason = _lower_region(subject, a, self.ops[a.id], nodes, names, inputs, traces, renamed)
            if reason:
                notes[a.id] = reason
            count += not reason
        # The tag of a later adapter may name the old output of a region that was lowered.
        for out in subject.nodes:
            tag = region_tag(out)
            if tag is not None and tag["base"] in renamed:
                out.meta["custom"] = {**out.meta["custom"], "adaptc": {**tag, "base": renamed[tag["base"]]}}
        return PassResult(
            subject, count, tuple(f"{site}: {why}" for site, why in notes.items()), LoweringSummary(count, notes)
        )


def _lower_region(
    graph: fx.Graph,
    a: Attachment,
    op: Op,
    nodes: Sequence[fx.Node],
    names: Mapping[str, fx.Node],
    placeholders: Mapping[str, fx.Node],
    traces: dict[Any, fx.Graph | str],
    renamed: dict[str, str],
) -> str:
    """Rewrite one region, whose ``nodes`` are given; returns '' or why it stays as it is."""
    out = nodes[-1]
    tag = node_tag(out)
    assert tag is not None
    consumer = names[tag["node"]]
    if tag["region"] == "input" or (tag["region"].startswith("apply") and a.method.has_input(op)):
        return "it changes the layer's input in a region of its own"
    if not tag["region"].startswith("apply"):
        return "its region stands in front of the weight"
    if tag["base"] != tag["node"]:
        return "another adapter changes the output of the layer before it"
    if not set(consumer.users) <= set(nodes):
        return "the output of the layer is read without the adapter too"
    op = op.as_called_by(consumer)
    kind, inputs = fused_region_inputs(consumer)
    inputs += slot_nodes(a, placeholders, names)
    fakes = [n.meta["val"] for n in inputs]
    key = (a.method, kind, op, trace_key(fakes))
    if key not in traces:
        traces[key] = _trace_fused(a, op, kind, fakes)
    region = traces[key]
    if isinstance(region, str):
        return region

    def make_tag(role: str) -> dict[str, Any]:
        return {**(tag if role == "out" else a.tag(role)), "fused": True}

    new = inline(graph, region, inputs, out.next, consumer, make_tag)
    out.replace_all_uses_with(new)
    for node in reversed(nodes):
        graph.erase_node(node)
    renamed[out.name] = new.name
    return ""


def _trace_fused(a: Attachment, op: Op, kind: str, fakes: Sequence[Any]) -> fx.Graph | str:
    why = a.method.kernels.why_missing(op)
    if why:
        return why
    try:
        return trace_region(a.method, op, kind, a.input_names, a.scale_slot is not None, fakes)
    except BackendError as error:
        return str(error)
