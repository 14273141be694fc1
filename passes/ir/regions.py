"""Regions: the tagged nodes adapters added to a program. The tags are the only record of what was injected.

Every node of a region has ``node.meta["custom"]["adaptc"]``: the method, the adapter, the site (an attachment's id) and
a role. The node that carries the result has role "out", and its tag holds more, from which alone a program that was
saved to a file and loaded elsewhere is understood:

    attachment   Attachment.to_dict()
    region       what it computes, one of the kinds that ``trace.region_of`` knows, or a place of a program's; "beside"
                 for what is computed once more, of more tokens
    base         the node it stands in for: an output, a parameter, or a consumer's input
    node         the consumer it stands at
    given        the inputs that its method added to the program
    fused        True where it is made of kernels
    header       in the first region of a program: what the program as a whole remembers

What computes a coefficient (``passes.ir.coefficients``) is of no region: all sites of an adapter read it. Its nodes
have tags of the role :data:`COEFFICIENT`; :data:`FIRST_PASS` marks the value that one is made of, whose tag has the
inputs that were added for it, under "given" as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx

from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.method import Method
from adaptc.passes.ir.ops import Op, make_grouped, op_of
from adaptc.passes.ir.program_method import PROGRAM
from adaptc.passes.ir.propagate import propagate

COEFFICIENT = "coefficient"
#: in the tag of the last hidden state of a first pass, which a coefficient is made of
FIRST_PASS = "first_pass"


def node_tag(node: fx.Node) -> dict[str, Any] | None:
    """The adaptc tag of any region node."""
    custom = node.meta.get("custom")
    return custom.get("adaptc") if isinstance(custom, dict) else None


def region_tag(node: fx.Node) -> dict[str, Any] | None:
    """The tag of a region's result; None for all other nodes."""
    tag = node_tag(node)
    return tag if tag is not None and tag.get("role") == "out" else None


def slot_nodes(a: Attachment, placeholders: Mapping[str, fx.Node], nodes: Mapping[str, fx.Node]) -> list[fx.Node]:
    """What every region of a site reads last: its slots, its coefficients, then its scale if it has one."""
    scale = [] if a.scale_slot is None else [placeholders[a.scale_slot]]
    return [*(placeholders[f] for f in a.slots.values()), *(nodes[n] for n in a.reads.values()), *scale]


def site_op(lifted: Lifted, a: Attachment) -> Op:
    """The op of an attachment's site in an opened program."""
    first = lifted.nodes.get(a.consumers[0]) if a.consumers else None
    return op_of(a.kind, lifted.tensor(a.fqn), first)


def added_inputs(lifted: Lifted) -> list[fx.Node]:
    """The inputs that methods added to an opened program."""
    names = dict.fromkeys(n for node in lifted.graph.nodes if (t := node_tag(node)) for n in t.get("given", ()))
    return [lifted.nodes[n] for n in names]


def place_of(tag: Mapping[str, Any]) -> tuple[str, ...]:
    """What a region stands in for: the output of a node, a parameter as one site reads it, or a consumer's input."""
    if tag["region"] in ("weight", "weight_over"):
        return (tag["base"], tag["attachment"]["module"], tag["attachment"]["param"])
    if tag["region"] == "bias_value":
        return (tag["base"], tag["attachment"]["module"], "bias")
    return (tag["node"], "input") if tag["region"] == "input" else (tag["base"],)


def header(graph: fx.Graph) -> dict[str, Any] | None:
    """What the program as a whole remembers (its configs), kept in the first region's tag."""
    for node in graph.nodes:
        tag = region_tag(node)
        if tag and "header" in tag:
            return tag["header"]
    return None


def set_header(graph: fx.Graph, value: Mapping[str, Any]) -> None:
    """Replace what :func:`header` returns."""
    for node in graph.nodes:
        tag = region_tag(node)
        if tag:
            node.meta["custom"] = {**node.meta["custom"], "adaptc": {**tag, "header": dict(value)}}
            return


def attachments(graph: fx.Graph, method_of: Callable[[Mapping[str, Any]], Method]) -> list[Attachment]:
    """The attachments of a graph in injection order; ``method_of`` as for ``from_dict``."""
    found: dict[str, Attachment] = {}
    for node in graph.nodes:
        tag = region_tag(node)
        if tag and tag["site"] not in found:
            found[tag["site"]] = Attachment.from_dict(tag["attachment"], method_of)
    return list(found.values())


def remove_regions(lifted: Lifted, ids: Iterable[str]) -> int:
    """Take the regions of these attachments out of an opened program, and their slots; returns how many regions."""
    wanted = set(ids)
    outs: list[tuple[fx.Node, fx.Node]] = []
    inner: list[fx.Node] = []
    slots: dict[str, None] = {}
    given: dict[str, None] = {}
    for node in lifted.graph.nodes:
        tag = node_tag(node)
        if tag is None or tag["site"] not in wanted:
            continue
        inner.append(node)
        if tag["role"] == "out":
            outs.append((node, lifted.nodes[tag["base"]]))
            a = tag["attachment"]
            given.update(dict.fromkeys(tag.get("given", ())))
            slots.update(dict.fromkeys([*a["slots"].values(), *([a["scale_slot"]] if a["scale_slot"] else [])]))
    base_of = {out.name: base.name for out, base in outs}
    for node in lifted.graph.nodes:
        tag = region_tag(node)
        if tag is not None and tag["base"] in base_of and tag["site"] not in wanted:
            name = tag["base"]
            while name in base_of:
                name = base_of[name]
            node.meta["custom"] = {**node.meta["custom"], "adaptc": {**tag, "base": name}}
    resized = {base for out, base in outs if region_tag(out)["attachment"]["form"] == PROGRAM}  # type: ignore[index]
    for out, base in reversed(outs):
        out.replace_all_uses_with(base)
        for name in region_tag(out)["attachment"]["consumers"]:  # type: ignore[index]  # outs are nodes that have one
            make_grouped(lifted.nodes[name])
    for node in reversed(inner):
        lifted.graph.erase_node(node)
        lifted.nodes.pop(node.name, None)
    propagate(lifted.graph, resized & set(lifted.graph.nodes), lifted.program.graph_module)
    for node in reversed(lifted.graph.nodes):
        tag = node_tag(node)
        if tag is not None and tag["role"] == COEFFICIENT and not node.users:
            given.update(dict.fromkeys(tag.get("given", ())))
            lifted.graph.erase_node(node)
            lifted.nodes.pop(node.name, None)
    for name in given:
        if not lifted.nodes[name].users:
            lifted.remove_input(name)
    for fqn in slots:
        if fqn in lifted.placeholders and not lifted.placeholders[fqn].users:
            lifted.remove(fqn)
    return len(outs)
