"""Add a duplicated base pass to a program: copies of its nodes, up to one of them, that run before its own pass.

An adapter that acts in the duplicated pass has regions there, too, which read coefficients of their own.

Takes an opened program of the base alone, all of whose layers are as they were captured. The copies stand before its
nodes and read the same inputs and parameters. Unloading adapters finds the copies by their tags.

A step of generation writes to the cache of its caller. It gets a second cache of the same sizes as inputs, which the
duplicated pass reads and writes. A program that writes to anything else that outlives a call is refused, since the
write cannot be done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import fx

from adaptc.errors import TargetError
from adaptc.passes.analysis.cache_inputs import all_cache_inputs, count_passes, pass_prefix
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.mutation import memory_groups, written_inputs
from adaptc.passes.graph.ops import custom_meta
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.regions import node_tag, site_op
from adaptc.passes.protocol.trace import inline, output_region_inputs, trace_region

#: the meta that a copy keeps; not its module stack, since the layer is not called a second time
_COPIED_META = ("val", "stack_trace", "tensor_meta", "unbacked_bindings")


def add_second_cache(lifted: LiftedProgram) -> dict[fx.Node, fx.Node]:
    """Add a second cache to the program's inputs, and return each cache input -> its second one.

    Gives {} for a program that takes no cache.
    """
    made: dict[fx.Node, fx.Node] = {}
    prefix = pass_prefix(count_passes(lifted.input_specs))
    for node in all_cache_inputs(lifted):
        value = node.meta["val"]
        made[node] = lifted.add_input(f"{prefix}{node.name}", node, range(value.ndim), value.dtype)
    return made


def duplicate_before_graph(
    lifted: LiftedProgram,
    node: fx.Node,
    tag: Callable[[str], dict[str, Any]],
    replacements: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
) -> tuple[fx.Node, dict[fx.Node, fx.Node]]:
    """Copy ``node`` and all that it needs to the front of the graph; return its copy, and node -> copy for all of them.

    ``replacements`` maps inputs that the program may write to, to those that the copies read and write in their place.
    ``tag`` gives the tag of a copy from its number as text. Raises TargetError where the program writes to other memory
    that outlives the call.
    """
    wanted = _required_nodes(lifted, node, replacements)
    first = next(n for n in lifted.graph.nodes if n.op != "placeholder")
    copies: dict[fx.Node, fx.Node] = {}
    with lifted.graph.inserting_before(first):
        for old in [n for n in lifted.graph.nodes if n in wanted]:
            new = lifted.graph.node_copy(old, lambda n: copies.get(n, replacements.get(n, n)))
            kept = {k: old.meta[k] for k in _COPIED_META if k in old.meta}
            new.meta = {**kept, "custom": {**custom_meta(old), "adaptc": tag(str(len(copies)))}}
            copies[old] = new
            lifted.nodes[new.name] = new
    return copies[node], copies


def _required_nodes(lifted: LiftedProgram, node: fx.Node, writable: Collection[fx.Node]) -> set[fx.Node]:
    """Return the nodes that ``node`` is computed from, inputs excepted, with the in-place writes to their memory.

    ``writable`` are the inputs that may be written to; all writes to them are included. Raises TargetError for a write
    to another input.
    """
    order = {n: i for i, n in enumerate(lifted.graph.nodes)}
    memory = memory_groups(lifted.graph)
    writers: dict[fx.Node, list[fx.Node]] = {}
    for n in lifted.graph.nodes:
        for value in written_inputs(n):
            writers.setdefault(memory[value], []).append(n)
    # A later in-place write to the node's memory counts, too: its readers see it. And every write to the cache counts,
    # even one that nothing reads here, since the next call reads it.
    roots = [node, *(w for n in writable for w in writers.get(memory[n], ()))]
    last = max(order[n] for n in (*roots, *writers.get(memory[node], ())))
    lasting_memory = {memory[n] for n in lifted.graph.find_nodes(op="placeholder") if n not in writable}
    required, stack, seen = set[fx.Node](), roots, set[fx.Node]()
    while stack:
        n = stack.pop()
        if n in seen or node_tag(n) is not None:
            continue
        seen.add(n)
        # A program may read an input itself after a write to it, so writers of inputs count as well.
        before = [w for w in writers.get(memory[n], ()) if n.op != "placeholder" or order[w] <= last]
        if before and memory[n] in lasting_memory:
            raise TargetError(
                f"the program computes its last hidden state with {before[0].name!r} ({before[0].target}), which "
                "writes to what outlives the call, so a first pass of it would change the second. Capture the model "
                "without a cache (use_cache=False), and in evaluation mode"
            )
        stack += [w for w in before if order[w] <= last]
        if n.op != "placeholder":
            required.add(n)
            stack += n.all_input_nodes
    return required


def adapt_duplicate(
    lifted: LiftedProgram,
    attachments: Sequence[Attachment],
    copies: Mapping[fx.Node, fx.Node],
    coefficients: Mapping[str, fx.Node],
    tag: Callable[[str], dict[str, Any]],
) -> dict[fx.Node, fx.Node]:
    """Add adapters to the duplicated pass, and return copy -> its adapted value.

    ``copies`` maps nodes to their copies. ``coefficients`` has the nodes of the coefficients that the adapters read
    here, by name. The adapters must be of methods that act on a layer's output.
    """
    adapted_values: dict[fx.Node, fx.Node] = {}
    existing = set(lifted.graph.nodes)
    for a in attachments:
        scale = [] if a.scale_slot is None else [lifted.placeholders[a.scale_slot]]
        reads = [coefficients[n] for n in a.method.extra_inputs.coefficients()]
        slots = [*(lifted.placeholders[f] for f in a.slots.values()), *reads, *scale]
        for copy in [copies[n] for c in a.consumers if (n := lifted.nodes[c]) in copies]:
            kind, inputs = output_region_inputs(copy, copy)
            names = [*a.slots, *a.method.extra_inputs.coefficients()]
            fakes = [n.meta["val"] for n in (*inputs, *slots)]
            region = trace_region(a.method, site_op(lifted, a).as_called_by(copy), kind, names, bool(scale), fakes)
            users = list(copy.users)
            new = inline(lifted.graph, region, [*inputs, *slots], copy.next, copy, tag)
            for user in users:
                user.replace_input_with(copy, new)
            adapted_values[copy] = new
    for node in set(lifted.graph.nodes) - existing:
        node.meta["custom"] = {"adaptc": tag("adapted")}
        lifted.nodes[node.name] = node
    return adapted_values
