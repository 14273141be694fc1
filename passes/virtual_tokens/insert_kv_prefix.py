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
    Edge,
    changing,
    edges,
    find_attentions,
    inside,
    is_size,
)
from adaptc.passes.analysis.attention.attention_patterns import SHAPED, Core
from adaptc.passes.analysis.tokens.token_inputs import Lookup
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.mutation import writers
from adaptc.passes.graph.ops import Op, argument, set_argument
from adaptc.passes.graph.propagate import propagate
from adaptc.passes.graph.symbolic_fakes import FreeFakes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import ProgramMethod, ProgramPlace
from adaptc.passes.protocol.regions import node_tag, site_op
from adaptc.passes.protocol.trace import inline
from adaptc.passes.virtual_tokens.trace_program_method import code_of, traced, traced_cached, values_of

aten = torch.ops.aten
Tag = Callable[[fx.Node, str, fx.Node], Callable[[str], dict[str, Any]]]


def put_in_front(
    lifted: Lifted,
    a: Attachment,
    lookup: Lookup,
    places: Sequence[ProgramPlace],
    given: Mapping[str, fx.Node],
    tag: Tag,
) -> None:
    """Put the KV prefix of the attachment ``a`` before the keys and values of each attention.

    ``places`` are the inputs with one entry per token, ``given`` the inputs that the method adds, by name. ``tag`` is
    as for ``change_places``. Raises TargetError where masks or positions cannot be made longer, and PassError where the
    sizes of an op do not fit.
    """
    _InFront(lifted, a, lookup, given, tag).run(places)


