"""Merge: evaluate each adapter's ``weight`` once and put the result in place of the parameter (constant folding).

After: a plain ATen program with no region and no slot that computes what the adapted program did, up to one rounding
of each weight to its dtype. The arithmetic runs in float32 (float64 for float64 weights), whatever the weight's dtype.
A weight that other consumers read too is untied first, so that they keep the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.errors import MergeError
from adaptc.passes._kinds import CASTS, TABLE, Op, argument, operands
from adaptc.passes._lifted import Lifted
from adaptc.passes._method import Attachment
from adaptc.passes._pass import Pass, PassResult
from adaptc.passes._regions import remove_regions
from adaptc.passes.find_sites import consumers, readers
from adaptc.passes.inject import site_op


@dataclass(frozen=True)
class SiteMerge:
    """One merged weight. ``delta`` is the largest change of an element, ``error`` the largest rounding of one."""

    site: str
    fqn: str
    delta: float
    error: float
    dtype: torch.dtype
    untied: bool = False


@dataclass(frozen=True)
class Merge(Pass):
    """``values`` maps slot and scale FQNs to tensors. ``safe`` refuses results that are not finite.

    ``release(fqn)`` is called right after a weight was replaced, so that a caller who gives up the base can free it
    before the next one is made. ``progress`` wraps the sequence of attachments. ``drop``: ids of attachments to remove
    without merging, since the adapter does not have them.
    """

    name: ClassVar[str] = "merge"

    attachments: Sequence[Attachment] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)
    safe: bool = True
    release: Callable[[str], None] | None = field(default=None, repr=False)
    progress: Callable[[Sequence[Any]], Any] = field(default=iter, repr=False)
    drop: Sequence[str] = field(default=(), repr=False)
    make: Callable[..., ExportedProgram] = field(default=ExportedProgram, repr=False)

    def apply(self, program: ExportedProgram) -> PassResult:
        lifted = Lifted(program)
        for a in self.attachments:
            reason = a.method.check_merge(site_op(lifted, a))
            if reason is not None:
                raise MergeError(f"site {a.id!r} cannot be merged: {reason}. Keep it as an adapter, or unload() it.")
        ops = {a.id: site_op(lifted, a) for a in self.attachments}
        groups: dict[str, list[Attachment]] = {}
        for a in self.attachments:
            groups.setdefault(a.fqn, []).append(a)
        remove_regions(lifted, [*self.drop, *(a.id for a in self.attachments)])
        rows = [self._site(lifted, group, ops) for group in self.progress(list(groups.values()))]
        return PassResult(lifted.finish(self.make), len(rows), data=tuple(rows))

    @torch.no_grad()
    def _site(self, lifted: Lifted, group: list[Attachment], ops: Mapping[str, Op]) -> SiteMerge:
        first = group[0]
        stored = lifted.tensor(first.fqn)
        high = stored.dtype if stored.dtype == torch.float64 else torch.float32
        exact = stored.to(high) if stored.is_floating_point() else stored
        for a in group:
            slots = {n: _high(self.values[f], high) for n, f in a.slots.items()}
            scale = None if a.scale is None else self.values[a.scale].to(high)
            op = ops[a.id]
            exact = op.stored(a.method.weight(op, op.canonical(exact), slots, scale))
            if a.method.has_bias():
                self._bias(lifted, a, op, slots, scale, high)
        rounded = exact.to(stored.dtype).contiguous()
        delta, error = _largest(exact, stored), 0.0 if rounded.dtype == exact.dtype else _largest(exact, rounded)
        # Finite differences from a finite weight say that the result is finite, without a pass of its own over it.
        finite = (isfinite(delta) and isfinite(error)) or bool(torch.isfinite(rounded).all())
        if self.safe and not finite:
            raise MergeError(
                f"merging {first.id!r} gives values in {first.fqn!r} that are not finite in {stored.dtype}. The "
                "adapter holds NaN or infinite values, or the sum overflows the dtype; load a sound adapter, merge "
                "into a float32 base, or pass safe=False to keep the values."
            )
        untied = self._replace(lifted, first, rounded)
        if self.release is not None:
            self.release(first.fqn)
        return SiteMerge(first.id, first.fqn, delta, error, stored.dtype, untied)

    def _replace(self, lifted: Lifted, a: Attachment, value: Tensor) -> bool:
        node = lifted.placeholders[a.fqn]
        read = {n for n, _ in consumers(node)}
        mine = {n for n in read if n.name in a.consumers}
        parameter = lifted.specs[node.name].kind == InputKind.PARAMETER
        new = torch.nn.Parameter(value, requires_grad=False) if parameter else value
        if value.shape != lifted.tensor(a.fqn).shape:
            for n in mine:
                _make_dense(n)
        if len(mine) == len(read):
            lifted.set(a.fqn, new)
            return False
        lifted.split(a.fqn, readers(lifted.graph, node, mine), new)
        return True

    def _bias(
        self,
        lifted: Lifted,
        a: Attachment,
        op: Op,
        slots: Mapping[str, Tensor],
        scale: Tensor | None,
        high: torch.dtype,
    ) -> None:
        """The same for the bias; one that other consumers read too is untied, one that is missing is added."""
        groups: dict[fx.Node | None, list[fx.Node]] = {}
        for node in (lifted.nodes[c] for c in a.consumers):
            takes = node.target in TABLE and TABLE[node.target][3] is not None
            groups.setdefault(operands(node)[2] if takes else None, []).append(node)
        for old, nodes in groups.items():
            source = _parameter(old)
            target = None if source is None else lifted.specs[source.name].target
            base = None if target is None else lifted.tensor(target).to(high)
            probe = (
                torch.zeros(op.out_features, dtype=high, device=lifted.tensor(a.fqn).device) if base is None else base
            )
            new = a.method.bias(op, probe if old is not None else None, slots, scale)
            if new is None or new is probe:
                continue
            if old is not None and (source is None or target is None):
                raise MergeError(
                    f"site {a.id!r}: the bias is computed by {old.name!r}, so nothing can be merged into it"
                )
            self._set_bias(lifted, a, source, nodes, new)

    def _set_bias(
        self, lifted: Lifted, a: Attachment, source: fx.Node | None, nodes: list[fx.Node], new: Tensor
    ) -> None:
        at = TABLE[nodes[0].target][3] if nodes[0].target in TABLE else None
        if at is None:
            raise MergeError(f"site {a.id!r}: an op of kind {a.kind!r} takes no bias, and the adapter has one")
        dtype = nodes[0].meta["val"].dtype if source is None else source.meta["val"].dtype
        value = torch.nn.Parameter(new.to(dtype).contiguous(), requires_grad=False)
        if source is None:
            fqn = f"{a.module}.bias".removeprefix(".")
            while fqn in lifted.state_dict:
                fqn += "_merged"
            node = lifted.add(fqn, value)
            for n in nodes:
                n.args = tuple(node if i == at else argument(n, i) for i in range(max(len(n.args), at + 1)))
            return
        fqn = f"{a.module}.bias".removeprefix(".")
        target = fqn if lifted.placeholders.get(fqn) is source else lifted.specs[source.name].target
        assert target is not None
        if {n for n, _ in consumers(source)} <= set(nodes):
            lifted.set(target, value)
        else:
            lifted.split(target, readers(lifted.graph, source, nodes), value)


def _parameter(node: fx.Node | None) -> fx.Node | None:
    """The placeholder a bias comes from, through casts; None when it is computed."""
    while node is not None and node.op != "placeholder":
        node = node.args[0] if node.target in CASTS and isinstance(node.args[0], fx.Node) else None
    return node


def _largest(a: Tensor, b: Tensor) -> float:
    """The largest difference of two elements; NaN when there is none to speak of."""
    if a.shape != b.shape or not a.is_floating_point():
        return nan
    if not a.numel():
        return 0.0
    low, high = torch.aminmax(a - b)
    return max(abs(float(low)), abs(float(high)))


def _high(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype) if t.is_floating_point() else t.detach()


def _make_dense(node: fx.Node) -> None:
    """A grouped convolution whose weight became dense runs with one group; groups is the last argument."""
    count = len(node.target._schema.arguments)  # type: ignore[union-attr]
    node.args = tuple(1 if i == count - 1 else argument(node, i) for i in range(count))
    node.kwargs = {}
