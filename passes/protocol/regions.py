"""Regions: the tagged nodes that adapters added to a program. The tags are the only record of what was injected.

Every node of a region has ``node.meta["custom"]["adaptc"]``: the method, the adapter, the site (an attachment's id) and
a role. The node that carries the result has role "out", and its tag holds more. These tags alone explain a program that
was saved to a file and loaded elsewhere:

    attachment   Attachment.to_dict()
    region the kind of region, one that ``trace.trace_region`` knows or a place of the program; "beside" for a value
                 that is computed once more, with the virtual tokens
    base         the node it replaces: an output, a parameter, or an input of the node that reads the weight
    node         the node that reads the weight, where the region stands
    given        the inputs that its method added to the program
    fused        True where kernels compute it
    header       in the first region of a program: the record of the program as a whole

Regions of per-row adapters are made anew for each run, so their tags, at the key :data:`ROW_TAG_KEY`, hold what
:func:`bypass_regions` reads: the role, the base, and under "sites" the ids of all attachments that the region is of.

Nodes that compute a coefficient (``passes.protocol.coefficients``) belong to no region, since all sites of an adapter
read it. Their tags have the role :data:`COEFFICIENT_ROLE`. The key :data:`BASE_PASS_KEY` in such a tag marks the hidden
state that a coefficient is made of. That tag also lists the inputs added for it under "given".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import fx

from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op, custom_meta, make_grouped, op_of
from adaptc.passes.graph.propagate import propagate_fakes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.program_method import PROGRAM_FORM

COEFFICIENT_ROLE = "coefficient"
#: the key in the tag of a first pass's last hidden state, of which a coefficient is made
BASE_PASS_KEY = "first_pass"
#: the key of the tags of per-row adapters' regions in a node's custom meta
ROW_TAG_KEY = "adaptc_rows"


def node_tag(node: fx.Node) -> dict[str, Any] | None:
    """Return the adaptc tag of a region's node; None for all other nodes."""
    return custom_meta(node).get("adaptc")


def region_tag(node: fx.Node) -> dict[str, Any] | None:
    """Return the tag of a region's result; None for all other nodes."""
    tag = node_tag(node)
    return tag if tag is not None and tag.get("role") == "out" else None


def slot_nodes(a: Attachment, placeholders: Mapping[str, fx.Node], nodes: Mapping[str, fx.Node]) -> list[fx.Node]:
    """Return the nodes that every region of a site reads last: slots, coefficients, and the scale if there is one."""
    scale = [] if a.scale_slot is None else [placeholders[a.scale_slot]]
    return [*(placeholders[f] for f in a.slots.values()), *(nodes[n] for n in a.reads.values()), *scale]


def site_op(lifted: LiftedProgram, a: Attachment) -> Op:
    """Return the op of an attachment's site in an opened program."""
    first = lifted.nodes.get(a.consumers[0]) if a.consumers else None
    return op_of(a.kind, lifted.tensor(a.fqn), first)


def added_inputs(lifted: LiftedProgram) -> list[fx.Node]:
    """Return the inputs that methods added to an opened program."""
    names = dict.fromkeys(n for node in lifted.graph.nodes if (t := node_tag(node)) for n in t.get("given", ()))
    return [lifted.nodes[n] for n in names]


