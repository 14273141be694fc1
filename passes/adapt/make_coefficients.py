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
from adaptc.passes.adapt.duplicate_base_pass import adapt_duplicate, add_second_cache, duplicate_before_graph
from adaptc.passes.analysis.tokens.last_hidden import find_last_hidden, last_hidden_sizes
from adaptc.passes.analysis.tokens.row_axes import find_batch_input
from adaptc.passes.analysis.tokens.token_axes import why_not_per_token
from adaptc.passes.analysis.tokens.token_inputs import find_lookups
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.propagate import propagate_fakes
from adaptc.passes.graph.symbolic_fakes import FreeSizeFakes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.coefficients import Coefficient, DuplicatedPass, ExtraInput
from adaptc.passes.protocol.parts.method_part import Slot
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.passes.protocol.regions import BASE_PASS_KEY, COEFFICIENT_ROLE, added_inputs, site_op
from adaptc.passes.protocol.trace import inline, trace_function

_NO_HIDDEN = (
    ": hidden_size must be that of the model, and the model one that gives logits, or hidden states, for its tokens"
)


@dataclass
class CoefficientMaker:
    """The coefficients of one program.

    ``adapter_count`` is None, or the number of adapters along a first axis of the slots. The coefficients then have
    such an axis, too. ``attachments`` are all that the program gets. ``nodes_by_key`` maps what a coefficient is made
    from to its node.
    """

    lifted: LiftedProgram
    adapter_count: int | None = None
    attachments: Sequence[Attachment] = ()
    nodes_by_key: dict[Any, fx.Node] = field(default_factory=dict[Any, fx.Node])
    #: coefficient that is an input of a step -> what it is made from in other programs
    step_inputs: dict[str, Any] = field(default_factory=dict[str, Any])

    def with_coefficients(self, a: Attachment) -> Attachment:
        """Return the attachment with the nodes of the coefficients that it reads, computing those that are missing.

        Raises TargetError for a site whose output does not have one entry per token, or no rows for an added input.
        """
        added: Mapping[str, ExtraInput] = {} if isinstance(a.method, ProgramMethod) else a.method.extra_inputs.extras()
        extra_inputs = {name: self._extra_input(a, name, extra).name for name, extra in added.items()}
        coefficients = a.method.extra_inputs.coefficients()
        if not coefficients:
            return replace(a, reads=extra_inputs) if extra_inputs else a
        ids = self._token_ids(a)
        for name in a.consumers:
            if why := why_not_per_token(ids, self.lifted.nodes[name]):
                raise TargetError(
                    f"{a.fqn!r} cannot be adapted by {a.method.name}, which acts on some tokens and not on others: "
                    f"{why}. Leave the module out of the targets."
                )
        return replace(
            a, reads={n: self._coefficient_node(a, n, c, ids).name for n, c in coefficients.items()} | extra_inputs
        )

    def _extra_input(self, a: Attachment, name: str, extra: ExtraInput) -> fx.Node:
        """Return the input that a method adds, with a value for each batch row of the site's output.

        Raises TargetError where no input of the program tells how many rows there are.
        """
        rows = [find_batch_input(self.lifted, self.lifted.nodes[c]) for c in a.consumers]
        row_input = rows[0] if rows else None
        if row_input is None or any(r is not row_input for r in rows):
            raise TargetError(
                f"{a.fqn!r} cannot be adapted by {a.method.name}, which reads {name!r} for each row of a batch: no "
                f"input of the program has a row for each place along the first axis of the layer's output. Leave the "
                f"module out of the targets, or capture the model with a batch of its own size that is free."
            )
        size = row_input.meta["val"].shape[0]
        key = (name, str(size))
        if key not in self.nodes_by_key:
            known = {str(n.meta["val"].shape[0]): n for n in added_inputs(self.lifted) if _is_input_of(n.name, name)}
            node = known.get(str(size))
            if node is None:
                first = not known and not any(k[0] == name for k in self.nodes_by_key if isinstance(k[0], str))
                called = name if first else f"decoder_{name}"
                node = self.lifted.add_input(called, row_input, [0], extra.dtype)
            self.nodes_by_key[key] = node if self.adapter_count is None else self._repeat_for_adapters(a, name, node)
        return self.nodes_by_key[key]

    def _repeat_for_adapters(self, a: Attachment, name: str, node: fx.Node) -> fx.Node:
        """Return ``node`` repeated for each adapter along a new first axis: a caller gives each row its own value."""
        count = self.adapter_count or 0

        def repeat(value: Tensor) -> Tensor:
            return value.unsqueeze(0).expand(count, *[-1] * value.ndim)

        region = trace_function(repeat, [node.meta["val"]])
        first = next(n for n in self.lifted.graph.nodes if n.op != "placeholder")
        before = set(self.lifted.graph.nodes)
        out = inline(self.lifted.graph, region, [node], first, node, _tags(a, name, node))
        self.lifted.nodes.update({n.name: n for n in set(self.lifted.graph.nodes) - before})
        return out

    def _token_ids(self, a: Attachment) -> fx.Node:
        found = dict.fromkeys(x.ids for x in find_lookups(self.lifted))
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

    def _coefficient_node(self, a: Attachment, name: str, coefficient: Coefficient, ids: fx.Node) -> fx.Node:
        fqns = tuple(a.slots[s] for s in coefficient.slots)
        key = (coefficient.make, fqns, coefficient.base_pass)
        spec = self.lifted.input_specs.get(name)
        if spec is not None and spec.kind == InputKind.USER_INPUT:
            if self.step_inputs.setdefault(name, key) != key:
                raise TargetError(
                    f"the program takes {name!r} as an input, one for all its adapters: {a.method.name} of several "
                    "cannot be told apart in it. Give each a program of its own"
                )
            if key not in self.nodes_by_key:
                node = self.lifted.nodes[name]
                self.nodes_by_key[key] = (
                    node if self.adapter_count is None else self._repeat_for_adapters(a, name, node)
                )
        if key not in self.nodes_by_key:
            first = next(n for n in self.lifted.graph.nodes if n.op != "placeholder")
            if coefficient.base_pass is None:
                self.nodes_by_key[key] = self._inline_function(
                    a, name, coefficient.make, coefficient.slots, ids, ids, first
                )
            else:
                hidden = self._hidden_state(a, name, coefficient, coefficient.base_pass, ids)
                self.nodes_by_key[key] = self._inline_function(
                    a, name, coefficient.make, coefficient.slots, hidden, ids, first
                )
        return self.nodes_by_key[key]

    def _inline_function(
        self,
        a: Attachment,
        name: str,
        make: Any,
        slot_names: Sequence[str],
        source: fx.Node,
        ids: fx.Node,
        before_node: fx.Node,
    ) -> fx.Node:
        """Add ``make(of, *slots)`` before the node ``before``, and return its output; ``names`` are those of slots."""
        slots = [self.lifted.placeholders[a.slots[s]] for s in slot_names]
        specs = a.method.slots(site_op(self.lifted, a))
        values = [(n.meta["val"], s, specs[s]) for n, s in zip(slots, slot_names, strict=True)]
        region = _trace_function(make, name, source.meta["val"], values, self.adapter_count)
        there = set(self.lifted.graph.nodes)
        out = inline(self.lifted.graph, region, [source, *slots], before_node, ids, _tags(a, name, ids))
        new = set(self.lifted.graph.nodes) - there
        propagate_fakes(self.lifted.graph, new, self.lifted.program.graph_module)
        self.lifted.nodes.update({n.name: n for n in new})
        return out

    def _hidden_state(
        self, a: Attachment, name: str, coefficient: Coefficient, base_pass: DuplicatedPass, ids: fx.Node
    ) -> fx.Node:
        """Return the last hidden state of a duplicated base pass, which is added where it is not there yet.

        Raises TargetError where the program has no last hidden state of the wanted width.
        """
        key = (base_pass.hidden_size, base_pass.make and (base_pass.make, tuple(a.slots[s] for s in coefficient.slots)))
        if key in self.nodes_by_key:
            return self.nodes_by_key[key]
        hidden = find_last_hidden(self.lifted, ids, base_pass.hidden_size)
        if hidden is None:
            widths = " or ".join(map(str, last_hidden_sizes(self.lifted, ids)[:1]))
            raise TargetError(
                f"{a.method.name} is weighed by the last hidden state of the program, and its head reads none that is "
                f"(batch, length, {base_pass.hidden_size}), nor does it give one"
                + (f"; it reads one of {widths} values: give hidden_size={widths}" if widths else _NO_HIDDEN)
            )
        tags, first_op = _tags(a, name, ids), next(n for n in self.lifted.graph.nodes if n.op != "placeholder")
        second_cache = add_second_cache(self.lifted)
        copied_hidden, copies = duplicate_before_graph(self.lifted, hidden, tags, second_cache)
        if base_pass.make is not None:
            if self.adapter_count is not None:
                raise TargetError(
                    f"{a.method.name} acts in its own first pass (scaling_pass_value), which adapters of several rows "
                    "cannot: give each a program of its own"
                )
            front = next(iter(copies.values())) if copies else first_op
            constant = self._inline_function(a, name, base_pass.make, coefficient.slots, ids, ids, front)
            own = [
                b for b in self.attachments if b.adapter == a.adapter and name in b.method.extra_inputs.coefficients()
            ]
            copied_hidden = adapt_duplicate(self.lifted, own, copies, {name: constant}, tags).get(
                copied_hidden, copied_hidden
            )
        more = {BASE_PASS_KEY: True} | ({"given": [n.name for n in second_cache.values()]} if second_cache else {})
        copied_hidden.meta["custom"] = {"adaptc": {**copied_hidden.meta["custom"]["adaptc"], **more}}
        self.nodes_by_key[key] = copied_hidden
        return copied_hidden


