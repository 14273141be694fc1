"""Inject adapters: rewrite the consumers of targeted parameters into adapter regions.

Takes a program, and for each site an Attachment with its slot tensors. Slots become lifted inputs of the program:
trainable ones are parameters, frozen ones and the scale are buffers. Each consumer gets a tagged region of pure ATen.
Base parameters require no grad.

With slots at their identity values the program computes exactly what it did. Each distinct (method, op, shapes, dtypes)
is traced once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.errors import PassError, TargetError
from adaptc.passes.adapt.add_to_attention import add_to_attention
from adaptc.passes.adapt.choose_forms import FormChoice, choose_cheaper, choose_forms
from adaptc.passes.adapt.make_coefficients import CoefficientMaker
from adaptc.passes.analysis.costs import OperationCount, count_node_operations, count_operations, example_sizes
from adaptc.passes.analysis.sites import find_consumers, isolate_readers
from adaptc.passes.graph.higher_order import bias_and_reader, subgraph_input_of, takes_bias
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import LAYER_OPS, Op, make_dense, operands, set_argument
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.graph.train_eval import has_dropout
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.attention_method import AttentionMethod
from adaptc.passes.protocol.program_method import PROGRAM_FORM, ProgramMethod
from adaptc.passes.protocol.regions import region_tag, replaced_value_key, site_op, slot_nodes
from adaptc.passes.protocol.trace import inline, output_region_inputs, trace_key, trace_region
from adaptc.passes.virtual_tokens.insert_virtual_tokens import inject_program_method


@dataclass(frozen=True)
class Inject(Pass):
    """A pass that injects adapters; its count is that of the attachments, its data the attachments as injected.

    ``values`` maps the FQNs of slots and scales to tensors. ``header`` is kept in the first region's tag. ``training``
    says whether the form of a site should be cheap in training or in inference.
    """

    name: ClassVar[str] = "inject"

    attachments: Sequence[Attachment] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)
    header: Mapping[str, Any] | None = field(default=None, repr=False)
    training: bool = False

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        lifted.freeze()
        added: set[str] = set()
        ready = [self._lift(lifted, a, added) for a in self.attachments]
        coefficients = CoefficientMaker(lifted, attachments=ready)
        ready = [coefficients.with_coefficients(a) for a in ready]
        latest = {replaced_value_key(tag): n for n in lifted.graph.nodes if (tag := region_tag(n))}
        traces: dict[Any, fx.Graph] = {}
        costs = _FormCosts(example_sizes(subject), self.training)
        jobs = [_Injector(lifted, a, traces, latest, costs, None if i else self.header) for i, a in enumerate(ready)]
        choose_forms([job for job in jobs if job.attachment.form != PROGRAM_FORM])
        done = [job.run() for job in jobs]
        return PassResult(lifted.finish(), len(done), data=tuple(done))

    def _lift(self, lifted: LiftedProgram, a: Attachment, added: set[str]) -> Attachment:
        if a.fqn not in lifted.placeholders:
            raise PassError(f"the program has no parameter {a.fqn!r}")
        op = site_op(lifted, a)
        slots: dict[str, str] = {}
        for name, slot in a.method.slots(op).items():
            fqn = a.slot_fqn(name, slot)
            # Sites may share a slot that another one added. But lifted.add refuses the name of a model's own tensor.
            if fqn not in added and not (slot.shared and fqn in lifted.placeholders):
                lifted.add_tensor(fqn, as_parameter_or_buffer(self._value(a, fqn), slot.trainable))
            added.add(fqn)
            slots[name] = fqn
        scale_fqn = None if a.method.scale(op) is None else a.scale_fqn
        if scale_fqn is not None and scale_fqn not in added:
            lifted.add_tensor(scale_fqn, self._value(a, scale_fqn))
            added.add(scale_fqn)
        return replace(a, slots=slots, scale_slot=scale_fqn)

    def _value(self, a: Attachment, fqn: str) -> Tensor:
        if fqn not in self.values:
            raise PassError(f"site {a.id!r}: there is no value for {fqn!r}")
        return self.values[fqn]


def as_parameter_or_buffer(value: Tensor, trainable: bool) -> Tensor:
    if trainable and not isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(value.detach(), requires_grad=value.is_floating_point() or value.is_complex())
    return value if trainable else value.detach()


def _fake_values(nodes: Sequence[fx.Node]) -> list[Any]:
    return [n.meta["val"] for n in nodes]


@dataclass
class _FormCosts:
    """The sizes and the mode for which forms are chosen, and the choices made for equal sites so far."""

    sizes: Mapping[str, int]
    training: bool
    choices: dict[Any, FormChoice] = field(default_factory=dict[Any, FormChoice])


@dataclass
class _Injector:
    """An attachment being injected.

    ``latest`` maps nodes, and parameters as a site reads them, to the outputs of regions injected for them before.
    """

    lifted: LiftedProgram
    attachment: Attachment
    traces: dict[Any, fx.Graph]
    latest_outputs: dict[tuple[str, ...], fx.Node]
    costs: _FormCosts
    header: Mapping[str, Any] | None
    form: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        if self.attachment.form == PROGRAM_FORM:
            self.form, self.reason = self.attachment.form, self.attachment.why
        self.op = site_op(self.lifted, self.attachment)
        self.slot_nodes = slot_nodes(self.attachment, self.lifted.placeholders, self.lifted.nodes)
        reading = {n.name for n, _ in find_consumers(self._weight())}
        if not self.attachment.consumers or not reading.issuperset(self.attachment.consumers):
            raise PassError(
                f"site {self.attachment.id!r}: consumers {self.attachment.consumers} do not read "
                f"{self.attachment.fqn!r}"
            )

    def run(self) -> Attachment:
        if self.attachment.form == PROGRAM_FORM:
            change = add_to_attention if isinstance(self.attachment.method, AttentionMethod) else inject_program_method
            change(self.lifted, self.attachment, self.latest_outputs, self._make_tag)
            return self.attachment
        nodes = [self.lifted.nodes[c] for c in self.attachment.consumers]
        if self.form == "apply":
            for node in nodes:
                if self.attachment.method.has_input(self.op):
                    self.change_input(node)
                if self.attachment.method.has_apply(self.op):
                    self.change_output(node)
        else:
            self.change_weight(self._weight(), nodes)
            for node in nodes if self.attachment.method.has_bias() else ():
                self.change_bias(node)
        return replace(self.attachment, form=self.form, why=self.reason)

    def cheaper_form(self) -> FormChoice:
        """Return the cheaper form, by the work of the regions that either one would add."""
        nodes = [self.lifted.nodes[c] for c in self.attachment.consumers]
        weight = [self._weight(), *self.slot_nodes]
        if weight[0].meta["val"].dtype.itemsize < 4:
            return FormChoice("apply", "a weight in half precision would round the change")
        if self.op.kind == "embedding" and self.op.other_args and self.op.other_args[0] >= 0:
            return FormChoice(
                "apply", "the padding row of a weight takes no gradient, and that of the up projection does"
            )
        key = (self.attachment.method, self.op, len(nodes), trace_key([n.meta["val"] for n in [*nodes, *weight]]))
        if key not in self.costs.choices:
            apply_work, layer_work = OperationCount(), OperationCount()
            for node in nodes:
                layer_work += OperationCount(count_node_operations(node))
                for moving, region in self._apply_regions(node):
                    apply_work += count_operations(region, moving)
            inside = self.cached_region("weight", self.op, weight)
            if self.has_dropout_outside():
                self.costs.choices[key] = FormChoice("apply", "its dropout or noise acts at the layer")
            else:
                cost = count_operations(inside, 0)
                self.costs.choices[key] = choose_cheaper(
                    apply_work, cost, layer_work, self.costs.sizes, self.costs.training
                )
        return self.costs.choices[key]

    def _apply_regions(self, node: fx.Node) -> Iterator[tuple[int, fx.Graph]]:
        """Yield the regions of the apply form at a consumer, as (inputs that differ from call to call, region)."""
        op = self.op.as_called_by(node)
        if self.attachment.method.has_input(op):
            yield 1, self.cached_region("input", op, [operands(node)[0], *self.slot_nodes])
        if self.attachment.method.has_apply(op):
            kind, inputs = output_region_inputs(node, node)
            yield 2, self.cached_region(kind, op, [*inputs, *self.slot_nodes])

    def is_in_subgraph(self) -> bool:
        """Return whether a consumer is inside a subgraph, where only its weight and its bias can be changed."""
        return any(subgraph_input_of(self.lifted.nodes[c]) is not None for c in self.attachment.consumers)

    def has_dropout_outside(self) -> bool:
        """Return whether the apply form has dropout, noise, or a derivative, that the weight form lacks."""
        method = self.attachment.method
        if self.is_in_subgraph() or method.trains_at_layer():
            return method.is_random() or method.trains_at_layer()
        is_random = method.training or method.is_random()
        nodes = [self.lifted.nodes[c] for c in self.attachment.consumers] if is_random else []
        if not any(has_dropout(region) for node in nodes for _, region in self._apply_regions(node)):
            return False
        return not has_dropout(self.cached_region("weight", self.op, [self._weight(), *self.slot_nodes]))

    def reads_weight(self) -> bool:
        """Return whether the apply form computes with the weight, not only with the layer's input and output."""
        if not self.attachment.method.has_apply(self.op) or self.is_in_subgraph():
            return False
        node = self.lifted.nodes[self.attachment.consumers[0]]
        kind, inputs = output_region_inputs(node, node)
        region = self.cached_region(kind, self.op.as_called_by(node), [*inputs, *self.slot_nodes])
        return bool(region.find_nodes(op="placeholder")[2].users)

    def _weight(self) -> fx.Node:
        return self._latest_output(
            self.lifted.placeholders[self.attachment.fqn], self.attachment.module, self.attachment.param
        )

    def _latest_output(self, node: fx.Node, *site: str) -> fx.Node:
        """Return the output of the last region injected for ``node`` before this attachment, or ``node`` itself.

        ``site`` is (module, parameter name) for a parameter as that site reads it, and empty for other nodes.
        """
        while (node.name, *site) in self.latest_outputs:
            node = self.latest_outputs[(node.name, *site)]
        return node

    def cached_region(self, kind: str, op: Op, inputs: Sequence[fx.Node]) -> fx.Graph:
        return self.cached_region_for(kind, op, _fake_values(inputs))

    def cached_region_for(self, kind: str, op: Op, fakes: Sequence[Any]) -> fx.Graph:
        key = (self.attachment.method, kind, op, trace_key(fakes))
        if key not in self.traces:
            scaled = self.attachment.scale_slot is not None
            self.traces[key] = trace_region(
                self.attachment.method, op, kind, self.attachment.input_names, scaled, fakes
            )
        return self.traces[key]

    def change_input(self, node: fx.Node) -> None:
        """Add the first half of the apply form: x -> input(x) for the input of one consumer."""
        x = operands(node)[0]
        inputs = [x, *self.slot_nodes]
        region = self.cached_region("input", self.op.as_called_by(node), inputs)
        out = inline(self.lifted.graph, region, inputs, node, node, self._make_tag(x, "input", node))
        set_argument(node, LAYER_OPS[node.target][1], out)

    def change_output(self, node: fx.Node) -> None:
        """Add the second half of the apply form: y -> apply(x, y, W, b) for the outputs of one consumer."""
        y = self._latest_output(node)
        kind, inputs = output_region_inputs(node, y)
        self._insert_after(node, y, kind, [*inputs, *self.slot_nodes])

    def change_bias(self, node: fx.Node) -> None:
        """Add the bias that the weight form leaves out: y -> y + (bias(b) - b) for the outputs of one consumer.

        For a consumer inside a subgraph, b -> bias(b) is added before the subgraph.
        """
        if not takes_bias(node):
            return
        if subgraph_input_of(node) is not None:
            self._change_subgraph_bias(node)
            return
        y, b = self._latest_output(node), operands(node)[2]
        kind, biases = ("new_bias", []) if b is None else ("bias", [b])
        self._insert_after(node, y, kind, [y, *biases, *self._weight_of_bias(), *self.slot_nodes])

    def _weight_of_bias(self) -> list[fx.Node]:
        """Return the model's own weight, where the method's bias depends on it."""
        reads = self.attachment.method.bias_reads_weight()
        return [self.lifted.placeholders[self.attachment.fqn]] if reads else []

    def _change_subgraph_bias(self, node: fx.Node) -> None:
        op, through = self.op.as_called_by(node), subgraph_input_of(node)
        b, subgraph_input = bias_and_reader(self.lifted.nodes, node)
        if b is None:
            w = self._weight().meta["val"]
            like = self.lifted.make_fake(torch.empty(op.out_features, dtype=w.dtype, device=w.device))
            # Only whether the method adds a bias is asked here, and a tensor with y's last axis alone shows that.
            none = through is not None and through.bias == ""
            found = self.cached_region_for(
                "new_bias" if none else "bias_value",
                op,
                [like, *_fake_values([*self._weight_of_bias(), *self.slot_nodes])],
            )
            if any(n.op == "call_function" for n in found.nodes):
                what = "has no bias" if none else "computes its bias there"
                raise TargetError(
                    f"site {self.attachment.id!r}: {self.attachment.method.name} changes the bias of "
                    f"{self.attachment.module!r}, which is called inside a block (no_grad, autocast, cond, map, ...) "
                    f"and {what}, so the change has no place. Call it outside of the block, give it a bias, or leave "
                    "it out of the targets."
                )
            return
        inputs = [b, *self._weight_of_bias(), *self.slot_nodes]
        region = self.cached_region("bias_value", op, inputs)
        if any(n.op == "call_function" for n in region.nodes):
            out = inline(
                self.lifted.graph, region, inputs, subgraph_input, subgraph_input, self._make_tag(b, "bias_value", node)
            )
            subgraph_input.replace_input_with(b, out)
            self.latest_outputs[(b.name, self.attachment.module, "bias")] = out

    def _insert_after(self, node: fx.Node, y: fx.Node, kind: str, inputs: Sequence[fx.Node]) -> None:
        region = self.cached_region(kind, self.op.as_called_by(node), inputs)
        if not kind.startswith("apply") and not any(n.op == "call_function" for n in region.nodes):
            return
        users = list(y.users)
        out = inline(self.lifted.graph, region, inputs, y.next, node, self._make_tag(y, kind, node))
        for user in users:
            user.replace_input_with(y, out)
        self.latest_outputs[(y.name,)] = out

    def change_weight(self, source: fx.Node, nodes: Sequence[fx.Node]) -> None:
        """Add the weight form: the consumers read weight(W) instead of W."""
        graph = self.lifted.graph
        weight_readers = isolate_readers(graph, source, set(nodes))
        order = {n: i for i, n in enumerate(graph.nodes)}
        first = min(weight_readers, key=order.__getitem__)
        base = self.lifted.placeholders[self.attachment.fqn]
        over = source is not base and self.attachment.method.looks_at_base()
        kind, inputs = ("weight_over", [base, source]) if over else ("weight", [source])
        inputs += self.slot_nodes
        region = self.cached_region(kind, self.op, inputs)
        out = inline(graph, region, inputs, first, first, self._make_tag(source, kind, first))
        for user in weight_readers:
            user.replace_input_with(source, out)
        if self.op.groups > 1 and out.meta["val"].shape != source.meta["val"].shape:
            if self.is_in_subgraph():
                raise TargetError(
                    f"site {self.attachment.id!r}: {self.attachment.method.name} makes a convolution of "
                    f"{self.op.groups} groups read all channels, and it is called inside a block (no_grad, autocast, "
                    "cond, map, ...), where its groups are fixed. Call it outside of the block, or leave it out of the "
                    "targets."
                )
            for node in nodes:
                make_dense(node, remember=True)
        self.latest_outputs[(source.name, self.attachment.module, self.attachment.param)] = out

    def _make_tag(self, base: fx.Node, kind: str, consumer: fx.Node) -> Callable[[str], dict[str, Any]]:
        a = replace(self.attachment, form=self.form, why=self.reason)
        more: dict[str, Any] = {"region": kind, "base": base.name, "node": consumer.name, "attachment": a.to_dict()}
        if isinstance(a.method, ProgramMethod):
            more["given"] = [n for n in a.method.extra_inputs.extras() if (n, "extra input") in self.latest_outputs]
        elif given := [a.reads[n] for n in a.method.extra_inputs.extras()]:
            more["given"] = given
        if self.header is not None:
            more["header"] = dict(self.header)

        def tag(role: str) -> dict[str, Any]:
            return {**a.tag(role), **(more if role == "out" else {})}

        return tag
