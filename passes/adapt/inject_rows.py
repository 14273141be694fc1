"""Inject per-row adapters: each row of a batch has its own mix of several adapters, by coefficients of the call.

Takes a program without adapters, and its sites with the axis of the batch rows in the values there. Every slot and
scale comes as a stacked tensor, whose first axis is that of the adapters.

The stacked tensors become lifted buffers of the program. It takes one more keyword, a float32 tensor (rows, adapters).
Regions of pure ATen compute what ``passes.protocol.bank_method`` says. With coefficients of zero the program computes
exactly what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.errors import TargetError
from adaptc.passes.adapt.expert_rows import (
    describe_call,
    is_expert_matmul,
    make_expert_function,
    skip_views,
    take_view,
    views_of_parameter,
)
from adaptc.passes.adapt.inject import as_parameter_or_buffer
from adaptc.passes.adapt.make_coefficients import CoefficientMaker
from adaptc.passes.analysis.sites import find_consumers
from adaptc.passes.graph.higher_order import subgraph_input_of
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import LAYER_OPS, Op, cast, operands, set_argument
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.bank_method import (
    RANK_STARTS,
    BankSite,
    ReplacedParameter,
    RowAxis,
    make_bias_function,
    make_call_function,
    make_input_function,
    make_output_function,
    repeat_coefficients,
)
from adaptc.passes.protocol.regions import ROW_TAG_KEY, site_op, slot_nodes
from adaptc.passes.protocol.trace import inline, output_region_inputs, trace_function, trace_key

#: name of a node -> the axis of its value that has the rows
RowAxes = Mapping[str, RowAxis]


def acts_around_layer(a: Attachment, op: Op) -> bool:
    """Return whether a method's regions stand around the layer here, at its input or its output.

    Otherwise a second call of the layer reads another weight for each adapter. A method that changes both input and
    output is of that kind where it can: of a mix of adapters, the two changes would not add up.
    """
    m = a.method
    return m.has_apply_form(op) and not (m.has_input(op) and m.has_apply(op) and m.has_weight())


def site_consumers(lifted: LiftedProgram, a: Attachment) -> list[tuple[fx.Node, fx.Node]]:
    """Return (consumer, the node of the parameter that it reads) for the consumers of a site.

    Weights of experts are read through views. There it is the matmul, and the view that it reads.
    """
    found = dict(find_consumers(lifted.placeholders[a.fqn]))
    pairs = [(n, found[n]) for n in (lifted.nodes[c] for c in a.consumers) if n in found]
    return [skip_views(*pair) for pair in pairs] if a.kind.startswith("experts") else pairs


def check_row_site(lifted: LiftedProgram, a: Attachment) -> None:
    """Raise TargetError where the site ``a`` cannot have per-row adapters, whatever the adapters' values are."""
    reason = ""
    for node, _ in site_consumers(lifted, a):
        if subgraph_input_of(node) is not None:
            reason = "it is called inside a block (no_grad, autocast, cond, map, ...)"
        elif not isinstance(node.meta.get("val"), Tensor):
            reason = "it is read by a layer with several results"
        elif not a.method.bank.row_wise:
            reason = f"what {a.method.name} does to a row depends on the whole batch"
        elif not acts_around_layer(a, site_op(lifted, a)) and not a.method.has_weight():
            reason = f"{a.method.name} has no form there that can be given to each row"
    if reason:
        raise TargetError(
            f"{a.fqn!r} cannot have another adapter for each row of a batch: {reason}. Leave the module out of the "
            "targets, or run the rows of each adapter as a batch of their own, with prog.bind"
        )


