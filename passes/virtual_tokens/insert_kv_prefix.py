"""Put a KV prefix before the keys and values of a program's tokens, as if it were the beginning of a cache.

Takes an opened program whose slots are there, and a program attachment whose method has ``cached``. Afterwards every
attention of the tokens reads longer keys and values.

Masks, position_ids and rotary angles are computed a second time, from inputs that are longer by the prefix. The nodes
computed from tokens read the part of them that belongs to the call's own tokens. A mask keeps the prefix along the axis
of keys. So positions and masks are what they would be behind a cache of that length. All tensors computed from tokens
keep their sizes.

The program's own masks and positions stay in its graph, where :func:`~adaptc.passes.protocol.regions.remove_regions`
finds them. SDPA with ``is_causal`` aligns its first query with its first key. So its queries get rows in front, too,
and the results of these rows are cut away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from adaptc.errors import TargetError
from adaptc.passes.analysis.attention.attention_for_prefixes import (
    SideRead,
    find_activations,
    find_length_dependent,
    find_self_attentions,
    find_side_reads,
    is_size,
)
from adaptc.passes.analysis.attention.attention_patterns import SHAPE_VIEWS, AttentionCore
from adaptc.passes.analysis.tokens.token_inputs import Lookup
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.mutation import writers_by_node
from adaptc.passes.graph.ops import Op, argument, set_argument
from adaptc.passes.graph.propagate import propagate_fakes
from adaptc.passes.graph.symbolic_fakes import FreeSizeFakes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import ProgramMethod, ProgramValue
from adaptc.passes.protocol.regions import node_tag, site_op
from adaptc.passes.protocol.trace import inline
from adaptc.passes.virtual_tokens.trace_program_method import (
    fake_values_of,
    trace_for_all_sizes,
    trace_kv_prefix,
    trace_place,
)

aten = torch.ops.aten
Tag = Callable[[fx.Node, str, fx.Node], Callable[[str], dict[str, Any]]]


def insert_kv_prefix(
    lifted: LiftedProgram,
    a: Attachment,
    lookup: Lookup,
    places: Sequence[ProgramValue],
    extra_inputs: Mapping[str, fx.Node],
    tag: Tag,
) -> None:
    """Put the KV prefix of the attachment ``a`` before the keys and values of each attention.

    ``places`` are the inputs with one entry per token, ``extra_inputs`` the inputs that the method adds, by name.
    ``tag`` is as for ``inject_program_method``. Raises TargetError where masks or positions cannot be made longer, and
    PassError where the sizes of an op do not fit.
    """
    _KVPrefixInserter(lifted, a, lookup, extra_inputs, tag).run(places)


@dataclass
class _KVPrefixInserter:
    lifted: LiftedProgram
    attachment: Attachment
    lookup: Lookup
    extra_inputs: Mapping[str, fx.Node]
    tag: Tag
    #: nodes whose fake values are not computed yet
    without_value: set[fx.Node] = field(default_factory=set[fx.Node])
    #: mask, position or size -> its copy for the longer sequence
    longer_copies: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])

    def run(self, places: Sequence[ProgramValue]) -> None:
        method, op = self._method(), site_op(self.lifted, self.attachment)
        attentions = find_self_attentions(self.lifted, self.lookup, method.name)
        # Before the program changes below: edges are looked for in the program as it is.
        side_nodes = find_length_dependent(self.lifted, self.lookup)
        side_edges = list(find_side_reads(self.lifted, self.lookup, attentions, side_nodes))
        slots = {n: self.lifted.placeholders[f] for n, f in self.attachment.slots.items()}
        old_slot_values = (
            self._grow_empty_slots(slots, op) if method.virtual_token_count(fake_values_of(slots)) == 0 else {}
        )
        top = next(n for n in self.lifted.graph.nodes if n.op != "placeholder")
        more = [*slots.values(), *self.extra_inputs.values()]
        sizes = fake_values_of(slots), fake_values_of(self.extra_inputs)
        prefix = self._inline_region(trace_kv_prefix(method, *sizes, op), more, top)
        for place in places:
            code = trace_place(method, place, place.node.meta["val"], *sizes, [], op, {})
            self.longer_copies[place.node] = self._inline_region(code, [place.node, *more], top)
        self._copy_for_longer_inputs(side_edges, side_nodes)
        self._compute_fake_values()
        cuts: dict[tuple[fx.Node, bool], fx.Node | None] = {}
        for edge in side_edges:
            key = (edge.node, edge.is_mask)
            if key not in cuts:
                cuts[key] = self._cut_to_tokens(edge, prefix)
            if (own := cuts[key]) is not None:
                edge.reader.replace_input_with(edge.node, own)
        for i, core in enumerate(attentions.cores):
            self._prepend_keys_and_values(core, prefix, i)
        self._compute_fake_values()
        for slot, value in old_slot_values.items():
            slot.meta["val"] = value
        propagate_fakes(self.lifted.graph, set(old_slot_values), self.lifted.program.graph_module)

    def _grow_empty_slots(self, slots: Mapping[str, fx.Node], op: Op) -> dict[fx.Node, Tensor]:
        """Give slots two rows, to see which sizes grow by them; returns the fake values that the slots had before."""
        old_values: dict[fx.Node, Tensor] = {}
        for name, spec in self._method().slots(op).items():
            node = slots[name]
            value = node.meta["val"]
            shape = [2 if i in spec.free else size for i, size in enumerate(value.shape)]
            old_values[node] = value
            with nullcontext() if self.lifted.fake_mode is None else self.lifted.fake_mode:
                node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
        return old_values

    def _method(self) -> ProgramMethod:
        assert isinstance(self.attachment.method, ProgramMethod)
        return self.attachment.method

    # -- masks and positions -------------------------------------------------------------------------------------------

    def _copy_for_longer_inputs(self, side_edges: Sequence[SideRead], side_nodes: set[fx.Node]) -> None:
        """Copy the nodes that masks and positions are computed from, each after its original, for longer inputs."""
        needed, stack = set[fx.Node](), [edge.node for edge in side_edges]
        while stack:
            node = stack.pop()
            if node in needed or node not in side_nodes or node in self.longer_copies:
                continue
            needed.add(node)
            stack += [] if self._is_token_count(node) else node.all_input_nodes
        length, written_by = None, writers_by_node(self.lifted.graph)
        ids, inner_tag, tokens = (
            self.longer_copies[self.lookup.ids],
            self._inner_tag(),
            find_activations(self.lifted, self.lookup),
        )
        for node in list(self.lifted.graph.nodes):
            if node not in needed or not (
                self._is_token_count(node) or any(n in self.longer_copies for n in node.all_input_nodes)
            ):
                continue  # an encoder's states, for one, are what they are whatever a decoder reads
            self._check_can_lengthen(node, tokens, [w for w in written_by.get(node, ()) if w not in needed])
            if node.op == "placeholder":
                continue  # an integer input of the caller's, which the prefix does not change
            if self._is_token_count(node):
                if length is None:
                    with self.lifted.graph.inserting_after(ids):
                        length = self.lifted.graph.call_function(aten.sym_size.int, (ids, 1))
                    self._register_node(length, node, inner_tag)
                self.longer_copies[node] = length
                continue
            with self.lifted.graph.inserting_after(node):
                copied = self.lifted.graph.node_copy(node, lambda n: self.longer_copies.get(n, n))
            self._register_node(copied, node, inner_tag)
            self.longer_copies[node] = copied

    def _is_token_count(self, node: fx.Node) -> bool:
        """Return whether ``node`` is the number of the call's tokens."""
        length = self.lookup.ids.meta["val"].shape[1]
        return is_size(node) and str(node.meta["val"]) == str(length)

    def _check_can_lengthen(self, node: fx.Node, tokens: set[fx.Node], other_writers: Sequence[fx.Node]) -> None:
        name, tag = self._method().name, node_tag(node)
        if tag is not None:
            raise TargetError(
                f"{name}: the {tag['method']} adapter {tag['adapter']!r} changes {node.name!r}, which is computed "
                "beside the tokens and would be computed for more of them. Leave that layer out of its targets"
            )
        if "unbacked_bindings" in node.meta or node.op not in ("placeholder", "call_function") or other_writers:
            raise TargetError(
                f"{name}: {node.name!r} = {node.target} is computed beside the tokens, and it is not known what it is "
                "for more of them"
            )
        if is_size(node) and not self._is_token_count(node) and not tokens.isdisjoint(node.all_input_nodes):
            raise TargetError(
                f"{name}: {node.name!r} is {node.meta['val']}, a size that follows from the tokens in a way that is "
                "not known for more of them"
            )

    def _cut_to_tokens(self, edge: SideRead, prefix: fx.Node) -> fx.Node | None:
        """Return the node that the edge's reader reads from now on; None where the old one serves.

        It is the longer copy, cut to the call's own tokens. A mask keeps the prefix along its last axis, that of keys.
        """
        node, longer = edge.node, self.longer_copies.get(edge.node)
        if longer is None:
            return None
        old, new = node.meta["val"].shape, longer.meta["val"].shape
        axes = [i for i, (o, n) in enumerate(zip(old, new, strict=True)) if str(o) != str(n)]
        if edge.is_mask:
            axes = [i for i in axes if i != len(new) - 1]
        count = prefix.meta["val"].shape[2]
        if any(str(new[i] - count) != str(old[i]) for i in axes):
            raise TargetError(
                f"{self._method().name}: {node.name!r} of shape {tuple(map(str, old))} is computed beside the tokens, "
                f"and for more of them it has shape {tuple(map(str, new))}: it is not known which of it is theirs"
            )
        fakes = FreeSizeFakes()
        code = trace_for_all_sizes(
            _cut_prefix(axes), fakes, [fakes.fake_like(longer.meta["val"]), *self._free_prefix(fakes, prefix)], "cut"
        )
        return self._inline_region(code, [longer, prefix], longer.next, node, "beside")

    # -- attention -----------------------------------------------------------------------------------------------------

    def _prepend_keys_and_values(self, core: AttentionCore, prefix: fx.Node, index: int) -> None:
        for operand, at in ((core.key, 2 * index), (core.value, 2 * index + 1)):
            own, fakes = operand.node, FreeSizeFakes()
            inputs = [fakes.fake_like(own.meta["val"]), *self._free_prefix(fakes, prefix)]
            code = trace_for_all_sizes(_prepend_prefix(at, operand.is_transposed), fakes, inputs, "joined")
            out = self._inline_region(code, [own, prefix], operand.reader, own, "cached")
            set_argument(operand.reader, operand.position, out)
        for node, axis in (*core.length_views, *((n, -1) for n in core.scores)):
            self._free_key_axis(node, axis)
        if core.is_causal:
            self._pad_causal_queries(core, prefix)

    def _free_key_axis(self, node: fx.Node, axis: int) -> None:
        """Put -1 for the number of keys in the shape of a view, so that it holds for the longer keys, too."""
        if node.target in SHAPE_VIEWS and self._is_key_count(sizes := list(argument(node, 1)), axis):
            sizes[axis] = -1
            set_argument(node, 1, sizes)
            self.without_value.add(node)

    def _is_key_count(self, sizes: Sequence[Any], axis: int) -> bool:
        return isinstance(sizes[axis], fx.Node) and self._is_token_count(sizes[axis]) and -1 not in sizes

    def _pad_causal_queries(self, core: AttentionCore, prefix: fx.Node) -> None:
        """Pad the queries of an ``is_causal`` attention by the length of the prefix, and cut these results away."""
        node, query, fakes = core.node, core.query.node, FreeSizeFakes()
        users = list(node.users)
        inputs = [fakes.fake_like(query.meta["val"]), *self._free_prefix(fakes, prefix)]
        code = trace_for_all_sizes(_pad_queries, fakes, inputs, "padded")
        set_argument(node, core.query.position, self._inline_region(code, [query, prefix], node, query, "cached"))
        out = fakes.fake_like(node.meta["val"])
        code = trace_for_all_sizes(_cut_prefix([2]), fakes, [out, inputs[1]], "cut")
        own = self._inline_region(code, [node, prefix], node.next, node, "cached")
        for user in users:
            user.replace_input_with(node, own)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def _free_prefix(fakes: FreeSizeFakes, prefix: fx.Node) -> Iterator[Tensor]:
        yield fakes.fake_like(prefix.meta["val"], (2,), "count")

    def _inner_tag(self) -> Callable[[str], dict[str, Any]]:
        own = self.tag(self.lookup.ids, "cached", self.lookup.node)
        return lambda role: own(f"inner {role}")

    def _inline_region(
        self,
        code: fx.Graph,
        inputs: Sequence[fx.Node],
        before_node: fx.Node,
        base: fx.Node | None = None,
        kind: str = "",
    ) -> fx.Node:
        """Inline ``code`` before ``at`` as a region of ``kind`` that stands for ``base``, and return its output.

        Without a base it is an inner part of other regions.
        """
        before = set(self.lifted.graph.nodes)
        tag = self._inner_tag() if base is None else self.tag(base, kind, self.lookup.node)
        out = inline(self.lifted.graph, code, inputs, before_node, self.lookup.node, tag)
        added = set(self.lifted.graph.nodes) - before
        self.without_value |= added
        self.lifted.nodes.update({n.name: n for n in added})
        return out

    def _register_node(self, node: fx.Node, like: fx.Node, inner: Callable[[str], dict[str, Any]]) -> None:
        kept = {k: like.meta[k] for k in ("nn_module_stack", "stack_trace") if k in like.meta}
        node.meta = {**kept, "val": None, "torch_fn": (node.name, str(node.target))}
        node.meta["custom"] = {"adaptc": inner(node.name)}
        self.without_value.add(node)
        self.lifted.nodes[node.name] = node

    def _compute_fake_values(self) -> None:
        propagate_fakes(self.lifted.graph, self.without_value, self.lifted.program.graph_module)
        self.without_value.clear()


def _prepend_prefix(index: int, turned: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def prepend(x: Tensor, front: Tensor) -> Tensor:
        heads, groups = front[index], x.shape[1] // front.shape[1]
        if groups > 1:  # grouped-query attention: the program has repeated its own heads, so the prefix is, too
            heads = heads.unsqueeze(1).expand(-1, groups, -1, -1).reshape(x.shape[1], front.shape[2], front.shape[3])
        heads = heads.mT if turned else heads
        return torch.cat([heads.to(x.dtype).unsqueeze(0).expand(x.shape[0], -1, -1, -1), x], 3 if turned else 2)

    return prepend


def _cut_prefix(axes: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    def cut(x: Tensor, front: Tensor) -> Tensor:
        for axis in axes:
            x = x[(slice(None),) * axis + (slice(front.shape[2], None),)]
        return x

    return cut


def _pad_queries(x: Tensor, front: Tensor) -> Tensor:
    return F.pad(x, (0, 0, front.shape[2], 0))
