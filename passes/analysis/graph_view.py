"""Print a graph as text, one line for each node, with the nodes that adapters added marked by site.

Takes the graph module of any program, with adapters or without, and does not change it. A line is

    name: dtype[sizes] = op(arguments)

Regions stand in a frame. Its heading names the site, the method and the adapter, read off the tags of the nodes
(``passes.protocol.regions``). Blocks that are graphs of their own follow under their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx

from adaptc.passes.protocol.regions import node_tag, region_tag
from adaptc.torch_typing import named_modules

BAR, TOP, END = "| ", "+ ", "+"


def format_graph(module: fx.GraphModule, names: Mapping[str, str], only_sites: Iterable[str] | None = None) -> str:
    """Return the graph as text.

    ``names`` maps placeholders to the parameters they stand for. ``only_sites`` limits the text to the regions of the
    sites with these ids, without other nodes; None shows the whole graph.
    """
    site_ids = None if only_sites is None else set(only_sites)
    blocks = [_format_nodes(module.graph, names, site_ids)]
    for name, inner in named_modules(module):
        if name and isinstance(inner, fx.GraphModule):
            found = _format_nodes(inner.graph, {}, site_ids)
            blocks.append([f"block {name}:", *(f"  {line}" for line in found)] if found else [])
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _format_nodes(graph: fx.Graph, names: Mapping[str, str], site_ids: set[str] | None) -> list[str]:
    out: list[str] = []
    open_site: str | None = None
    for node in graph.nodes:
        tag = node_tag(node)
        site = None if tag is None else tag["site"]
        if open_site is not None and site != open_site:
            out.append(END)
        if tag is not None and (site_ids is None or site in site_ids):
            if site != open_site:
                out.append(TOP + region_heading(tag))
            open_site = site
            out.append(BAR + format_node(node, names))
            if region := region_tag(node):
                out[-1] += f"  # stands for {region['base']}"
        else:
            open_site = None
            if site_ids is None:
                out.append(format_node(node, names))
    return out


def region_heading(tag: Mapping[str, Any]) -> str:
    """Return the heading of a region from a node's tag: `model.layers.0.q_proj.weight: lora, adapter 'default'`."""
    fqn, _, _ = tag["site"].rpartition("|")
    return f"{fqn}: {tag['method']}, adapter {tag['adapter']!r}"


def format_node(node: fx.Node, names: Mapping[str, str]) -> str:
    """Return one node as a line of text; ``names`` is as for :func:`format_graph`."""
    arguments = ", ".join([*map(repr, node.args), *(f"{k}={v!r}" for k, v in node.kwargs.items())])
    if node.op == "output":
        return f"return {arguments}"
    if node.op == "placeholder":
        what = f"  # {names[node.name]}" if node.name in names else "  # input"
        return f"{node.name}{_type_text(node)}{what}"
    return f"{node.name}{_type_text(node)} = {_target_text(node)}({arguments})"


def _target_text(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return f"{node.op} {target}"
    # str() of a torch op is short; that of a Python function has its address, so its name is used.
    return str(target) if hasattr(target, "overloadpacket") else getattr(target, "__name__", str(target))


def _type_text(node: fx.Node) -> str:
    """Return ': dtype[sizes]' of a node's value; '' for a value that is unknown, or not a single tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    return f": {str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
