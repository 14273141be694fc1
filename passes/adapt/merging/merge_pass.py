"""Merge: evaluate each adapter's ``weight`` once and put the result in place of the parameter (constant folding).

The result is a plain ATen program with no region and no slot. It computes what the adapted program did, up to one
rounding of each weight to its dtype. The arithmetic runs in float32 (float64 for float64 weights), whatever the
weight's dtype. A weight that other consumers read too is untied first, so that they keep the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.errors import FilePlaceError, MergeError
from adaptc.passes.adapt.merging.site_merge import MergeErrors, SiteMerge
from adaptc.passes.analysis.sites import find_consumers, has_other_readers, isolate_readers
from adaptc.passes.graph.higher_order import bias_and_reader, subgraph_input_of, takes_bias
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import CASTS, LAYER_OPS, Op, argument, make_dense
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.graph.storage import memory_address
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.regions import remove_regions, site_op
from adaptc.torch_typing import vector_norm

#: a bias placeholder (None where there is none yet), the nodes that add it, and its new value
_MergedBias = tuple[fx.Node | None, list[fx.Node], Tensor]


def _round_to_dtype(fqn: str, old: Tensor, exact: Tensor) -> Tensor:
    """Return the weight ``exact`` in the dtype of the weight that it replaces, and in its layout."""
    return _with_strides_of(old, exact.to(old.dtype))


class MergedWeight(NamedTuple):
    """A weight that a merge makes, the biases that change with it, by name, and the row of the report."""

    value: Tensor
    biases: Mapping[str, Tensor]
    row: SiteMerge


@dataclass(frozen=True)
class Merge(Pass):
    """A pass that merges adapters into weights; its count is that of the weights, its data a SiteMerge for each.

    ``values`` maps slot and scale FQNs to tensors. ``safe`` refuses results that are not finite. ``dropped_ids`` has
    the ids of attachments to remove without merging, since the adapter does not have them.

    ``store(fqn, old, exact)`` returns the tensor that takes the place of the weight ``old``; by default it has its
    dtype.

    ``release(fqn)`` is called right after a weight was replaced. A caller who gives up the base can free it then,
    before the next one is made. ``progress`` wraps the sequence of weights.
    """

    name: ClassVar[str] = "merge"

    attachments: Sequence[Attachment] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)
    safe: bool = True
    release: Callable[[str], None] | None = field(default=None, repr=False)
    progress: Callable[[Sequence[Any]], Any] = field(default=iter, repr=False)
    dropped_ids: Sequence[str] = field(default=(), repr=False)
    store: Callable[[str, Tensor, Tensor], Tensor] = field(default=_round_to_dtype, repr=False)

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        self._check_methods(lifted)
        ops, groups = self._attachments_by_weight(lifted)
        remove_regions(lifted, [*self.dropped_ids, *(a.id for a in self.attachments)])
        if self.release is not None:  # What is given up cannot come back, so nothing may fail later than here.
            for group in groups:
                self._evaluate(lifted, group, ops)
        rows = [self._merge_weight(lifted, group, ops) for group in self.progress(groups)]
        return PassResult(lifted.finish(), len(rows), data=tuple(rows))

    def merged_weights(self, program: ExportedProgram) -> tuple[list[Tensor], list[SiteMerge]]:
        """Return the weights that this merge makes, and the row of the report for each; the program is unchanged."""
        lifted = LiftedProgram(program, edit=False)
        ops, groups = self._attachments_by_weight(lifted)
        made = [(g[0].fqn, self._evaluate(lifted, g, ops)) for g in self.progress(groups)]
        return [_as_in_program(lifted, fqn, value) for fqn, (value, _, _) in made], [row for _, (_, _, row) in made]

    def lazy_weights(self, program: ExportedProgram) -> dict[str, Callable[[], MergedWeight]]:
        """Return, by name, a function for each weight that the merge changes, which makes that weight alone.

        The program is unchanged, and nothing is kept of a weight. Raises FilePlaceError for a weight that other layers
        read unchanged, since it would need a second tensor. The functions raise it for biases that the program lacks.
        """
        lifted = LiftedProgram(program)  # a copy, in which the adapters' own readers of weights are gone
        self._check_methods(lifted)
        ops, groups = self._attachments_by_weight(lifted)
        remove_regions(lifted, [*self.dropped_ids, *(a.id for a in self.attachments)])
        for first in (group[0] for group in groups):
            if has_other_readers(lifted.placeholders[first.fqn], first.consumers):
                others = [f for f in lifted.fqns_of(lifted.placeholders[first.fqn]) if f != first.fqn]
                raise FilePlaceError(
                    f"the adapter changes {first.fqn!r} at some of the layers that read it, and others keep the base"
                    f"{f' (it is tied to {others[0]!r})' if others else ''}: the merged model has two weights for it"
                )
        return {group[0].fqn: partial(self._merged_weight, lifted, group, ops) for group in groups}

    def _check_methods(self, lifted: LiftedProgram) -> None:
        for a in self.attachments:
            reason = a.method.check_merge(site_op(lifted, a))
            if reason is not None:
                raise MergeError(f"site {a.id!r} cannot be merged: {reason}. Keep it as an adapter, or unload() it.")

    def _merged_weight(self, lifted: LiftedProgram, group: list[Attachment], ops: Mapping[str, Op]) -> MergedWeight:
        value, changed, row = self._evaluate(lifted, group, ops)
        biases: dict[str, Tensor] = {}
        for source, nodes, bias in changed:
            if source is None or has_other_readers(source, [n.name for n in nodes]):
                lack = "has no bias" if source is None else "shares its bias with layers that keep theirs"
                raise FilePlaceError(f"site {group[0].id!r} changes a bias, and the layer {lack} in the model")
            biases[str(lifted.input_specs[source.name].target)] = bias
        return MergedWeight(value, biases, row)

    def weight_change_norms(self, program: ExportedProgram) -> Iterator[tuple[str, tuple[float, float]]]:
        """Yield the FQN of each weight, with the Frobenius norms of its change and of the old weight.

        The program is unchanged. Weights of integers, and those that get another shape, are left out.
        """
        lifted = LiftedProgram(program, edit=False)
        ops, groups = self._attachments_by_weight(lifted)
        for group in groups:
            fqn = group[0].fqn
            stored, high = lifted.tensor(fqn), _merge_dtype(lifted.tensor(fqn))
            made = self._exact_weight(lifted, group, ops, high)()
            if made.shape == stored.shape and (made.is_floating_point() or made.is_complex()):
                before = _to_merge_dtype(stored, high)
                with torch.no_grad():
                    yield fqn, (float(vector_norm(made - before)), float(vector_norm(before)))

    def _attachments_by_weight(self, lifted: LiftedProgram) -> tuple[dict[str, Op], list[list[Attachment]]]:
        """Return attachment id -> its op, and the attachments grouped by weight."""
        groups: dict[str, list[Attachment]] = {}
        for a in self.attachments:
            groups.setdefault(a.fqn, []).append(a)
        return {a.id: site_op(lifted, a) for a in self.attachments}, list(groups.values())

    def _merge_weight(self, lifted: LiftedProgram, group: list[Attachment], ops: Mapping[str, Op]) -> SiteMerge:
        first = group[0]
        value, biases, row = self._evaluate(lifted, group, ops)
        for old, nodes, bias in biases:
            self._set_bias(lifted, first, old, nodes, bias)
        before = {f: lifted.tensor(f) for f in lifted.fqns_of(lifted.placeholders[first.fqn])}
        untied = self._replace_weight(lifted, first, value)
        if self.release is not None:
            for fqn, old in before.items():
                if lifted.tensor(fqn) is not old:
                    self.release(fqn)
        return replace(row, untied=untied)

    @torch.no_grad()
    def _evaluate(
        self, lifted: LiftedProgram, group: list[Attachment], ops: Mapping[str, Op]
    ) -> tuple[Tensor, list[_MergedBias], SiteMerge]:
        """Return the weight that these attachments make, the changed biases, and the row of the report.

        The program is unchanged. Raises MergeError where a result is not finite, if ``safe``, and where a bias has no
        place.
        """
        first = group[0]
        stored, dtype = lifted.tensor(first.fqn), _merge_dtype(lifted.tensor(first.fqn))
        arguments = {a.id: self._slots_and_scale(a, dtype) for a in group}
        exact = self._exact_weight(lifted, group, ops, dtype, arguments)
        rounded = self.store(first.fqn, stored, exact())
        if any(memory_address(rounded) == memory_address(self.values[f]) for a in group for f in a.slots.values()):
            rounded = rounded.clone()  # the merged weight must not change when such a slot is trained further
        self._check_finite(first, first.fqn, rounded)
        errors = MergeErrors(exact, stored, rounded)
        if self.release is not None:
            errors()  # measured now, since the old weight will be freed
        changing = [a for a in group if a.method.has_bias()]
        biases = list(self._changed_biases(lifted, changing, ops, arguments, dtype)) if changing else []
        return rounded, biases, SiteMerge(first.id, first.fqn, stored.dtype, errors)

    def _exact_weight(
        self,
        lifted: LiftedProgram,
        group: Sequence[Attachment],
        ops: Mapping[str, Op],
        dtype: torch.dtype,
        arguments: Mapping[str, tuple[dict[str, Tensor], Tensor | None]] | None = None,
    ) -> Callable[[], Tensor]:
        """Return a function that computes the weight that these attachments make, in dtype ``high``, before rounding.

        ``arguments`` maps attachment ids to (slots, scale) in that dtype; None converts them here.
        """
        stored = lifted.tensor(group[0].fqn)
        given = {a.id: self._slots_and_scale(a, dtype) for a in group} if arguments is None else arguments

        @torch.no_grad()
        def exact() -> Tensor:
            base = value = _to_merge_dtype(stored, dtype)
            for a in group:
                op, method = ops[a.id], a.method.evaluated()
                value = op.stored(method.weight_over(op, op.canonical(base), op.canonical(value), *given[a.id]))
            return value

        return exact

    def _slots_and_scale(self, a: Attachment, high: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None]:
        slots = {n: _to_merge_dtype(self.values[f], high) for n, f in a.slots.items()}
        return slots, None if a.scale_slot is None else _to_merge_dtype(self.values[a.scale_slot], high)

    def _check_finite(self, a: Attachment, what: str, value: Tensor) -> None:
        # The sum needs no memory, and is not finite where a value is not. It may also overflow: then ask each value.
        if self.safe and not bool(value.sum().isfinite()) and not bool(torch.isfinite(value).all()):
            raise MergeError(
                f"merging {a.id!r} gives values in {what!r} that are not finite in {value.dtype}. The "
                "adapter holds NaN or infinite values, or the sum overflows the dtype; load a sound adapter, merge "
                "into a float32 base, or pass safe=False to keep the values."
            )

    def _replace_weight(self, lifted: LiftedProgram, a: Attachment, value: Tensor) -> bool:
        node = lifted.placeholders[a.fqn]
        read = {n for n, _ in find_consumers(node)}
        site_readers = {n for n in read if n.name in a.consumers}
        new = _as_in_program(lifted, a.fqn, value)
        if value.shape != lifted.tensor(a.fqn).shape:
            for n in site_readers:
                make_dense(n, remember=False)
        if len(site_readers) == len(read):
            lifted.set_tensor(a.fqn, new)
            return False
        lifted.untie(a.fqn, isolate_readers(lifted.graph, node, site_readers), new)
        return True

    def _changed_biases(
        self,
        lifted: LiftedProgram,
        changing: Sequence[Attachment],
        ops: Mapping[str, Op],
        arguments: Mapping[str, tuple[dict[str, Tensor], Tensor | None]],
        dtype: torch.dtype,
    ) -> Iterator[_MergedBias]:
        """Yield (placeholder, nodes that add it, new value) for each bias of the weight's consumers that changes.

        The placeholder is None where there is no bias yet. Raises MergeError for a bias that the program computes, and
        for an op that takes none.
        """
        first, shared = changing[0], dict[fx.Node | None, list[fx.Node]]()
        for node in (lifted.nodes[c] for c in first.consumers):
            b, reader = bias_and_reader(lifted.nodes, node) if takes_bias(node) else (None, node)
            shared.setdefault(b, []).append(reader)
        for old, nodes in shared.items():
            source = _source_parameter(old)
            target = None if source is None else lifted.input_specs[source.name].target
            start = None if target is None else _to_merge_dtype(lifted.tensor(target), dtype)
            if old is not None and start is None:  # a computed bias: zeros show whether it would change
                start = torch.zeros(ops[first.id].out_features, dtype=dtype, device=lifted.tensor(first.fqn).device)
            new = start
            for a in changing:
                op = ops[a.id]
                if a.method.bias_reads_weight():
                    base = op.canonical(_to_merge_dtype(lifted.tensor(a.fqn), dtype))
                    new = a.method.bias_over(op, base, start, new, *arguments[a.id])
                else:
                    new = a.method.bias(op, new, *arguments[a.id])
            if new is None or new is start:
                continue
            if old is not None and target is None:
                raise MergeError(
                    f"site {first.id!r}: the bias is computed by {old.name!r}, so nothing can be merged into it"
                )
            if old is None and not (takes_bias(nodes[0]) and subgraph_input_of(nodes[0]) is None):
                raise MergeError(
                    f"site {first.id!r}: an op of kind {first.kind!r} takes no bias, and the adapter has one"
                )
            value = new.to((nodes[0] if source is None else source).meta["val"].dtype).contiguous()
            self._check_finite(first, f"{first.module}.bias".removeprefix("."), value)
            yield source, nodes, torch.nn.Parameter(value, requires_grad=False)

    def _set_bias(
        self, lifted: LiftedProgram, a: Attachment, source: fx.Node | None, nodes: list[fx.Node], value: Tensor
    ) -> None:
        """Put the bias ``value`` in place of ``source``, for ``nodes``.

        A bias that other consumers read too is untied first. A missing one (``source`` None) is added.
        """
        if source is None:
            fqn = f"{a.module}.bias".removeprefix(".")
            while fqn in lifted.state_dict:
                fqn += "_merged"
            node = lifted.add_tensor(fqn, value)
            at = LAYER_OPS[nodes[0].target][3]
            assert at is not None
            for n in nodes:
                n.args = tuple(node if i == at else argument(n, i) for i in range(max(len(n.args), at + 1)))
            return
        fqn = f"{a.module}.bias".removeprefix(".")
        target = fqn if lifted.placeholders.get(fqn) is source else lifted.input_specs[source.name].target
        assert target is not None
        if {n for n, _ in find_consumers(source)} <= set(nodes):
            lifted.set_tensor(target, value)
        else:
            lifted.untie(target, isolate_readers(lifted.graph, source, nodes), value)


def _as_in_program(lifted: LiftedProgram, fqn: str, value: Tensor) -> Tensor:
    """Return ``value`` as a Parameter where ``fqn`` is one in the program, and as a plain tensor otherwise."""
    parameter = lifted.input_specs[lifted.placeholders[fqn].name].kind == InputKind.PARAMETER
    return torch.nn.Parameter(value, requires_grad=False) if parameter else value


def _source_parameter(node: fx.Node | None) -> fx.Node | None:
    """Return the placeholder that a bias comes from, through casts; None when it is computed."""
    while node is not None and node.op != "placeholder":
        node = node.args[0] if node.target in CASTS and isinstance(node.args[0], fx.Node) else None
    return node


def _with_strides_of(stored: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` with the strides of ``stored``: outputs follow a weight's layout, and views rely on theirs."""
    if value.shape != stored.shape:
        return value.contiguous()
    return value if value.stride() == stored.stride() else torch.empty_like(stored).copy_(value)


def _merge_dtype(stored: Tensor) -> torch.dtype:
    """Return the dtype in which a weight is merged: float64 for float64 and complex128, float32 for others."""
    return torch.float64 if stored.dtype in (torch.float64, torch.complex128) else torch.float32


def _to_merge_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``t`` in the dtype that a merge computes in, complex where ``t`` is; integers stay as they are."""
    if t.is_complex():
        return t.detach().to(dtype.to_complex())
    return t.detach().to(dtype) if t.is_floating_point() else t.detach()
