"""Inject per-row adapters: each row of a batch has its own mix of several adapters, by coefficients of the call.

Takes a program without adapters, and its sites with the axis of the batch rows in the values there. Every slot and
scale comes as a stacked tensor, whose first axis is that of the adapters.

The stacked tensors become lifted buffers of the program. It takes one more keyword, a float32 tensor (rows, adapters).
Regions of pure ATen compute what ``passes.protocol.bank_method`` says. With coefficients of zero the program computes
exactly what it did. Regions have no tags: the caller knows what it injected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.errors import TargetError
from adaptc.passes.adapt.inject import as_lifted
from adaptc.passes.adapt.make_coefficients import Coefficients
from adaptc.passes.analysis.sites import consumers
from adaptc.passes.graph.higher_order import inside
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.ops import TABLE, Op, cast, operands, set_argument
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.bank_method import (
    STARTS,
    BankSite,
    Replaced,
    RowAxis,
    bias_of,
    call_of,
    input_of,
    output_of,
)
from adaptc.passes.protocol.regions import site_op, slot_nodes
from adaptc.passes.protocol.trace import behind_inputs, inline, signature_of, trace

#: name of a node -> the axis of its value that has the rows
Axes = Mapping[str, RowAxis]


def around(a: Attachment, op: Op) -> bool:
    """Return whether a method's regions stand around the layer here, at its input or its output.

    Otherwise a second call of the layer reads another weight for each adapter. A method that changes both input and
    output is of that kind where it can: of a mix of adapters, the two changes would not add up.
    """
    m = a.method
    return m.has_apply_form(op) and not (m.has_input(op) and m.has_apply(op) and m.has_weight())


def read_at(lifted: Lifted, a: Attachment) -> list[tuple[fx.Node, fx.Node]]:
    """Return (consumer, the node of the parameter that it reads) for the consumers of a site."""
    found = dict(consumers(lifted.placeholders[a.fqn]))
    return [(n, found[n]) for n in (lifted.nodes[c] for c in a.consumers) if n in found]


def check_site(lifted: Lifted, a: Attachment) -> None:
    """Raise TargetError where the site ``a`` cannot have per-row adapters, whatever the adapters' values are."""
    why = ""
    for node, _ in read_at(lifted, a):
        if inside(node) is not None:
            why = "it is called inside a block (no_grad, autocast, cond, map, ...)"
        elif a.kind.startswith("experts"):
            why = "it is an expert's, whose inputs are tokens in another order than the batch has them"
        elif not isinstance(node.meta.get("val"), Tensor):
            why = "it is read by a layer with several results"
        elif not a.method.row_wise:
            why = f"what {a.method.name} does to a row depends on the whole batch"
        elif not around(a, site_op(lifted, a)) and not a.method.has_weight():
            why = f"{a.method.name} has no form there that can be given to each row"
    if why:
        raise TargetError(
            f"{a.fqn!r} cannot have another adapter for each row of a batch: {why}. Leave the module out of the "
            "targets, or run the rows of each adapter as a batch of their own, with prog.bind"
        )


@dataclass(frozen=True)
class InjectRows(Pass):
    """A pass that injects per-row adapters; its count is that of the sites.

    ``values`` maps FQNs to stacked slots and scales, of ``count`` adapters. ``axes`` has the axis of the batch rows in
    the inputs and outputs of consumers. ``rows`` is a user input and its axis of batch rows. ``keyword`` is the name of
    the coefficients.

    ``at_once`` is for code that is run and not compiled: it uses operators of adaptc where there are any. ``grouped``
    has the ids of sites that GPU kernels compute; each of these has one more slot, :data:`STARTS`.
    """

    name: ClassVar[str] = "inject_rows"

    attachments: Sequence[Attachment] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)
    axes: Axes = field(repr=False)
    rows: tuple[str, int]
    count: int
    keyword: str
    at_once: bool = False
    grouped: Collection[str] = ()

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = Lifted(subject)
        lifted.freeze()
        ops = {a.id: site_op(lifted, a) for a in self.attachments}
        for a in self.attachments:
            check_site(lifted, a)
            for fqn in a.tensor_names:
                if fqn not in lifted.placeholders:
                    value = self.values[fqn]
                    lifted.add(fqn, as_lifted(value, value.requires_grad))
        coefficients = Coefficients(lifted, self.count)
        attachments = [coefficients.of(a) for a in self.attachments]
        name, axis = self.rows
        c = lifted.add_input(self.keyword, lifted.nodes[name], [axis], torch.float32, [self.count])
        _Writer(lifted, attachments, ops, self.axes, self.count, c, self.at_once, self.grouped).run()
        return PassResult(lifted.finish(), len(self.attachments))