@dataclass(frozen=True)
class InjectRows(Pass):
    """A pass that injects per-row adapters; its count is that of the sites.

    ``values`` maps FQNs to stacked slots and scales, of ``adapter_count`` adapters. ``axes`` has the axis of the batch
    rows in the inputs and outputs of consumers. ``row_input`` is a user input and its axis of batch rows.
    ``coefficients_name`` is the name of the coefficients.

    ``uses_fused_ops`` is for code that is run and not compiled: it uses operators of adaptc where there are any.
    ``kernel_sites`` has the ids of sites that GPU kernels compute; each of these has one more slot,
    :data:`RANK_STARTS`. With ``tag_regions`` the regions have tags, so that ``bypass_regions`` can remove them.
    Programs in files have none.
    """

    name: ClassVar[str] = "inject_rows"

    attachments: Sequence[Attachment] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)
    axes: RowAxes = field(repr=False)
    row_input: tuple[str, int]
    adapter_count: int
    coefficients_name: str
    uses_fused_ops: bool = False
    kernel_sites: Collection[str] = ()
    tag_regions: bool = False

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        lifted.freeze()
        ops = {a.id: site_op(lifted, a) for a in self.attachments}
        for a in self.attachments:
            check_row_site(lifted, a)
            for fqn in a.tensor_names:
                if fqn not in lifted.placeholders:
                    value = self.values[fqn]
                    lifted.add_tensor(fqn, as_parameter_or_buffer(value, value.requires_grad))
        coefficients = CoefficientMaker(lifted, self.adapter_count)
        attachments = [coefficients.with_coefficients(a) for a in self.attachments]
        name, axis = self.row_input
        c = lifted.add_input(self.coefficients_name, lifted.nodes[name], [axis], torch.float32, [self.adapter_count])
        _RowInjector(
            lifted,
            attachments,
            ops,
            self.axes,
            self.adapter_count,
            c,
            self.uses_fused_ops,
            self.kernel_sites,
            self.tag_regions,
        ).run()
        return PassResult(lifted.finish(), len(self.attachments))