def _is_input_of(node: str, name: str) -> bool:
    return node in (name, f"decoder_{name}")


def _tags(a: Attachment, name: str, ids: fx.Node) -> Callable[[str], dict[str, Any]]:
    tag: Mapping[str, Any] = {"method": a.method.name, "adapter": a.adapter, "site": f"{ids.name}|{name}"}
    return lambda role: {**tag, "role": COEFFICIENT_ROLE}


@with_graph_lock
def _trace_function(
    make: Callable[..., Tensor],
    name: str,
    source: Tensor,
    slots: Sequence[tuple[Tensor, str, Slot]],
    adapter_count: int | None,
) -> fx.Graph:
    """Return ``make`` as a graph that holds for all sizes; its placeholders are ``source`` and the slots.

    ``adapter_count`` is as for :class:`CoefficientMaker`. Raises MethodError where ``make`` reads anything but its
    arguments.
    """
    fakes, front = FreeSizeFakes(), int(adapter_count is not None)
    free = [{i + front: f"free {n}" for i, n in spec.size_names(slot).items()} for _, slot, spec in slots]
    inputs = [
        fakes.fake_like(source),
        *(fakes.fake_like(t, names) for (t, _, _), names in zip(slots, free, strict=True)),
    ]

    def for_each_adapter(source: Tensor, *slots: Tensor) -> Tensor:
        return torch.stack([make(source, *(s.select(0, k) for s in slots)) for k in range(adapter_count or 0)])

    with fakes.mode, torch.no_grad():  # in the mode, so that an arange is one of its fakes and not a tensor
        graph = make_fx(make if adapter_count is None else for_each_adapter, pre_dispatch=True)(*inputs).graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise MethodError(f"the coefficient {name!r} may only be made of its arguments, but reads {node.target!r}")
        node.meta["val"] = None  # its symbolic sizes belong to the shape environment of this trace alone
    return graph