@dataclass
class _Writer:
    lifted: Lifted
    attachments: Sequence[Attachment]
    ops: Mapping[str, Op]
    axes: Axes
    count: int
    c: fx.Node
    at_once: bool
    grouped: Collection[str]
    traces: dict[Any, fx.Graph] = field(default_factory=dict)
    latest: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def run(self) -> None:
        calls: dict[fx.Node, list[tuple[Attachment, fx.Node]]] = {}
        for a in self.attachments:
            for node, read in read_at(self.lifted, a):
                if around(a, self.ops[a.id]):
                    self._around(a, node)
                else:
                    calls.setdefault(node, []).append((a, read))
        for node, replaced in calls.items():
            self._call(node, replaced)

    def _site(self, a: Attachment, op: Op) -> BankSite:
        names, grouped = tuple(n for n in a.input_names if n != STARTS), a.id in self.grouped
        return BankSite(a.method, op, names, a.scale_slot is not None, self.count, self.at_once, grouped)

    def _around(self, a: Attachment, node: fx.Node) -> None:
        op = self.ops[a.id].at(node)
        slots, site = self._slots(a), self._site(a, op)
        if a.method.has_input(op):
            x = operands(node)[0]
            inputs, where = [x, self.c, *slots], self.axes[x.name]
            region = self._region(("input", site, where), partial(input_of, site, where), inputs)
            set_argument(node, TABLE[node.target][1], self._inline(region, inputs, node, node))
        if a.method.has_apply(op):
            y, where = self.latest.get(node, node), self.axes[node.name]
            kind, inputs = behind_inputs(node, y)
            inputs = [*inputs, self.c, *slots]
            biased = kind == "apply_bias"
            region = self._region((kind, site, where), partial(output_of, site, where, biased), inputs)
            self._behind(node, region, inputs)

    def _slots(self, a: Attachment) -> list[fx.Node]:
        """Return the nodes that the regions of ``a`` read: slots, the scale, and where each adapter's ranks begin."""
        starts = [self.lifted.placeholders[a.slots[STARTS]]] if STARTS in a.slots else []
        plain = replace(a, slots={n: f for n, f in a.slots.items() if n != STARTS})
        return [*slot_nodes(plain, self.lifted.placeholders, self.lifted.nodes), *starts]

    def _call(self, node: fx.Node, replaced: Sequence[tuple[Attachment, fx.Node]]) -> None:
        """Add the region that calls ``node`` again with each adapter's version of the parameters in ``replaced``.

        A bias of a layer, if it is the only one replaced, is added to the output instead.
        """
        where, y = self.axes[node.name], self.latest.get(node, node)
        sites = [self._site(a, self.ops[a.id]) for a, _ in replaced]
        slots = [s for a, _ in replaced for s in slot_nodes(a, self.lifted.placeholders, self.lifted.nodes)]
        layer = node.target in TABLE
        if layer and len(replaced) == 1 and operands(node)[2] is replaced[0][1]:
            b = self.lifted.placeholders[replaced[0][0].fqn]
            op = _layer(node)
            inputs = [y, b, self.c, *slots]
            region = self._region(("bias", sites[0], where, op), partial(bias_of, sites[0], where, op), inputs)
            self._behind(node, region, inputs)
            return
        own = list(dict.fromkeys(node.all_input_nodes))
        parameters = [self.lifted.placeholders[a.fqn] for a, _ in replaced]
        places = [own.index(read) for _, read in replaced]
        call = _again(node, own, [read.meta["val"].dtype for _, read in replaced], places)
        biases = [_bias_place(a, node, read, own) for a, read in replaced]
        each = [Replaced(*one) for one in zip(sites, places, biases, strict=True)]
        inputs = [y, node, *own, *parameters, self.c, *slots]
        region = self._region(None, partial(call_of, call, each, where, len(own)), inputs)
        self._behind(node, region, inputs)

    def _region(self, key: Any, make: Callable[[], Callable[..., Tensor]], inputs: Sequence[fx.Node]) -> fx.Graph:
        fakes = [n.meta["val"] for n in inputs]
        if key is None:
            return trace(make(), fakes)
        key = (*key, signature_of(fakes))
        if key not in self.traces:
            self.traces[key] = trace(make(), fakes)
        return self.traces[key]

    def _behind(self, node: fx.Node, region: fx.Graph, inputs: Sequence[fx.Node]) -> None:
        y = self.latest.get(node, node)
        users = list(y.users)
        out = self._inline(region, inputs, y.next, node)
        for user in users:
            user.replace_input_with(y, out)
        self.latest[node] = out

    def _inline(self, region: fx.Graph, inputs: Sequence[fx.Node], before: fx.Node, like: fx.Node) -> fx.Node:
        known = set(self.lifted.graph.nodes)
        out = inline(self.lifted.graph, region, inputs, before, like, lambda role: {})
        for node in self.lifted.graph.nodes:
            if node not in known:
                del node.meta["custom"]
        return out


def _bias_place(a: Attachment, node: fx.Node, read: fx.Node, own: Sequence[fx.Node]) -> int | None:
    """Return ``Replaced.bias`` for a weight: the position of the layer's bias in ``own``, or -1 where it has none.

    Gives None where the method leaves the bias alone, or where ``read`` is not the layer's weight.
    """
    if node.target not in TABLE or operands(node)[1] is not read or not a.method.has_bias():
        return None
    bias = operands(node)[2]
    return -1 if bias is None else own.index(bias)


def _layer(node: fx.Node) -> Op:
    """Return the op of a layer, for a method that changes its bias: it tells the axis of the output's channels."""
    kind = TABLE[node.target][0]
    return Op(kind, tuple(operands(node)[1].meta["val"].shape), node.target)


def _again(
    node: fx.Node, own: Sequence[fx.Node], dtypes: Sequence[torch.dtype], places: Sequence[int]
) -> Callable[[Mapping[int, Tensor], Sequence[Tensor]], Tensor]:
    """Return a function that calls a node's op on other tensors.

    ``own`` are the node's inputs in order. Those at ``places`` are replaced, and cast to ``dtypes``.
    """
    types = dict(zip(places, dtypes, strict=True))

    def call(new: Mapping[int, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        at = {n: cast(new[i], types[i]) if i in new else tensors[i] for i, n in enumerate(own)}
        args, kwargs = fx.map_arg((node.args, node.kwargs), at.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return call
