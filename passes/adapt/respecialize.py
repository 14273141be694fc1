"""Make a program's fake values fit slots whose shapes changed (a swap to another rank).

Takes a program with injected regions and, for some slots, tensors of another size along their free axes. Every
placeholder and region node gets the fake value it has with the new tensors. So the program validates, saves and
compiles as if it had been injected with them. The code does not change: regions are the same for every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from adaptc.errors import MethodError
from adaptc.passes.graph.lifted import fake_maker
from adaptc.passes.graph.ops import Op, operands
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.graph.propagate import propagate_fakes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import PROGRAM_FORM
from adaptc.passes.protocol.regions import COEFFICIENT_ROLE, node_tag, slot_nodes
from adaptc.passes.protocol.trace import fused_region_inputs, output_region_inputs, trace_key, trace_region

#: the number of traces that are kept; the oldest is dropped first
MAX_TRACES = 256


@dataclass(frozen=True)
class Respecialize(GraphPass):
    """A pass that updates fake values; its count is that of the regions that changed.

    ``tensors`` maps FQNs to the new tensors, and ``placeholders`` maps FQNs to the names of their placeholders.
    ``traces`` keeps traced regions for another call with fakes of the same mode. ``modules`` has the graphs of blocks.
    """

    name: ClassVar[str] = "respecialize"

    attachments: Sequence[Attachment] = field(repr=False)
    ops: Mapping[str, Op] = field(repr=False)
    placeholders: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    traces: dict[Any, fx.Graph] = field(default_factory=dict[Any, fx.Graph], repr=False)
    modules: nn.Module | None = field(default=None, repr=False)

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        names = {n.name: n for n in subject.nodes}
        inputs = {fqn: names[name] for fqn, name in self.placeholders.items()}
        fake, stale = fake_maker(subject), set[str]()
        for fqn, tensor in self.tensors.items():
            node = inputs[fqn]
            if tuple(node.meta["val"].shape) != tuple(tensor.shape):
                node.meta["val"] = fake(tensor)
                stale.add(fqn)
        # Everything computed from the slots of program methods, or of coefficients, may have another size.
        programs = {f for a in self.attachments if a.form == PROGRAM_FORM for f in a.slots.values()}
        reading = [(a, c) for a in self.attachments for c in a.method.extra_inputs.coefficients().values()]
        made_of = {a.slots[n] for a, c in reading for n in c.slots}
        behind = {f for f in stale if f in programs | made_of or _feeds_coefficients(inputs[f])}
        # Regions that read a coefficient of another size also read slots, so all changed slots are propagated at once.
        moved = {inputs[f] for f in (stale if behind - programs else behind)}
        count = propagate_fakes(subject, moved, self.modules) if moved else 0
        others = [a for a in self.attachments if a.form != PROGRAM_FORM]
        by_id = {a.id: a for a in others if not stale.isdisjoint(a.slots.values())}
        pending: dict[str, list[fx.Node]] = {}
        for node in subject.nodes if by_id else ():
            tag = node_tag(node)
            if tag is None or tag["site"] not in by_id:
                continue
            # Regions of one site do not interleave: each is complete when its "out" node comes.
            nodes = pending.setdefault(tag["site"], [])
            nodes.append(node)
            if tag["role"] == "out":
                self._update(by_id[tag["site"]], tag, nodes, names, inputs)
                nodes.clear()
                count += 1
        return PassResult(subject, count)

    def _update(
        self,
        a: Attachment,
        tag: Mapping[str, Any],
        nodes: Sequence[fx.Node],
        names: Mapping[str, fx.Node],
        placeholders: Mapping[str, fx.Node],
    ) -> None:
        op, base, consumer = self.ops[a.id], names[tag["base"]], names[tag["node"]]
        inputs, kind = [base], tag["region"]
        if tag.get("fused"):
            kind, inputs = fused_region_inputs(consumer)
            op = op.as_called_by(consumer)
        elif kind == "input":
            op = op.as_called_by(consumer)
        elif kind.startswith("apply"):
            inputs, op = output_region_inputs(consumer, base)[1], op.as_called_by(consumer)
        elif kind == "weight_over":
            inputs = [placeholders[a.fqn], base]
        elif kind == "bias":
            inputs.append(operands(consumer)[2])
        if "bias" in kind and not kind.startswith(("apply", "fused")) and a.method.bias_reads_weight():
            inputs.append(placeholders[a.fqn])
        inputs += slot_nodes(a, placeholders, names)
        fakes = [n.meta["val"] for n in inputs]
        key = (a.method, kind, op, trace_key(fakes))
        if key not in self.traces:
            while len(self.traces) >= MAX_TRACES:
                del self.traces[next(iter(self.traces))]
            self.traces[key] = trace_region(a.method, op, kind, a.input_names, a.scale_slot is not None, fakes)
        traced = [n for n in self.traces[key].nodes if n.op == "call_function"]
        if not traced:  # the region is an alias of one of its inputs
            nodes[-1].meta["val"] = nodes[-1].args[0].meta["val"]  # type: ignore[union-attr]
            return
        if [n.target for n in traced] != [n.target for n in nodes]:
            raise MethodError(f"region of {a.id!r} depends on the rank: {[str(n.target) for n in traced]}")
        for old, new in zip(nodes, traced, strict=True):
            old.meta["val"] = new.meta["val"]


def _feeds_coefficients(slot: fx.Node) -> bool:
    """Return whether a coefficient, or a duplicated base pass, reads a slot."""
    return any(tag["role"] == COEFFICIENT_ROLE for n in slot.users if (tag := node_tag(n)) is not None)
