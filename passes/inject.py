"""Inject adapters: rewrite the consumers of targeted parameters into adapter regions.

Before: a program, and for each site an Attachment with its slot tensors. After: for every attachment, lifted slots
(trainable ones parameters, the scale and frozen ones buffers) and, per consumer, a tagged region of pure ATen; base
parameters require no grad. With slots at their identity values the program computes exactly what it did. Each distinct
(method, op, shapes, dtypes) is traced once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.errors import PassError
from adaptc.passes._kinds import Op, op_of, operands
from adaptc.passes._lifted import Lifted
from adaptc.passes._method import Attachment
from adaptc.passes._pass import Pass, PassResult
from adaptc.passes._regions import region_tag
from adaptc.passes._trace import inline, region_of, signature_of
from adaptc.passes.find_sites import consumers, readers


@dataclass(frozen=True)
class Inject(Pass):
    """``values`` maps the FQNs of slots and scales to tensors; ``header`` is kept in the first region's tag."""

    name: ClassVar[str] = "inject"

    attachments: Sequence[Attachment] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)
    header: Mapping[str, Any] | None = field(default=None, repr=False)
    make: Callable[..., ExportedProgram] = field(default=ExportedProgram, repr=False)

    def apply(self, program: ExportedProgram) -> PassResult:
        lifted = Lifted(program)
        lifted.freeze()
        traces: dict[Any, fx.Graph] = {}
        done: list[Attachment] = []
        for i, attachment in enumerate(self.attachments):
            ready = self._lift(lifted, attachment)
            done.append(_Injector(lifted, ready, traces, self.header if i == 0 else None).run())
        return PassResult(lifted.finish(self.make), len(done), data=tuple(done))

    def _lift(self, lifted: Lifted, a: Attachment) -> Attachment:
        if a.fqn not in lifted.placeholders:
            raise PassError(f"the program has no parameter {a.fqn!r}")
        op = site_op(lifted, a)
        slots: dict[str, str] = {}
        for name, slot in a.method.slots(op).items():
            fqn = a.method.fqn(a.place, name, a.adapter)
            if fqn not in lifted.placeholders:  # else another site shares it
                lifted.add(fqn, as_lifted(self.values[fqn], slot.trainable))
            slots[name] = fqn
        scale_fqn = None if a.method.scale(op) is None else a.method.fqn(a.place, "scaling", a.adapter)
        if scale_fqn is not None and scale_fqn not in lifted.placeholders:
            lifted.add(scale_fqn, self.values[scale_fqn])
        return replace(a, slots=slots, scale=scale_fqn)


def as_lifted(value: Tensor, trainable: bool) -> Tensor:
    if trainable and not isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(value.detach(), requires_grad=value.is_floating_point())
    return value if trainable else value.detach()


def site_op(lifted: Lifted, a: Attachment) -> Op:
    """The op of an attachment's site in an opened program."""
    first = lifted.nodes.get(a.consumers[0]) if a.consumers else None
    return op_of(a.kind, lifted.tensor(a.fqn), first)


@dataclass
class _Injector:
    """One attachment being injected."""

    lifted: Lifted
    a: Attachment
    traces: dict[Any, fx.Graph]
    header: Mapping[str, Any] | None

    def run(self) -> Attachment:
        self.op = site_op(self.lifted, self.a)
        self.slot_nodes = [self.lifted.placeholders[f] for f in self.a.slots.values()]
        if self.a.scale is not None:
            self.slot_nodes.append(self.lifted.placeholders[self.a.scale])
        source = self._latest_weight(self.lifted.placeholders[self.a.fqn])
        pairs = [(n, s) for n, s in consumers(source) if n.name in self.a.consumers]
        if len({n.name for n, _ in pairs}) != len(self.a.consumers):
            raise PassError(f"site {self.a.id!r}: consumers {self.a.consumers} do not read {self.a.fqn!r}")
        wanted = "apply" if self.a.form in ("auto", "apply") and self.a.method.has_apply(self.op) else "weight"
        if self.a.form == "apply" and wanted != "apply":
            raise PassError(f"site {self.a.id!r}: {self.a.method.name} has no apply form for kind {self.a.kind!r}")
        if wanted == "apply":
            for node, _ in pairs:
                self.behind(node)
        else:
            self.in_front(source, [n for n, _ in pairs])
        return replace(self.a, form=wanted)

    def region(self, form: str, op: Op, inputs: Sequence[fx.Node]) -> fx.Graph:
        fakes = [n.meta["val"] for n in inputs]
        key = (self.a.method, form, op, signature_of(fakes))
        if key not in self.traces:
            scaled = self.a.scale is not None
            self.traces[key] = region_of(self.a.method, op, form, list(self.a.slots), scaled, fakes)
        return self.traces[key]

    def behind(self, node: fx.Node) -> None:
        """The apply form: y -> apply(x, y, W) for the outputs of one consumer."""
        x, w, _ = operands(node)
        y = self._latest(node)
        inputs = [x, y, w, *self.slot_nodes]
        region = self.region("apply", self.op.at(node), inputs)
        users = list(y.users)
        out = inline(self.lifted.graph, region, inputs, y.next, node, self._tag(y, "apply", node))
        for user in users:
            user.replace_input_with(y, out)

    def _latest(self, node: fx.Node) -> fx.Node:
        """The node's value after the attachments injected before this one."""
        for user in node.users:
            tag = region_tag(user)
            if tag and tag.get("base") == node.name and tag["form"] == "apply":
                return self._latest(user)
        return node

    def _latest_weight(self, source: fx.Node) -> fx.Node:
        """The parameter as the attachments injected before this one hand it to the same consumers."""
        for user in source.users:
            tag = region_tag(user)
            if tag and tag.get("base") == source.name and tag["form"] == "weight" and self._same_site(tag):
                return self._latest_weight(user)
        return source

    def _same_site(self, tag: Mapping[str, Any]) -> bool:
        return (tag["module"], tag["param"]) == (self.a.module, self.a.param)

    def in_front(self, source: fx.Node, nodes: Sequence[fx.Node]) -> None:
        """The weight form: the consumers read weight(W) instead of W."""
        graph = self.lifted.graph
        found = readers(graph, source, set(nodes))
        order = {n: i for i, n in enumerate(graph.nodes)}
        first = min(found, key=order.__getitem__)
        inputs = [source, *self.slot_nodes]
        region = self.region("weight", self.op, inputs)
        out = inline(graph, region, inputs, first, first, self._tag(source, "weight", first))
        for user in found:
            user.replace_input_with(source, out)

    def _tag(self, base: fx.Node, form: str, consumer: fx.Node) -> Any:
        a, header = self.a, self.header

        def tag(role: str) -> dict[str, Any]:
            t = a.tag(role)
            if role == "out":
                t |= {"form": form, "base": base.name, "key": a.key, "module": a.module, "param": a.param}
                t |= {
                    "kind": a.kind,
                    "slots": dict(a.slots),
                    "scale": a.scale,
                    "entry": a.entry,
                    "name": a.name,
                    "tied": a.tied,
                    "options": a.method.options(),
                }
                t |= {"consumers": list(a.consumers), "node": consumer.name}
                if header is not None:
                    t["header"] = dict(header)
            return t

        return tag
