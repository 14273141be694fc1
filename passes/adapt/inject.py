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
from adaptc.passes.adapt.choose_forms import FormChoice, cheaper, choose_forms
from adaptc.passes.adapt.make_coefficients import Coefficients
from adaptc.passes.analysis.costs import Work, example_sizes, node_work, work
from adaptc.passes.analysis.sites import consumers, readers
from adaptc.passes.graph.higher_order import bias_of, inside, takes_bias
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.ops import TABLE, Op, make_dense, operands, set_argument
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.graph.train_eval import drops
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.attention_method import AttentionMethod
from adaptc.passes.protocol.program_method import PROGRAM, ProgramMethod
from adaptc.passes.protocol.regions import place_of, region_tag, site_op, slot_nodes
from adaptc.passes.protocol.trace import behind_inputs, inline, region_of, signature_of
from adaptc.passes.virtual_tokens.insert_virtual_tokens import change_places


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
        lifted = Lifted(subject)
        lifted.freeze()
        added: set[str] = set()
        ready = [self._lift(lifted, a, added) for a in self.attachments]
        coefficients = Coefficients(lifted, attachments=ready)
        ready = [coefficients.of(a) for a in ready]
        latest = {place_of(tag): n for n in lifted.graph.nodes if (tag := region_tag(n))}
        traces: dict[Any, fx.Graph] = {}
        costs = _Costs(example_sizes(subject), self.training)
        jobs = [_Injector(lifted, a, traces, latest, costs, None if i else self.header) for i, a in enumerate(ready)]
        choose_forms([job for job in jobs if job.a.form != PROGRAM])
        done = [job.run() for job in jobs]
        return PassResult(lifted.finish(), len(done), data=tuple(done))

    def _lift(self, lifted: Lifted, a: Attachment, added: set[str]) -> Attachment:
        if a.fqn not in lifted.placeholders:
            raise PassError(f"the program has no parameter {a.fqn!r}")
        op = site_op(lifted, a)
        slots: dict[str, str] = {}
        for name, slot in a.method.slots(op).items():
            fqn = a.slot_fqn(name, slot)
            # Sites may share a slot that another one added. But lifted.add refuses the name of a model's own tensor.
            if fqn not in added and not (slot.shared and fqn in lifted.placeholders):
                lifted.add(fqn, as_lifted(self._value(a, fqn), slot.trainable))
            added.add(fqn)
            slots[name] = fqn
        scale_fqn = None if a.method.scale(op) is None else a.scale_fqn
        if scale_fqn is not None and scale_fqn not in added:
            lifted.add(scale_fqn, self._value(a, scale_fqn))
            added.add(scale_fqn)
        return replace(a, slots=slots, scale_slot=scale_fqn)

    def _value(self, a: Attachment, fqn: str) -> Tensor:
        if fqn not in self.values:
            raise PassError(f"site {a.id!r}: there is no value for {fqn!r}")
        return self.values[fqn]


def as_lifted(value: Tensor, trainable: bool) -> Tensor:
    if trainable and not isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(value.detach(), requires_grad=value.is_floating_point() or value.is_complex())
    return value if trainable else value.detach()


def _fakes(nodes: Sequence[fx.Node]) -> list[Any]:
    return [n.meta["val"] for n in nodes]


@dataclass
class _Costs:
    """The sizes and the mode for which forms are chosen, and the choices made for equal sites so far."""

    sizes: Mapping[str, int]
    training: bool
    known: dict[Any, FormChoice] = field(default_factory=dict)