def replaced_value_key(tag: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a key for what a region replaces: a node's output, a parameter as read by one site, or a layer's input."""
    if tag["region"] in ("weight", "weight_over"):
        return (tag["base"], tag["attachment"]["module"], tag["attachment"]["param"])
    if tag["region"] == "bias_value":
        return (tag["base"], tag["attachment"]["module"], "bias")
    return (tag["node"], "input") if tag["region"] == "input" else (tag["base"],)


def program_record(graph: fx.Graph) -> dict[str, Any] | None:
    """Return the record of the program as a whole (its configs), kept in the first region's tag; None without one."""
    for node in graph.nodes:
        tag = region_tag(node)
        if tag and "header" in tag:
            return tag["header"]
    return None


def set_program_record(graph: fx.Graph, value: Mapping[str, Any]) -> None:
    """Store ``value`` as the record that :func:`header` returns."""
    for node in graph.nodes:
        tag = region_tag(node)
        if tag:
            node.meta["custom"] = {**node.meta["custom"], "adaptc": {**tag, "header": dict(value)}}
            return


def read_attachments(graph: fx.Graph, method_of: Callable[[Mapping[str, Any]], Method]) -> list[Attachment]:
    """Return the attachments of a graph in injection order; ``method_of`` is that of ``Attachment.from_dict``."""
    found: dict[str, Attachment] = {}
    for node in graph.nodes:
        tag = region_tag(node)
        if tag and tag["site"] not in found:
            found[tag["site"]] = Attachment.from_dict(tag["attachment"], method_of)
    return list(found.values())


def bypass_regions(graph: fx.Graph, ids: Collection[str]) -> list[dict[str, Any]]:
    """Let the readers of the regions of these attachments read what the regions replace, and remove the regions.

    A region of several attachments is removed if all are given. Slots stay, though nothing reads them. Returns the tags
    of the regions' results, in the order of the graph.
    """
    nodes = {n.name: n for n in graph.nodes}
    tagged = [(n, *found) for n in graph.nodes if (found := _bypass_tag(n)) is not None]
    gone = [(n, tag) for n, _, tag in tagged if all(site in ids for site in tag.get("sites") or (tag["site"],))]
    results = [(n, nodes[tag["base"]]) for n, tag in gone if tag["role"] == "out"]
    removed = {n for n, _ in gone}
    base_of = {out.name: base.name for out, base in results}
    for node, key, tag in tagged:
        if tag["role"] == "out" and tag["base"] in base_of and node not in removed:
            name = tag["base"]
            while name in base_of:
                name = base_of[name]
            node.meta["custom"] = {**node.meta["custom"], key: {**tag, "base": name}}
    tags = [tag for _, tag in gone if tag["role"] == "out"]
    for (out, base), tag in zip(reversed(results), reversed(tags), strict=True):
        out.replace_all_uses_with(base)
        for name in tag.get("attachment", {}).get("consumers", ()):
            make_grouped(nodes[name])
    for node, _ in reversed(gone):
        graph.erase_node(node)
    return tags


def _bypass_tag(node: fx.Node) -> tuple[str, dict[str, Any]] | None:
    """Return the key and the tag of a node of a region, of a program or of per-row adapters; None for other nodes."""
    custom = custom_meta(node)
    return next(((key, custom[key]) for key in ("adaptc", ROW_TAG_KEY) if key in custom), None)


def remove_regions(lifted: LiftedProgram, ids: Iterable[str]) -> int:
    """Remove the regions and the slots of these attachments from an opened program; return the number of regions."""
    before = [n.name for n in lifted.graph.nodes]
    tags = bypass_regions(lifted.graph, frozenset(ids))
    left = {n.name for n in lifted.graph.nodes}
    for name in before:
        if name not in left:
            lifted.nodes.pop(name, None)
    resized = {lifted.nodes[t["base"]] for t in tags if t["attachment"]["form"] == PROGRAM_FORM and t["base"] in left}
    propagate_fakes(lifted.graph, resized, lifted.program.graph_module)
    input_names = dict.fromkeys(n for t in tags for n in t.get("given", ()))
    attached = [t["attachment"] for t in tags]
    slot_fqns = dict.fromkeys(f for a in attached for f in [*a["slots"].values(), a["scale_slot"]] if f)
    for node in reversed(lifted.graph.nodes):
        tag = node_tag(node)
        if tag is not None and tag["role"] == COEFFICIENT_ROLE and not node.users:
            input_names.update(dict.fromkeys(tag.get("given", ())))
            lifted.graph.erase_node(node)
            lifted.nodes.pop(node.name, None)
    for name in input_names:
        if not lifted.nodes[name].users:
            lifted.remove_input(name)
    for fqn in slot_fqns:
        if fqn in lifted.placeholders and not lifted.placeholders[fqn].users:
            lifted.remove_tensor(fqn)
    return len(tags)