@dataclass
class _InFront:
    lifted: Lifted
    a: Attachment
    lookup: Lookup
    given: Mapping[str, fx.Node]
    tag: Tag
    #: nodes whose fake values are not computed yet
    fresh: set[fx.Node] = field(default_factory=set)
    #: mask, position or size -> its copy for the longer sequence
    longer: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def run(self, places: Sequence[ProgramPlace]) -> None:
        method, op = self._method(), site_op(self.lifted, self.a)
        attentions = find_attentions(self.lifted, self.lookup, method.name)
        # Before the program changes below: edges are looked for in the program as it is.
        beside = changing(self.lifted, self.lookup)
        found = list(edges(self.lifted, self.lookup, attentions, beside))
        slots = {n: self.lifted.placeholders[f] for n, f in self.a.slots.items()}
        none = self._some(slots, op) if method.lengthens(values_of(slots)) == 0 else {}
        top = next(n for n in self.lifted.graph.nodes if n.op != "placeholder")
        more = [*slots.values(), *self.given.values()]
        sizes = values_of(slots), values_of(self.given)
        rows = self._inlined(traced_cached(method, *sizes, op), more, top)
        for place in places:
            code = traced(method, place, place.node.meta["val"], *sizes, [], op, {})
            self.longer[place.node] = self._inlined(code, [place.node, *more], top)
        self._lengthen(found, beside)
        self._propagate()
        cuts: dict[tuple[fx.Node, bool], fx.Node | None] = {}
        for edge in found:
            key = (edge.node, edge.masks)
            if key not in cuts:
                cuts[key] = self._cut(edge, rows)
            if (own := cuts[key]) is not None:
                edge.reader.replace_input_with(edge.node, own)
        for i, core in enumerate(attentions.cores):
            self._attend(core, rows, i)
        self._propagate()
        for slot, value in none.items():
            slot.meta["val"] = value
        propagate(self.lifted.graph, set(none), self.lifted.program.graph_module)

    def _some(self, slots: Mapping[str, fx.Node], op: Op) -> dict[fx.Node, Tensor]:
        """Give slots two rows, to see which sizes grow by them; returns the fake values that the slots had before."""
        had: dict[fx.Node, Tensor] = {}
        for name, spec in self._method().slots(op).items():
            node = slots[name]
            value = node.meta["val"]
            shape = [2 if i in spec.free else size for i, size in enumerate(value.shape)]
            had[node] = value
            with nullcontext() if self.lifted.fake_mode is None else self.lifted.fake_mode:
                node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
        return had

    def _method(self) -> ProgramMethod:
        assert isinstance(self.a.method, ProgramMethod)
        return self.a.method

    # -- masks and positions -------------------------------------------------------------------------------------------

    def _lengthen(self, found: Sequence[Edge], beside: set[fx.Node]) -> None:
        """Copy the nodes that masks and positions are computed from, each after its original, for longer inputs."""
        needed, stack = set(), [edge.node for edge in found]
        while stack:
            node = stack.pop()
            if node in needed or node not in beside or node in self.longer:
                continue
            needed.add(node)
            stack += [] if self._counts(node) else node.all_input_nodes
        length, written_by = None, writers(self.lifted.graph)
        ids, inner, tokens = self.longer[self.lookup.ids], self._inner(), inside(self.lifted, self.lookup)
        for node in list(self.lifted.graph.nodes):
            if node not in needed or not (self._counts(node) or any(n in self.longer for n in node.all_input_nodes)):
                continue  # an encoder's states, for one, are what they are whatever a decoder reads
            self._check(node, tokens, [w for w in written_by.get(node, ()) if w not in needed])
            if node.op == "placeholder":
                continue  # an integer input of the caller's, which the prefix does not change
            if self._counts(node):
                if length is None:
                    with self.lifted.graph.inserting_after(ids):
                        length = self.lifted.graph.call_function(aten.sym_size.int, (ids, 1))
                    self._new(length, node, inner)
                self.longer[node] = length
                continue
            with self.lifted.graph.inserting_after(node):
                copied = self.lifted.graph.node_copy(node, lambda n: self.longer.get(n, n))
            self._new(copied, node, inner)
            self.longer[node] = copied

    def _counts(self, node: fx.Node) -> bool:
        """Return whether ``node`` is the number of the call's tokens."""
        length = self.lookup.ids.meta["val"].shape[1]
        return is_size(node) and str(node.meta["val"]) == str(length)

    def _check(self, node: fx.Node, tokens: set[fx.Node], written_by: Sequence[fx.Node]) -> None:
        name, tag = self._method().name, node_tag(node)
        if tag is not None:
            raise TargetError(
                f"{name}: the {tag['method']} adapter {tag['adapter']!r} changes {node.name!r}, which is computed "
                "beside the tokens and would be computed for more of them. Leave that layer out of its targets"
            )
        if "unbacked_bindings" in node.meta or node.op not in ("placeholder", "call_function") or written_by:
            raise TargetError(
                f"{name}: {node.name!r} = {node.target} is computed beside the tokens, and it is not known what it is "
                "for more of them"
            )
        if is_size(node) and not self._counts(node) and not tokens.isdisjoint(node.all_input_nodes):
            raise TargetError(
                f"{name}: {node.name!r} is {node.meta['val']}, a size that follows from the tokens in a way that is "
                "not known for more of them"
            )

    def _cut(self, edge: Edge, rows: fx.Node) -> fx.Node | None:
        """Return the node that the edge's reader reads from now on; None where the old one serves.

        It is the longer copy, cut to the call's own tokens. A mask keeps the prefix along its last axis, that of keys.
        """
        node, longer = edge.node, self.longer.get(edge.node)
        if longer is None:
            return None
        old, new = node.meta["val"].shape, longer.meta["val"].shape
        axes = [i for i, (o, n) in enumerate(zip(old, new, strict=True)) if str(o) != str(n)]
        if edge.masks:
            axes = [i for i in axes if i != len(new) - 1]
        count = rows.meta["val"].shape[2]
        if any(str(new[i] - count) != str(old[i]) for i in axes):
            raise TargetError(
                f"{self._method().name}: {node.name!r} of shape {tuple(map(str, old))} is computed beside the tokens, "
                f"and for more of them it has shape {tuple(map(str, new))}: it is not known which of it is theirs"
            )
        fakes = FreeFakes()
        code = code_of(_cut(axes), fakes, [fakes.like(longer.meta["val"]), *self._rows(fakes, rows)], "cut")
        return self._inlined(code, [longer, rows], longer.next, node, "beside")

    # -- attention -----------------------------------------------------------------------------------------------------

    def _attend(self, core: Core, rows: fx.Node, index: int) -> None:
        for operand, at in ((core.key, 2 * index), (core.value, 2 * index + 1)):
            own, fakes = operand.node, FreeFakes()
            inputs = [fakes.like(own.meta["val"]), *self._rows(fakes, rows)]
            code = code_of(_joined(at, operand.turned), fakes, inputs, "joined")
            out = self._inlined(code, [own, rows], operand.reader, own, "cached")
            set_argument(operand.reader, operand.at, out)
        for node, axis in (*core.views, *((n, -1) for n in core.scores)):
            self._free(node, axis)
        if core.orders:
            self._order(core, rows)

    def _free(self, node: fx.Node, axis: int) -> None:
        """Put -1 for the number of keys in the shape of a view, so that it holds for the longer keys, too."""
        if node.target in SHAPED and self._counts_keys(sizes := list(argument(node, 1)), axis):
            sizes[axis] = -1
            set_argument(node, 1, sizes)
            self.fresh.add(node)

    def _counts_keys(self, sizes: Sequence[Any], axis: int) -> bool:
        return isinstance(sizes[axis], fx.Node) and self._counts(sizes[axis]) and -1 not in sizes

    def _order(self, core: Core, rows: fx.Node) -> None:
        """Pad the queries of an ``is_causal`` attention by the length of the prefix, and cut these results away."""
        node, query, fakes = core.node, core.query.node, FreeFakes()
        users = list(node.users)
        inputs = [fakes.like(query.meta["val"]), *self._rows(fakes, rows)]
        code = code_of(_padded, fakes, inputs, "padded")
        set_argument(node, core.query.at, self._inlined(code, [query, rows], node, query, "cached"))
        out = fakes.like(node.meta["val"])
        code = code_of(_cut([2]), fakes, [out, inputs[1]], "cut")
        own = self._inlined(code, [node, rows], node.next, node, "cached")
        for user in users:
            user.replace_input_with(node, own)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def _rows(fakes: FreeFakes, rows: fx.Node) -> Iterator[Tensor]:
        yield fakes.like(rows.meta["val"], (2,), "count")

    def _inner(self) -> Callable[[str], dict[str, Any]]:
        own = self.tag(self.lookup.ids, "cached", self.lookup.node)
        return lambda role: own(f"inner {role}")

    def _inlined(
        self,
        code: fx.Graph,
        inputs: Sequence[fx.Node],
        at: fx.Node,
        base: fx.Node | None = None,
        kind: str = "",
    ) -> fx.Node:
        """Inline ``code`` before ``at`` as a region of ``kind`` that stands for ``base``, and return its output.

        Without a base it is an inner part of other regions.
        """
        before = set(self.lifted.graph.nodes)
        tag = self._inner() if base is None else self.tag(base, kind, self.lookup.node)
        out = inline(self.lifted.graph, code, inputs, at, self.lookup.node, tag)
        added = set(self.lifted.graph.nodes) - before
        self.fresh |= added
        self.lifted.nodes.update({n.name: n for n in added})
        return out

    def _new(self, node: fx.Node, like: fx.Node, inner: Callable[[str], dict[str, Any]]) -> None:
        kept = {k: like.meta[k] for k in ("nn_module_stack", "stack_trace") if k in like.meta}
        node.meta = {**kept, "val": None, "torch_fn": (node.name, str(node.target))}
        node.meta["custom"] = {"adaptc": inner(node.name)}
        self.fresh.add(node)
        self.lifted.nodes[node.name] = node

    def _propagate(self) -> None:
        propagate(self.lifted.graph, self.fresh, self.lifted.program.graph_module)
        self.fresh.clear()


def _joined(index: int, turned: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def joined(x: Tensor, front: Tensor) -> Tensor:
        heads, groups = front[index], x.shape[1] // front.shape[1]
        if groups > 1:  # grouped-query attention: the program has repeated its own heads, so the prefix is, too
            heads = heads.unsqueeze(1).expand(-1, groups, -1, -1).reshape(x.shape[1], front.shape[2], front.shape[3])
        heads = heads.mT if turned else heads
        return torch.cat([heads.to(x.dtype).unsqueeze(0).expand(x.shape[0], -1, -1, -1), x], 3 if turned else 2)

    return joined


def _cut(axes: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    def cut(x: Tensor, front: Tensor) -> Tensor:
        for axis in axes:
            x = x[(slice(None),) * axis + (slice(front.shape[2], None),)]
        return x

    return cut


def _padded(x: Tensor, front: Tensor) -> Tensor:
    return F.pad(x, (0, 0, front.shape[2], 0))