@dataclass
class _RowInjector:
    lifted: LiftedProgram
    attachments: Sequence[Attachment]
    ops: Mapping[str, Op]
    axes: RowAxes
    adapter_count: int
    coefficients: fx.Node
    uses_fused_ops: bool
    kernel_sites: Collection[str]
    tag_regions: bool
    traces: dict[Any, fx.Graph] = field(default_factory=dict[Any, fx.Graph])
    picked_coefficients: dict[tuple[str, str], fx.Node] = field(default_factory=dict[tuple[str, str], fx.Node])
    latest_outputs: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])

    def run(self) -> None:
        calls: dict[fx.Node, list[tuple[Attachment, fx.Node]]] = {}
        for a in self.attachments:
            for node, read in site_consumers(self.lifted, a):
                if acts_around_layer(a, self.ops[a.id]):
                    self._add_around_layer(a, node)
                else:
                    calls.setdefault(node, []).append((a, read))
        for node, replaced in calls.items():
            self._add_repeated_call(node, replaced)

    def _coefficients_at(self, row_axis: RowAxis) -> fx.Node:
        """Return the coefficients of the rows that are at ``row_axis``: all, or those that a node picks."""
        if row_axis.routed_by:
            key, taking = (row_axis.routed_by, row_axis.layout), self.lifted.nodes[row_axis.routed_by]
            source, indices = taking.all_input_nodes
            pick, inputs = partial(_pick_tokens, row_axis), [self.coefficients, indices, source]
        elif row_axis.picked_by:
            key, indices = (row_axis.picked_by, ""), self.lifted.nodes[row_axis.picked_by]
            pick, inputs = _pick_rows, [self.coefficients, indices]
        else:
            return self.coefficients
        if key not in self.picked_coefficients:
            region = trace_function(pick, [n.meta["val"] for n in inputs])
            before = max(inputs, key=list(self.lifted.graph.nodes).index).next
            self.picked_coefficients[key] = self._inline(region, inputs, before, self.coefficients)
        return self.picked_coefficients[key]

    def _bank_site(self, a: Attachment, op: Op) -> BankSite:
        names, grouped = tuple(n for n in a.input_names if n != RANK_STARTS), a.id in self.kernel_sites
        return BankSite(a.method, op, names, a.scale_slot is not None, self.adapter_count, self.uses_fused_ops, grouped)

    def _add_around_layer(self, a: Attachment, node: fx.Node) -> None:
        op = self.ops[a.id].as_called_by(node)
        slots, site = self._slot_nodes(a), self._bank_site(a, op)
        if a.method.has_input(op):
            x = operands(node)[0]
            row_axis = self.axes[x.name]
            inputs = [x, self._coefficients_at(row_axis), *slots]
            region = self._trace_region(("input", site, row_axis), partial(make_input_function, site, row_axis), inputs)
            changed = self._inline(region, inputs, node, node, {"sites": [a.id], "base": x.name})
            set_argument(node, LAYER_OPS[node.target][1], changed)
        if a.method.has_apply(op):
            y, row_axis = self.latest_outputs.get(node, node), self.axes[node.name]
            kind, inputs = output_region_inputs(node, y)
            inputs = [*inputs, self._coefficients_at(row_axis), *slots]
            biased = kind == "apply_bias"
            region = self._trace_region(
                (kind, site, row_axis), partial(make_output_function, site, row_axis, biased), inputs
            )
            self._insert_after(node, region, inputs, [a])

    def _slot_nodes(self, a: Attachment) -> list[fx.Node]:
        """Return the nodes that the regions of ``a`` read: slots, the scale, and where each adapter's ranks begin."""
        starts = [self.lifted.placeholders[a.slots[RANK_STARTS]]] if RANK_STARTS in a.slots else []
        plain = replace(a, slots={n: f for n, f in a.slots.items() if n != RANK_STARTS})
        return [*slot_nodes(plain, self.lifted.placeholders, self.lifted.nodes), *starts]

    def _add_repeated_call(self, node: fx.Node, replaced: Sequence[tuple[Attachment, fx.Node]]) -> None:
        """Add the region that calls ``node`` again with each adapter's version of the parameters in ``replaced``.

        A bias of a layer, if it is the only one replaced, is added to the output instead.
        """
        row_axis, y = self.axes[node.name], self.latest_outputs.get(node, node)
        sites = [self._bank_site(a, self.ops[a.id]) for a, _ in replaced]
        slots = [s for a, _ in replaced for s in slot_nodes(a, self.lifted.placeholders, self.lifted.nodes)]
        layer = node.target in LAYER_OPS
        if layer and len(replaced) == 1 and operands(node)[2] is replaced[0][1]:
            b = self.lifted.placeholders[replaced[0][0].fqn]
            op = _layer_op(node)
            inputs = [y, b, self._coefficients_at(row_axis), *slots]
            region = self._trace_region(
                ("bias", sites[0], row_axis, op), partial(make_bias_function, sites[0], row_axis, op), inputs
            )
            self._insert_after(node, region, inputs, [replaced[0][0]])
            return
        own = list(dict.fromkeys(node.all_input_nodes))
        if len(replaced) == 1 and is_expert_matmul(node, replaced[0][1]) and self._has_factors(sites[0], slots):
            inputs = [y, *own, self._coefficients_at(row_axis), *slots]
            region = self._trace_region(
                ("experts", *describe_call(node), sites[0], row_axis),
                partial(make_expert_function, node, sites[0], row_axis),
                inputs,
            )
            self._insert_after(node, region, inputs, [replaced[0][0]])
            return
        parameters = [self.lifted.placeholders[a.fqn] for a, _ in replaced]
        places = [own.index(read) for _, read in replaced]
        call = _call_again(node, own, [read for _, read in replaced], places)
        biases = [_bias_position(a, node, read, own) for a, read in replaced]
        each = [ReplacedParameter(*one) for one in zip(sites, places, biases, strict=True)]
        inputs = [y, node, *own, *parameters, self._coefficients_at(row_axis), *slots]
        region = self._trace_region(None, partial(make_call_function, call, each, row_axis, len(own)), inputs)
        self._insert_after(node, region, inputs, [a for a, _ in replaced])

    def _has_factors(self, site: BankSite, slots: Sequence[fx.Node]) -> bool:
        """Return whether the method gives factors for each expert of the site, and they are those of its own weight."""
        defines = site.method.class_that_defines
        if not site.op.experts or not issubclass(defines("bank"), defines("weight")):
            return False
        own, _ = site.split_tensors([n.meta["val"] for n in slots])
        with nullcontext() if self.lifted.fake_mode is None else self.lifted.fake_mode:
            return site.method.bank.expert_factors(site.op, own) is not None

    def _trace_region(self, key: Any, make: Callable[[], Callable[..., Tensor]], inputs: Sequence[fx.Node]) -> fx.Graph:
        fakes = [n.meta["val"] for n in inputs]
        if key is None:
            return trace_function(make(), fakes)
        key = (*key, trace_key(fakes))
        if key not in self.traces:
            self.traces[key] = trace_function(make(), fakes)
        return self.traces[key]

    def _insert_after(
        self, node: fx.Node, region: fx.Graph, inputs: Sequence[fx.Node], sites: Sequence[Attachment]
    ) -> None:
        y = self.latest_outputs.get(node, node)
        users = list(y.users)
        out = self._inline(region, inputs, y.next, node, {"sites": [a.id for a in sites], "base": y.name})
        for user in users:
            user.replace_input_with(y, out)
        self.latest_outputs[node] = out

    def _inline(
        self,
        region: fx.Graph,
        inputs: Sequence[fx.Node],
        before: fx.Node,
        like: fx.Node,
        tag: Mapping[str, Any] | None = None,
    ) -> fx.Node:
        known = set(self.lifted.graph.nodes)
        out = inline(self.lifted.graph, region, inputs, before, like, lambda role: {"role": role})
        for node in self.lifted.graph.nodes:
            if node not in known:
                role = node.meta.pop("custom")["adaptc"]["role"]
                if tag is not None and self.tag_regions:
                    node.meta["custom"] = {ROW_TAG_KEY: {**tag, "role": role}}
        return out


