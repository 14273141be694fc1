"""Lower: regions of adapters become the fused kernels their methods have, for a GPU.

Before: a program with tagged regions of pure ATen. After: where a method has kernels for a site, its region computes
the layer and what the adapter adds to it in one, by ops of ``adaptc.kernels``; equal up to rounding, and on other
devices the ops compute their references. The tags stay, so that swap, merge, unload, save and load go on as before. The
layer's own node stays too, read by nothing: unload puts it back, and whatever compiles or cleans the graph drops it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx
from torch.export import ExportedProgram

from adaptc.errors import BackendError
from adaptc.passes._kinds import Op, operands
from adaptc.passes._lifted import Lifted
from adaptc.passes._method import Attachment
from adaptc.passes._pass import Pass, PassResult
from adaptc.passes._regions import node_tag, region_tag, slot_nodes
from adaptc.passes._trace import inline, region_of, signature_of


@dataclass(frozen=True)
class Lower(Pass):
    """``attachments``, ``ops``: those of the program, and the op at each. The notes say which regions stay and why."""

    name: ClassVar[str] = "lower"

    attachments: Sequence[Attachment] = field(repr=False)
    ops: Mapping[str, Op] = field(repr=False)
    make: Callable[..., ExportedProgram] = field(default=ExportedProgram, repr=False)

    def apply(self, program: ExportedProgram) -> PassResult:
        lifted = Lifted(program)
        count, notes = lower(lifted.graph, self.attachments, self.ops, lifted.placeholders)
        return PassResult(lifted.finish(self.make), count, tuple(f"{site}: {why}" for site, why in notes.items()))


def fused_inputs(consumer: fx.Node) -> tuple[str, list[fx.Node]]:
    """The form a fused region has in the place of a layer, and what it reads beside the slots."""
    x, w, b = operands(consumer)
    return ("fused", [x, w]) if b is None else ("fused_bias", [x, w, b])


def lower(
    graph: fx.Graph, attachments: Sequence[Attachment], ops: Mapping[str, Op], placeholders: Mapping[str, fx.Node]
) -> tuple[int, dict[str, str]]:
    """Rewrite ``graph`` in place. Returns how many regions are kernels now, and why the others are not, by site.
    ``placeholders``: those of the slots and scales, by FQN."""
    by_id = {a.id: a for a in attachments}
    regions: dict[fx.Node, list[fx.Node]] = {}
    pending: dict[str, list[fx.Node]] = {}
    names: dict[str, fx.Node] = {}
    for node in graph.nodes:
        names[node.name] = node
        tag = node_tag(node)
        if tag is not None:
            nodes = pending.setdefault(tag["site"], [])
            nodes.append(node)
            if tag["role"] == "out":
                regions[node] = pending.pop(tag["site"])
    traces: dict[Any, fx.Graph | str] = {}
    notes: dict[str, str] = {}
    renamed: dict[str, str] = {}
    count = 0
    for out, nodes in regions.items():
        tag = node_tag(out)
        assert tag is not None
        a = by_id[tag["site"]]
        why = "" if tag.get("fused") else _lower(graph, a, ops[a.id], nodes, names, placeholders, traces, renamed)
        if why:
            notes[a.id] = why
        count += not why
    # Other adapters may stand behind a region that has another result now.
    for out in graph.nodes:
        tag = region_tag(out)
        if tag is not None and tag["base"] in renamed:
            out.meta["custom"] = {**out.meta["custom"], "adaptc": {**tag, "base": renamed[tag["base"]]}}
    return count, notes


def _lower(
    graph: fx.Graph,
    a: Attachment,
    op: Op,
    nodes: Sequence[fx.Node],
    names: Mapping[str, fx.Node],
    placeholders: Mapping[str, fx.Node],
    traces: dict[Any, fx.Graph | str],
    renamed: dict[str, str],
) -> str:
    """Rewrite one region; returns why not, or ''."""
    out = nodes[-1]
    tag = node_tag(out)
    assert tag is not None
    consumer = names[tag["node"]]
    if tag["form"] == "input" or (tag["form"].startswith("apply") and a.method.has_input(op)):
        return "it changes the layer's input in a region of its own"
    if not tag["form"].startswith("apply"):
        return "its region stands in front of the weight"
    if tag["base"] != tag["node"]:
        return "another adapter changes the output of the layer before it"
    if not set(consumer.users) <= set(nodes):
        return "the output of the layer is read without the adapter too"
    op = op.at(consumer)
    form, inputs = fused_inputs(consumer)
    inputs += slot_nodes(a, placeholders)
    fakes = [n.meta["val"] for n in inputs]
    key = (a.method, form, op, signature_of(fakes))
    if key not in traces:
        traces[key] = _region(a, op, form, fakes)
    region = traces[key]
    if isinstance(region, str):
        return region

    def tagged(role: str) -> dict[str, Any]:
        return {**(tag if role == "out" else a.tag(role)), "fused": True}

    new = inline(graph, region, inputs, out.next, consumer, tagged)
    out.replace_all_uses_with(new)
    for node in reversed(nodes):
        graph.erase_node(node)
    renamed[out.name] = new.name
    return ""


def _region(a: Attachment, op: Op, form: str, fakes: Sequence[Any]) -> fx.Graph | str:
    why = a.method.unfused(op)
    if why:
        return why
    try:
        return region_of(a.method, op, form, list(a.slots), a.scale is not None, fakes)
    except BackendError as error:
        return str(error)
