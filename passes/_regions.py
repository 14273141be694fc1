"""Regions: the tagged nodes adapters added to a program. The tags are the only record of what was injected.

The node that carries a region's result has role "out" and holds the whole attachment; a program saved to a file and
loaded elsewhere is understood from it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx

from adaptc.passes._kinds import make_grouped
from adaptc.passes._lifted import Lifted
from adaptc.passes._method import Attachment, Method


def node_tag(node: fx.Node) -> dict[str, Any] | None:
    """The adaptc tag of any region node."""
    custom = node.meta.get("custom")
    return custom.get("adaptc") if isinstance(custom, dict) else None


def region_tag(node: fx.Node) -> dict[str, Any] | None:
    """The tag of a region's result; None for all other nodes."""
    tag = node_tag(node)
    return tag if tag is not None and tag.get("role") == "out" else None


def slot_nodes(a: Attachment, placeholders: Mapping[str, fx.Node]) -> list[fx.Node]:
    """What every region of a site reads last: its slots, then its scale if it has one."""
    names = [*a.slots.values(), *([] if a.scale is None else [a.scale])]
    return [placeholders[f] for f in names]


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
    """The attachments of a graph in injection order; ``method_of`` turns a tag into a method."""
    found: dict[str, Attachment] = {}
    for node in graph.nodes:
        tag = region_tag(node)
        if tag and tag["site"] not in found:
            found[tag["site"]] = Attachment(
                key=tag["key"],
                module=tag["module"],
                param=tag["param"],
                kind=tag["kind"],
                method=method_of(tag),
                adapter=tag["adapter"],
                form="weight" if tag["form"] in ("weight", "bias", "new_bias") else "apply",
                consumers=tuple(tag["consumers"]),
                slots=dict(tag["slots"]),
                scale=tag["scale"],
                entry=tag["entry"],
                name=tag["name"],
                tied=tag["tied"],
                variant=tag.get("variant", 0),
                why=tag.get("why", ""),
            )
    return list(found.values())


def remove_regions(lifted: Lifted, ids: Iterable[str]) -> int:
    """Take the regions of these attachments out of an opened program, and their slots; returns how many regions."""
    wanted = set(ids)
    outs: list[tuple[fx.Node, fx.Node]] = []
    inner: list[fx.Node] = []
    slots: dict[str, None] = {}
    for node in lifted.graph.nodes:
        tag = node_tag(node)
        if tag is None or tag["site"] not in wanted:
            continue
        inner.append(node)
        if tag["role"] == "out":
            outs.append((node, lifted.nodes[tag["base"]]))
            slots.update(dict.fromkeys([*tag["slots"].values(), *([tag["scale"]] if tag["scale"] else [])]))
    base_of = {out.name: base.name for out, base in outs}
    for node in lifted.graph.nodes:
        tag = region_tag(node)
        if tag is not None and tag["base"] in base_of and tag["site"] not in wanted:
            name = tag["base"]
            while name in base_of:
                name = base_of[name]
            node.meta["custom"] = {**node.meta["custom"], "adaptc": {**tag, "base": name}}
    for out, base in reversed(outs):
        out.replace_all_uses_with(base)
        for name in region_tag(out)["consumers"]:  # type: ignore[index]  # outs are nodes that have one
            make_grouped(lifted.nodes[name])
    for node in reversed(inner):
        lifted.graph.erase_node(node)
        lifted.nodes.pop(node.name, None)
    for fqn in slots:
        if fqn in lifted.placeholders and not lifted.placeholders[fqn].users:
            lifted.remove(fqn)
    return len(outs)
