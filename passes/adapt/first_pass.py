"""A pass of the base inside a program, in front of the program's own: its nodes once more, up to one of them.

An adapter that acts in the first pass has regions there, too, which read coefficients of their own.

Before: an opened program of the base alone, all of whose layers are as they were captured. After: in front of its nodes
copies of those that one of them is computed with, on the same inputs and parameters; whoever unloads adapters finds
them by their tags. A step of generation, which writes to the cache of its caller, takes one more of the same sizes, and
its first pass reads and writes that one. Any other part of a program that writes to what outlives a call cannot be done
twice, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import fx

from adaptc.errors import TargetError
from adaptc.passes.analysis.cache_inputs import all_of_cache, pass_prefix, passes_of
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.effects import memory_groups, written
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.regions import node_tag, site_op
from adaptc.passes.ir.trace import behind_inputs, inline, region_of

#: what of a node's meta its copy has; not whose module it is, which has the layer itself
_KEPT = ("val", "stack_trace", "tensor_meta", "unbacked_bindings")


def own_cache(lifted: Lifted) -> dict[fx.Node, fx.Node]:
    """Each input of the cache -> one that is added to the program for a first pass; none for a program that takes no
    cache."""
    made: dict[fx.Node, fx.Node] = {}
    prefix = pass_prefix(passes_of(lifted.specs))
    for node in all_of_cache(lifted):
        value = node.meta["val"]
        made[node] = lifted.add_input(f"{prefix}{node.name}", node, range(value.ndim), value.dtype)
    return made


def computed_before(
    lifted: Lifted,
    node: fx.Node,
    tag: Callable[[str], dict[str, Any]],
    instead: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
) -> tuple[fx.Node, dict[fx.Node, fx.Node]]:
    """The copy of ``node``, and node -> copy of all that it needed. ``instead``: inputs that may be written to, and
    what the copies read and write in their place, as much as the program does. Raises TargetError where that cannot
    be."""
    wanted = _needed(lifted, node, instead)
    first = next(n for n in lifted.graph.nodes if n.op != "placeholder")
    copies: dict[fx.Node, fx.Node] = {}
    with lifted.graph.inserting_before(first):
        for old in [n for n in lifted.graph.nodes if n in wanted]:
            new = lifted.graph.node_copy(old, lambda n: copies.get(n, instead.get(n, n)))
            custom = old.meta.get("custom")
            kept = {k: old.meta[k] for k in _KEPT if k in old.meta}
            new.meta = {**kept, "custom": {**(custom or {}), "adaptc": tag(str(len(copies)))}}
            copies[old] = new
            lifted.nodes[new.name] = new
    return copies[node], copies


def _needed(lifted: Lifted, node: fx.Node, free: Collection[fx.Node]) -> set[fx.Node]:
    """What a node is computed of, but for the inputs, with all that is written to the memory of it on the way.
    ``free``: inputs that may be written to."""
    order = {n: i for i, n in enumerate(lifted.graph.nodes)}
    memory = memory_groups(lifted.graph)
    writers: dict[fx.Node, list[fx.Node]] = {}
    for n in lifted.graph.nodes:
        for value in written(n):
            writers.setdefault(memory[value], []).append(n)
    # What reads the node's memory behind it, reads what was written there since. And the next call goes on from all
    # that this one wrote to its cache, with or without a use of it.
    roots = [node, *(w for n in free for w in writers.get(memory[n], ()))]
    last = max(order[n] for n in (*roots, *writers.get(memory[node], ())))
    lasting = {memory[n] for n in lifted.graph.find_nodes(op="placeholder") if n not in free}
    wanted, stack, seen = set(), roots, set()
    while stack:
        n = stack.pop()
        if n in seen or node_tag(n) is not None:
            continue
        seen.add(n)
        # An input that is written to may be read itself behind that.
        before = [w for w in writers.get(memory[n], ()) if n.op != "placeholder" or order[w] <= last]
        if before and memory[n] in lasting:
            raise TargetError(
                f"the program computes its last hidden state with {before[0].name!r} ({before[0].target}), which "
                "writes to what outlives the call, so a first pass of it would change the second. Capture the model "
                "without a cache (use_cache=False), and in evaluation mode"
            )
        stack += [w for w in before if order[w] <= last]
        if n.op != "placeholder":
            wanted.add(n)
            stack += n.all_input_nodes
    return wanted


def adapted(
    lifted: Lifted,
    attachments: Sequence[Attachment],
    copies: Mapping[fx.Node, fx.Node],
    coefficients: Mapping[str, fx.Node],
    tag: Callable[[str], dict[str, Any]],
) -> dict[fx.Node, fx.Node]:
    """Let adapters act on ``copies``, with these values for the coefficients they read: copy -> its value adapted. They
    are of methods that stand behind a layer."""
    out: dict[fx.Node, fx.Node] = {}
    there = set(lifted.graph.nodes)
    for a in attachments:
        scale = [] if a.scale_slot is None else [lifted.placeholders[a.scale_slot]]
        reads = [coefficients[n] for n in a.method.coefficients()]
        slots = [*(lifted.placeholders[f] for f in a.slots.values()), *reads, *scale]
        for copy in [copies[n] for c in a.consumers if (n := lifted.nodes[c]) in copies]:
            kind, inputs = behind_inputs(copy, copy)
            names = [*a.slots, *a.method.coefficients()]
            fakes = [n.meta["val"] for n in (*inputs, *slots)]
            region = region_of(a.method, site_op(lifted, a).at(copy), kind, names, bool(scale), fakes)
            users = list(copy.users)
            new = inline(lifted.graph, region, [*inputs, *slots], copy.next, copy, tag)
            for user in users:
                user.replace_input_with(copy, new)
            out[copy] = new
    for node in set(lifted.graph.nodes) - there:
        node.meta["custom"] = {"adaptc": tag("adapted")}
        lifted.nodes[node.name] = node
    return out
