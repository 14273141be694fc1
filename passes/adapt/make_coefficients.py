"""Compute the coefficients of adapters, once in a program, for the regions that read them.

Takes an opened program whose slots are there, and attachments of which some read coefficients
(``passes.protocol.coefficients``). Nodes before all others compute each coefficient once for all sites with the same
slots. They compute it from the caller's token ids, or from the last hidden state of a duplicated base pass. Each
attachment gets the names of its coefficients' nodes, and their tags say whose they are. A site whose output does not
have one entry per token is refused.

A program that has an input with a coefficient's name reads that input. A step of generation needs this: it sees only
its own tokens, and those that invoke the adapter may have come before. A duplicated base pass of such a step has a
cache of its own among the inputs.

Inputs that methods at layers add to a program are among the coefficients of a site. Each is one more keyword, with a
value for each row. An encoder and a decoder may have rows of their own. Then the program has one such input for each,
and the second is called ``decoder_`` and the name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import make_fx

from adaptc.errors import MethodError, TargetError, listing
from adaptc.passes.adapt.duplicate_base_pass import adapted, computed_before, own_cache
from adaptc.passes.analysis.tokens.last_hidden import hidden_widths, last_hidden
from adaptc.passes.analysis.tokens.row_axes import input_with_rows
from adaptc.passes.analysis.tokens.token_axes import why_not_along
from adaptc.passes.analysis.tokens.token_inputs import lookups
from adaptc.passes.graph.graph_lock import exclusive
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.propagate import propagate
from adaptc.passes.graph.symbolic_fakes import FreeFakes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.coefficients import Coefficient, Extra, FirstPass
from adaptc.passes.protocol.method_hooks import Slot
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.passes.protocol.regions import COEFFICIENT, FIRST_PASS, added_inputs, site_op
from adaptc.passes.protocol.trace import inline, trace

_NO_HIDDEN = (
    ": hidden_size must be that of the model, and the model one that gives logits, or hidden states, for its tokens"
)


@dataclass
class Coefficients:
    """The coefficients of one program.

    ``count`` is None, or the number of adapters along a first axis of the slots. The coefficients then have such an
    axis, too. ``attachments`` are all that the program gets. ``made`` maps what a coefficient is made from to its node.
    """

    lifted: Lifted
    count: int | None = None
    attachments: Sequence[Attachment] = ()
    made: dict[Any, fx.Node] = field(default_factory=dict)
    #: coefficient that is an input of a step -> what it is made from in other programs
    given: dict[str, Any] = field(default_factory=dict)

    def of(self, a: Attachment) -> Attachment:
        """Return the attachment with the nodes of the coefficients that it reads, computing those that are missing.

        Raises TargetError for a site whose output does not have one entry per token, or no rows for an added input.
        """
        added = {} if isinstance(a.method, ProgramMethod) else a.method.extras()
        given = {name: self._given(a, name, extra).name for name, extra in added.items()}
        wanted = a.method.coefficients()
        if not wanted:
            return replace(a, reads=given) if given else a
        ids = self._ids(a)
        for name in a.consumers:
            if why := why_not_along(ids, self.lifted.nodes[name]):
                raise TargetError(
                    f"{a.fqn!r} cannot be adapted by {a.method.name}, which acts on some tokens and not on others: "
                    f"{why}. Leave the module out of the targets."
                )
        return replace(a, reads={n: self._node(a, n, c, ids).name for n, c in wanted.items()} | given)

    def _given(self, a: Attachment, name: str, extra: Extra) -> fx.Node:
        """Return the input that a method adds, with a value for each batch row of the site's output.

        Raises TargetError where no input of the program tells how many rows there are.
        """
        rows = [input_with_rows(self.lifted, self.lifted.nodes[c]) for c in a.consumers]
        like = rows[0] if rows else None
        if like is None or any(r is not like for r in rows):
            raise TargetError(
                f"{a.fqn!r} cannot be adapted by {a.method.name}, which reads {name!r} for each row of a batch: no "
                f"input of the program has a row for each place along the first axis of the layer's output. Leave the "
                f"module out of the targets, or capture the model with a batch of its own size that is free."
            )
        size = like.meta["val"].shape[0]
        key = (name, str(size))
        if key not in self.made:
            known = {str(n.meta["val"].shape[0]): n for n in added_inputs(self.lifted) if _called(n.name, name)}
            node = known.get(str(size))
            if node is None:
                first = not known and not any(k[0] == name for k in self.made if isinstance(k[0], str))
                called = name if first else f"decoder_{name}"
                node = self.lifted.add_input(called, like, [0], extra.dtype)
            self.made[key] = node if self.count is None else self._stacked(a, name, node)
        return self.made[key]

    def _stacked(self, a: Attachment, name: str, node: fx.Node) -> fx.Node:
        """Return ``node`` repeated for each adapter along a new first axis: a caller gives each row its own value."""
        count = self.count or 0
        region = trace(lambda v: v.unsqueeze(0).expand(count, *[-1] * v.ndim), [node.meta["val"]])
        first = next(n for n in self.lifted.graph.nodes if n.op != "placeholder")
        before = set(self.lifted.graph.nodes)
        out = inline(self.lifted.graph, region, [node], first, node, _tags(a, name, node))
        self.lifted.nodes.update({n.name: n for n in set(self.lifted.graph.nodes) - before})
        return out

    def _ids(self, a: Attachment) -> fx.Node:
        found = dict.fromkeys(x.ids for x in lookups(self.lifted))
        named = [n for n in found if n.name == "input_ids"]
        if len(found) == 1 or (named and not any("input_ids" in n.name for n in found if n not in named)):
            ids = (named or list(found))[0]
            if ids.meta["val"].ndim == 2:
                return ids
        there = listing([n.name for n in found]) if found else "none"
        raise TargetError(
            f"{a.method.name} acts on each token of a call in its own way, and needs one input of token ids "
            f"(batch, length); of this one, those looked up in an embedding are: {there}. Capture a model that takes "
            "input_ids, and not inputs_embeds or the tokens of a decoder beside them."
        )

    def _node(self, a: Attachment, name: str, c: Coefficient, ids: fx.Node) -> fx.Node:
        fqns = tuple(a.slots[s] for s in c.slots)
        key = (c.make, fqns, c.first)
        spec = self.lifted.specs.get(name)
        if spec is not None and spec.kind == InputKind.USER_INPUT:
            if self.given.setdefault(name, key) != key:
                raise TargetError(
                    f"the program takes {name!r} as an input, one for all its adapters: {a.method.name} of several "
                    "cannot be told apart in it. Give each a program of its own"
                )
            if key not in self.made:
                node = self.lifted.nodes[name]
                self.made[key] = node if self.count is None else self._stacked(a, name, node)
        if key not in self.made:
            first = next(n for n in self.lifted.graph.nodes if n.op != "placeholder")
            if c.first is None:
                self.made[key] = self._inlined(a, name, c.make, c.slots, ids, ids, first)
            else:
                hidden = self._hidden(a, name, c, c.first, ids)
                self.made[key] = self._inlined(a, name, c.make, c.slots, hidden, ids, first)
        return self.made[key]

    def _inlined(
        self, a: Attachment, name: str, make: Any, names: Sequence[str], of: fx.Node, ids: fx.Node, before: fx.Node
    ) -> fx.Node:
        """Add ``make(of, *slots)`` before the node ``before``, and return its output; ``names`` are those of slots."""
        slots = [self.lifted.placeholders[a.slots[s]] for s in names]
        specs = a.method.slots(site_op(self.lifted, a))
        values = [(n.meta["val"], s, specs[s]) for n, s in zip(slots, names, strict=True)]
        region = _traced(make, name, of.meta["val"], values, self.count)
        there = set(self.lifted.graph.nodes)
        out = inline(self.lifted.graph, region, [of, *slots], before, ids, _tags(a, name, ids))
        new = set(self.lifted.graph.nodes) - there
        propagate(self.lifted.graph, new, self.lifted.program.graph_module)
        self.lifted.nodes.update({n.name: n for n in new})
        return out

    def _hidden(self, a: Attachment, name: str, c: Coefficient, first: FirstPass, ids: fx.Node) -> fx.Node:
        """Return the last hidden state of a duplicated base pass, which is added where it is not there yet.

        Raises TargetError where the program has no last hidden state of the wanted width.
        """
        key = (first.width, first.make and (first.make, tuple(a.slots[s] for s in c.slots)))
        if key in self.made:
            return self.made[key]
        found = last_hidden(self.lifted, ids, first.width)
        if found is None:
            widths = " or ".join(map(str, hidden_widths(self.lifted, ids)[:1]))
            raise TargetError(
                f"{a.method.name} is weighed by the last hidden state of the program, and its head reads none that is "
                f"(batch, length, {first.width}), nor does it give one"
                + (f"; it reads one of {widths} values: give hidden_size={widths}" if widths else _NO_HIDDEN)
            )
        tags, begin = _tags(a, name, ids), next(n for n in self.lifted.graph.nodes if n.op != "placeholder")
        caches = own_cache(self.lifted)
        made, copies = computed_before(self.lifted, found, tags, caches)
        if first.make is not None:
            if self.count is not None:
                raise TargetError(
                    f"{a.method.name} acts in its own first pass (scaling_pass_value), which adapters of several rows "
                    "cannot: give each a program of its own"
                )
            front = next(iter(copies.values())) if copies else begin
            constant = self._inlined(a, name, first.make, c.slots, ids, ids, front)
            own = [b for b in self.attachments if b.adapter == a.adapter and name in b.method.coefficients()]
            made = adapted(self.lifted, own, copies, {name: constant}, tags).get(made, made)
        more = {FIRST_PASS: True} | ({"given": [n.name for n in caches.values()]} if caches else {})
        made.meta["custom"] = {"adaptc": {**made.meta["custom"]["adaptc"], **more}}
        self.made[key] = made
        return made


def _called(node: str, name: str) -> bool:
    return node in (name, f"decoder_{name}")


def _tags(a: Attachment, name: str, ids: fx.Node) -> Callable[[str], dict[str, Any]]:
    tag: Mapping[str, Any] = {"method": a.method.name, "adapter": a.adapter, "site": f"{ids.name}|{name}"}
    return lambda role: {**tag, "role": COEFFICIENT}


@exclusive
def _traced(
    make: Callable[..., Tensor], name: str, of: Tensor, slots: Sequence[tuple[Tensor, str, Slot]], count: int | None
) -> fx.Graph:
    """Return ``make`` as a graph that holds for all sizes; its placeholders are ``of`` and the slots.

    ``count`` is as for :class:`Coefficients`. Raises MethodError where ``make`` reads anything but its arguments.
    """
    fakes, front = FreeFakes(), int(count is not None)
    free = [{i + front: f"free {n}" for i, n in spec.size_names(slot).items()} for _, slot, spec in slots]
    inputs = [fakes.like(of), *(fakes.like(t, names) for (t, _, _), names in zip(slots, free, strict=True))]

    def each(of: Tensor, *slots: Tensor) -> Tensor:
        return torch.stack([make(of, *(s.select(0, k) for s in slots)) for k in range(count or 0)])

    with fakes.mode, torch.no_grad():  # in the mode, so that an arange is one of its fakes and not a tensor
        graph = make_fx(make if count is None else each, pre_dispatch=True)(*inputs).graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise MethodError(f"the coefficient {name!r} may only be made of its arguments, but reads {node.target!r}")
        node.meta["val"] = None  # its symbolic sizes belong to the shape environment of this trace alone
    return graph