@dataclass
class _Injector:
    """An attachment being injected.

    ``latest`` maps nodes, and parameters as a site reads them, to the outputs of regions injected for them before.
    """

    lifted: Lifted
    a: Attachment
    traces: dict[Any, fx.Graph]
    latest: dict[tuple[str, ...], fx.Node]
    costs: _Costs
    header: Mapping[str, Any] | None
    form: str = ""
    why: str = ""

    def __post_init__(self) -> None:
        if self.a.form == PROGRAM:
            self.form, self.why = self.a.form, self.a.why
        self.op = site_op(self.lifted, self.a)
        self.slot_nodes = slot_nodes(self.a, self.lifted.placeholders, self.lifted.nodes)
        reading = {n.name for n, _ in consumers(self._weight())}
        if not self.a.consumers or not reading.issuperset(self.a.consumers):
            raise PassError(f"site {self.a.id!r}: consumers {self.a.consumers} do not read {self.a.fqn!r}")

    def run(self) -> Attachment:
        if self.a.form == PROGRAM:
            change = add_to_attention if isinstance(self.a.method, AttentionMethod) else change_places
            change(self.lifted, self.a, self.latest, self._tag)
            return self.a
        nodes = [self.lifted.nodes[c] for c in self.a.consumers]
        if self.form == "apply":
            for node in nodes:
                if self.a.method.has_input(self.op):
                    self.before(node)
                if self.a.method.has_apply(self.op):
                    self.behind(node)
        else:
            self.in_front(self._weight(), nodes)
            for node in nodes if self.a.method.has_bias() else ():
                self.beside(node)
        return replace(self.a, form=self.form, why=self.why)

    def choice(self) -> FormChoice:
        """Return the cheaper form, by the work of the regions that either one would add."""
        nodes = [self.lifted.nodes[c] for c in self.a.consumers]
        weight = [self._weight(), *self.slot_nodes]
        if weight[0].meta["val"].dtype.itemsize < 4:
            return FormChoice("apply", "a weight in half precision would round the change")
        if self.op.kind == "embedding" and self.op.rest and self.op.rest[0] >= 0:
            return FormChoice(
                "apply", "the padding row of a weight takes no gradient, and that of the up projection does"
            )
        key = (self.a.method, self.op, len(nodes), signature_of([n.meta["val"] for n in [*nodes, *weight]]))
        if key not in self.costs.known:
            outside, base = Work(), Work()
            for node in nodes:
                base += Work(node_work(node))
                for moving, region in self._around(node):
                    outside += work(region, moving)
            inside = self.region("weight", self.op, weight)
            if self.drops_outside():
                self.costs.known[key] = FormChoice("apply", "its dropout acts on what the layer reads")
            else:
                cost = work(inside, 0)
                self.costs.known[key] = cheaper(outside, cost, base, self.costs.sizes, self.costs.training)
        return self.costs.known[key]

    def _around(self, node: fx.Node) -> Iterator[tuple[int, fx.Graph]]:
        """Yield the regions of the apply form at a consumer, as (inputs that differ from call to call, region)."""
        op = self.op.at(node)
        if self.a.method.has_input(op):
            yield 1, self.region("input", op, [operands(node)[0], *self.slot_nodes])
        if self.a.method.has_apply(op):
            kind, inputs = behind_inputs(node, node)
            yield 2, self.region(kind, op, [*inputs, *self.slot_nodes])

    def enclosed(self) -> bool:
        """Return whether a consumer is inside a block, where only its weight and its bias can be changed."""
        return any(inside(self.lifted.nodes[c]) is not None for c in self.a.consumers)

    def drops_outside(self) -> bool:
        """Return whether the apply form has dropout that the weight form lacks."""
        if self.enclosed():
            return self.a.method.drops_input()
        nodes = [self.lifted.nodes[c] for c in self.a.consumers] if self.a.method.training else []
        if not any(drops(region) for node in nodes for _, region in self._around(node)):
            return False
        return not drops(self.region("weight", self.op, [self._weight(), *self.slot_nodes]))

    def reads_weight(self) -> bool:
        """Return whether the apply form computes with the weight, not only with the layer's input and output."""
        if not self.a.method.has_apply(self.op) or self.enclosed():
            return False
        node = self.lifted.nodes[self.a.consumers[0]]
        kind, inputs = behind_inputs(node, node)
        region = self.region(kind, self.op.at(node), [*inputs, *self.slot_nodes])
        return bool(region.find_nodes(op="placeholder")[2].users)

    def _weight(self) -> fx.Node:
        return self._latest(self.lifted.placeholders[self.a.fqn], self.a.module, self.a.param)

    def _latest(self, node: fx.Node, *site: str) -> fx.Node:
        """Return the output of the last region injected for ``node`` before this attachment, or ``node`` itself.

        ``site`` is (module, parameter name) for a parameter as that site reads it, and empty for other nodes.
        """
        while (node.name, *site) in self.latest:
            node = self.latest[(node.name, *site)]
        return node

    def region(self, kind: str, op: Op, inputs: Sequence[fx.Node]) -> fx.Graph:
        return self.region_on(kind, op, _fakes(inputs))

    def region_on(self, kind: str, op: Op, fakes: Sequence[Any]) -> fx.Graph:
        key = (self.a.method, kind, op, signature_of(fakes))
        if key not in self.traces:
            scaled = self.a.scale_slot is not None
            self.traces[key] = region_of(self.a.method, op, kind, self.a.input_names, scaled, fakes)
        return self.traces[key]

    def before(self, node: fx.Node) -> None:
        """Add the first half of the apply form: x -> input(x) for the input of one consumer."""
        x = operands(node)[0]
        inputs = [x, *self.slot_nodes]
        region = self.region("input", self.op.at(node), inputs)
        out = inline(self.lifted.graph, region, inputs, node, node, self._tag(x, "input", node))
        set_argument(node, TABLE[node.target][1], out)

    def behind(self, node: fx.Node) -> None:
        """Add the second half of the apply form: y -> apply(x, y, W, b) for the outputs of one consumer."""
        y = self._latest(node)
        kind, inputs = behind_inputs(node, y)
        self._behind(node, y, kind, [*inputs, *self.slot_nodes])

    def beside(self, node: fx.Node) -> None:
        """Add the bias that the weight form leaves out: y -> y + (bias(b) - b) for the outputs of one consumer.

        For a consumer inside a block, b -> bias(b) is added before the block.
        """
        if not takes_bias(node):
            return
        if inside(node) is not None:
            self._in_front_of_bias(node)
            return
        y, b = self._latest(node), operands(node)[2]
        kind, biases = ("new_bias", []) if b is None else ("bias", [b])
        self._behind(node, y, kind, [y, *biases, *self.slot_nodes])

    def _in_front_of_bias(self, node: fx.Node) -> None:
        op, through = self.op.at(node), inside(node)
        b, door = bias_of(self.lifted.nodes, node)
        if b is None:
            w = self._weight().meta["val"]
            like = self.lifted.fake(torch.empty(op.out_features, dtype=w.dtype, device=w.device))
            # Only whether the method adds a bias is asked here, and a tensor with y's last axis alone shows that.
            none = through is not None and through.bias == ""
            found = self.region_on("new_bias" if none else "bias_value", op, [like, *_fakes(self.slot_nodes)])
            if any(n.op == "call_function" for n in found.nodes):
                what = "has no bias" if none else "computes its bias there"
                raise TargetError(
                    f"site {self.a.id!r}: {self.a.method.name} changes the bias of {self.a.module!r}, which is called "
                    f"inside a block (no_grad, autocast, cond, map, ...) and {what}, so the change has no place. Call "
                    "it outside of the block, give it a bias, or leave it out of the targets."
                )
            return
        inputs = [b, *self.slot_nodes]
        region = self.region("bias_value", op, inputs)
        if any(n.op == "call_function" for n in region.nodes):
            out = inline(self.lifted.graph, region, inputs, door, door, self._tag(b, "bias_value", node))
            door.replace_input_with(b, out)
            self.latest[(b.name, self.a.module, "bias")] = out

    def _behind(self, node: fx.Node, y: fx.Node, kind: str, inputs: Sequence[fx.Node]) -> None:
        region = self.region(kind, self.op.at(node), inputs)
        if not kind.startswith("apply") and not any(n.op == "call_function" for n in region.nodes):
            return
        users = list(y.users)
        out = inline(self.lifted.graph, region, inputs, y.next, node, self._tag(y, kind, node))
        for user in users:
            user.replace_input_with(y, out)
        self.latest[(y.name,)] = out

    def in_front(self, source: fx.Node, nodes: Sequence[fx.Node]) -> None:
        """Add the weight form: the consumers read weight(W) instead of W."""
        graph = self.lifted.graph
        found = readers(graph, source, set(nodes))
        order = {n: i for i, n in enumerate(graph.nodes)}
        first = min(found, key=order.__getitem__)
        base = self.lifted.placeholders[self.a.fqn]
        over = source is not base and self.a.method.looks_at_base()
        kind, inputs = ("weight_over", [base, source]) if over else ("weight", [source])
        inputs += self.slot_nodes
        region = self.region(kind, self.op, inputs)
        out = inline(graph, region, inputs, first, first, self._tag(source, kind, first))
        for user in found:
            user.replace_input_with(source, out)
        if self.op.groups > 1 and out.meta["val"].shape != source.meta["val"].shape:
            if self.enclosed():
                raise TargetError(
                    f"site {self.a.id!r}: {self.a.method.name} makes a convolution of {self.op.groups} groups read all "
                    "channels, and it is called inside a block (no_grad, autocast, cond, map, ...), where its groups "
                    "are fixed. Call it outside of the block, or leave it out of the targets."
                )
            for node in nodes:
                make_dense(node, remember=True)
        self.latest[(source.name, self.a.module, self.a.param)] = out

    def _tag(self, base: fx.Node, kind: str, consumer: fx.Node) -> Callable[[str], dict[str, Any]]:
        a = replace(self.a, form=self.form, why=self.why)
        more = {"region": kind, "base": base.name, "node": consumer.name, "attachment": a.to_dict()}
        if isinstance(a.method, ProgramMethod):
            more["given"] = [n for n in a.method.extras() if (n, "given") in self.latest]
        elif given := [a.reads[n] for n in a.method.extras()]:
            more["given"] = given
        if self.header is not None:
            more["header"] = dict(self.header)

        def tag(role: str) -> dict[str, Any]:
            return {**a.tag(role), **(more if role == "out" else {})}

        return tag
