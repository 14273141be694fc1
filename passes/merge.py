"""Merge: evaluate each adapter's ``weight`` once and put the result in place of the parameter (constant folding).

After: a plain ATen program with no region and no slot that computes what the adapted program did, up to one rounding
of each weight to its dtype. The arithmetic runs in float32 (float64 for float64 weights), whatever the weight's dtype.
A weight that other consumers read too is untied first, so that they keep the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.errors import MergeError
from adaptc.passes._kinds import TABLE, Op, argument, operands
from adaptc.passes._lifted import Lifted
from adaptc.passes._method import Attachment
from adaptc.passes._pass import Pass, PassResult
from adaptc.passes._regions import remove_regions
from adaptc.passes.find_sites import consumers
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
        return PassResult(lifted.finish(), len(rows), data=tuple(rows))

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
                self._bias(lifted, a, op, slots, scale)
        rounded = exact.to(stored.dtype).contiguous()
        if self.safe and not bool(torch.isfinite(rounded).all()):
            raise MergeError(
                f"merging {first.id!r} gives values in {first.fqn!r} that are not finite in {stored.dtype}. The adapter "
                "holds NaN or infinite values, or the sum overflows the dtype; load a sound adapter, merge into a "
                "float32 base, or pass safe=False to keep the values."
            )
        same = rounded.shape == stored.shape
        delta = float((exact - stored).abs().max()) if same and exact.is_floating_point() else float("nan")
        error = float((rounded.to(high) - exact).abs().max()) if exact.numel() else 0.0
        untied = self._replace(lifted, first, rounded)
        if self.release is not None:
            self.release(first.fqn)
        return SiteMerge(first.id, first.fqn, delta, error, stored.dtype, untied)

    def _replace(self, lifted: Lifted, a: Attachment, value: Tensor) -> bool:
        node = lifted.placeholders[a.fqn]
        read = list(consumers(node))
        mine = [(n, s) for n, s in read if n.name in a.consumers]
        new = torch.nn.Parameter(value, requires_grad=False)
        if value.shape != lifted.tensor(a.fqn).shape:
            for n, _ in mine:
                _make_dense(n)
        if len(mine) == len(read):
            lifted.set(a.fqn, new)
            return False
        if any(s is not node for _, s in mine):
            raise MergeError(
                f"{a.fqn!r} is tied and cast before its consumers, so it cannot be untied; merge before casting the model."
            )
        lifted.split(a.fqn, [n for n, _ in mine], new)
        return True

    def _bias(self, lifted: Lifted, a: Attachment, op: Op, slots: Mapping[str, Tensor], scale: Tensor | None) -> None:
        nodes = [lifted.nodes[c] for c in a.consumers]
        at = TABLE[nodes[0].target][3] if nodes[0].target in TABLE else None
        old = operands(nodes[0])[2] if at is not None else None
        target = None if old is None else lifted.specs[old.name].target
        base = None if target is None else lifted.tensor(target)
        high = (
            torch.float64 if op.kind and slots and next(iter(slots.values())).dtype == torch.float64 else torch.float32
        )
        new = a.method.bias(op, None if base is None else base.to(high), slots, scale)
        if new is None:
            return
        if at is None:
            raise MergeError(f"site {a.id!r}: an op of kind {a.kind!r} takes no bias, and the adapter has one")
        dtype = lifted.tensor(a.fqn).dtype
        value = torch.nn.Parameter(new.to(dtype).contiguous(), requires_grad=False)
        if target is not None:
            lifted.set(target, value)
            return
        fqn = f"{a.module}.bias" if a.module else "bias"
        node = lifted.add(fqn, value)
        for n in nodes:
            n.args = tuple(node if i == at else argument(n, i) for i in range(max(len(n.args), at + 1)))


def _high(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype) if t.is_floating_point() else t.detach()


def _make_dense(node: fx.Node) -> None:
    """A grouped convolution whose weight became dense runs with one group; groups is the last argument."""
    count = len(node.target._schema.arguments)  # type: ignore[union-attr]
    node.args = tuple(1 if i == count - 1 else argument(node, i) for i in range(count))
    node.kwargs = {}
