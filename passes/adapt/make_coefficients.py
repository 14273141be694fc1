"""Make the coefficients of adapters, once in a program, for the regions that read them.

Before: an opened program whose slots are there, and attachments of which some read coefficients
(``passes.ir.coefficients``). After: in front of all other nodes those that compute them of the caller's token ids, or
of what a first pass of the base makes of the call, each once for all sites that have the same slots, and the
attachments with the names of their nodes. The nodes' tags say whose they are; a site whose output has not a place for
each token is refused.

A program that has an input called as a coefficient is given it: a step of a generation sees its own tokens, and what
invoked the adapter may have come before them. A first pass of such a step has a cache of its own among the inputs.

Inputs that methods at layers add to a program are among the coefficients of a site: each is one keyword more, with a
value for each row. A program whose parts have rows of their own, as an encoder and the decoder of a step, has one for
either: that of the rows of later inputs is called ``decoder_`` and the name.
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
from adaptc.passes.adapt.first_pass import adapted, computed_before, own_cache
from adaptc.passes.analysis.last_hidden import hidden_widths, last_hidden
from adaptc.passes.analysis.row_axes import input_with_rows
from adaptc.passes.analysis.token_axes import why_not_along
from adaptc.passes.analysis.token_places import lookups
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.coefficients import Coefficient, Extra, FirstPass
from adaptc.passes.ir.exclusive import exclusive
from adaptc.passes.ir.free_fakes import FreeFakes
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.method_hooks import Slot
from adaptc.passes.ir.program_method import ProgramMethod
from adaptc.passes.ir.propagate import propagate
from adaptc.passes.ir.regions import COEFFICIENT, FIRST_PASS, added_inputs, site_op
from adaptc.passes.ir.trace import inline, trace

_NO_HIDDEN = (
    ": hidden_size must be that of the model, and the model one that gives logits, or hidden states, for its tokens"
)


@dataclass
class Coefficients:
    """Those of one program. ``count``: None, or of how many adapters the slots have an axis in front; so have then the
    coefficients. ``attachments``: all that the program gets. ``made``: what they are made of -> their nodes."""

    lifted: Lifted
    count: int | None = None
    attachments: Sequence[Attachment] = ()
    made: dict[Any, fx.Node] = field(default_factory=dict)
    #: inputs that a step has for coefficients -> what these are made of elsewhere
    given: dict[str, Any] = field(default_factory=dict)

    def of(self, a: Attachment) -> Attachment:
        """The attachment with the coefficients it reads, made where they are not yet. Raises TargetError for a site
        that has no place for them."""
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
        """The input that a method adds, with a value for each row of what its site computes."""
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
        """The same for each of several adapters, whose axis is in front: a caller gives each row what is its own."""
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
        """What ``make`` makes of a value and of slots, in front of ``before``."""
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
        """The last hidden state of a pass in front of the program's own. Raises TargetError where there is none."""
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
    """What makes a coefficient, as a graph whose placeholders are what it is made of and the slots, for all sizes of
    both."""
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
        node.meta["val"] = None  # of an environment that is gone
    return graph