def _pick_rows(coefficients: Tensor, indices: Tensor) -> Tensor:
    return coefficients.index_select(0, indices)


def _pick_tokens(row_axis: RowAxis, coefficients: Tensor, indices: Tensor, source: Tensor) -> Tensor:
    """Return the coefficients of the tokens at ``indices`` of ``source``, whose first axis has the rows."""
    return repeat_coefficients(coefficients, source.shape[0], row_axis).index_select(0, indices)


def _bias_position(a: Attachment, node: fx.Node, read: fx.Node, call_inputs: Sequence[fx.Node]) -> int | None:
    """Return ``Replaced.bias`` for a weight: the position of the layer's bias in ``own``, or -1 where it has none.

    Gives None where the method leaves the bias alone, or where ``read`` is not the layer's weight.
    """
    if node.target not in LAYER_OPS or operands(node)[1] is not read or not a.method.has_bias():
        return None
    bias = operands(node)[2]
    return -1 if bias is None else call_inputs.index(bias)


def _layer_op(node: fx.Node) -> Op:
    """Return the op of a layer, for a method that changes its bias: it tells the axis of the output's channels."""
    kind = LAYER_OPS[node.target][0]
    return Op(kind, tuple(operands(node)[1].meta["val"].shape), node.target)


def _call_again(
    node: fx.Node, call_inputs: Sequence[fx.Node], reads: Sequence[fx.Node], positions: Sequence[int]
) -> Callable[[Mapping[int, Tensor], Sequence[Tensor]], Tensor]:
    """Return a function that calls a node's op on other tensors.

    ``call_inputs`` are the node's inputs in order. Those at ``positions`` are replaced. What replaces one is a
    parameter, and the call reads it as ``reads`` says: through the same views, in the same dtype.
    """
    views = {position: views_of_parameter(read) for position, read in zip(positions, reads, strict=True)}

    def replacement(value: Tensor, position: int) -> Tensor:
        for view in views[position]:
            value = take_view(view, value)
        return cast(value, call_inputs[position].meta["val"].dtype)

    def call(new: Mapping[int, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        at = {n: replacement(new[i], i) if i in new else tensors[i] for i, n in enumerate(call_inputs)}
        args, kwargs = fx.map_arg((node.args, node.kwargs), at.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return call
