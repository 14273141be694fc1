"""Per-row adapters at one site, where each row of a batch has its own mix of adapters: the mathematics, to be traced.

    y = base(x) + sum_k c[row, k] * (adapted_k(x) - base(x))

``c`` (rows, count) are the coefficients of a call. Slots and scales have a leading axis of ``count`` adapters. The
formula holds for every method: a change of a layer's input is mixed in front of the layer, and a change of its output
behind it. A row whose coefficients are zero gets the base, bit for bit. A row with a single 1 gets the result of that
adapter, up to rounding. The methods themselves know nothing of rows. The functions made here take plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.coefficients import Extra, Given
from adaptc.passes.protocol.method import Method, Scale, Slot, Slots

#: how the rows of a batch lie along an axis: the axis is the rows; or each row is repeated in one stretch, as in
#: (batch x sequence); or the whole list of rows is repeated
ORDERS = ("rows", "rows outside", "rows inside")


#: the slot that says where the ranks of each adapter begin and end, at sites that GPU kernels compute
STARTS = "starts"


@dataclass(frozen=True)
class RowAxis:
    """The position of a batch's rows in a value: an axis, and one of :data:`ORDERS`."""

    axis: int
    order: str = "rows"

    def rows(self, places: Any, size: int, count: int) -> Any:
        """Return the row, out of ``count``, of each of the indices ``places`` along an axis of this ``size``."""
        if self.order == "rows outside":
            return places // (size // count)
        return places % count if self.order == "rows inside" else places


@dataclass(frozen=True)
class InRows(Method):
    """A method for ``count`` adapters of one method at a site; its slots and scale have a leading axis of adapters."""

    name: ClassVar[str] = "rows"
    swappable: ClassVar[frozenset[str]] = frozenset()

    inner: Method = field(default_factory=Method)
    count: int = 2
    grouped: bool = False

    def slots(self, op: Op) -> dict[str, Slot]:
        starts = {STARTS: Slot((2 * self.count + 1,), dtype=torch.int32, trainable=False)} if self.grouped else {}
        return {n: self._in_front(s) for n, s in self.inner.slots(op).items()} | starts

    def _in_front(self, slot: Slot) -> Slot:
        axes = {k: tuple(i + 1 for i in getattr(slot, k)) for k in ("free", "shared_axes_cut")}
        return replace(slot, shape=(self.count, *slot.shape), **axes)

    def scale(self, op: Op) -> float | None:
        return self.inner.scale(op)

    def minimal(self, op: Op) -> InRows:
        return replace(self, inner=self.inner.minimal(op))

    def rank(self) -> int | None:
        return self.inner.rank()

    def extras(self) -> Mapping[str, Extra]:
        return self.inner.extras()

    def why_wrong(self, slots: Slots, given: Given) -> str:
        # Any adapter's slots will do for the check, since all adapters have the same sizes.
        return self.inner.why_wrong({n: t[0] for n, t in slots.items() if n != STARTS}, given)


@dataclass(frozen=True)
class BankSite:
    """A method and its op where per-row adapters act, as regions are traced with. ``names`` are its slots, in order."""

    method: Method
    op: Op
    names: tuple[str, ...]
    scaled: bool
    count: int
    #: whether dedicated operators for per-row adapters may replace plain ones
    at_once: bool = False
    #: whether slots are laid out for GPU kernels (:func:`grouped`), with :data:`STARTS` as one more slot
    grouped: bool = False

    def split(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the slots by name and the scale, from the tensors that a region reads last."""
        return dict(zip(self.names, tensors, strict=False)), tensors[-1] if self.scaled else None

    def each(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, dict[str, Tensor], Scale]]:
        """Yield (index, slots, scale) for each adapter in turn."""
        slots, scale = self.split(tensors)
        for k in range(self.count):
            yield k, {n: t.select(0, k) for n, t in slots.items()}, None if scale is None else scale.select(0, k)

    @property
    def tensors(self) -> int:
        """Return how many slots and scales a region reads."""
        return len(self.names) + self.scaled + self.grouped


def spread(c: Tensor, y: Tensor, where: RowAxis) -> Tensor:
    """Return the coefficients (rows, count) as (*1, n, *1, count), with n on the axis of ``y`` that has the rows."""
    n = y.shape[where.axis]
    if where.order == "rows outside":
        c = c.unsqueeze(1).expand(-1, n // c.shape[0], -1).flatten(0, 1)
    elif where.order == "rows inside":
        c = c.unsqueeze(0).expand(n // c.shape[0], -1, -1).flatten(0, 1)
    for _ in range(where.axis):
        c = c.unsqueeze(0)
    for _ in range(y.ndim - where.axis - 1):
        c = c.unsqueeze(-2)
    return c


def grouped(method: Method, op: Op, where: RowAxis) -> bool:
    """Return whether GPU kernels compute per-row adapters of a method at a layer with its rows at ``where``."""
    return method.has_rows() and method.groups(op) and where.axis == 0 and where.order != ORDERS[2]


def input_of(site: BankSite, where: RowAxis) -> Callable[..., Tensor]:
    """Return the function (x, c, slots...) -> x changed by each row's adapters, for use in front of a layer."""

    def before(x: Tensor, c: Tensor, *slots: Tensor) -> Tensor:
        c = spread(c, x, where)
        return _sum(x, x, ((c[..., k], site.method.input(site.op, x, s, z)) for k, s, z in site.each(slots)))

    return before


def output_of(site: BankSite, where: RowAxis, biased: bool) -> Callable[..., Tensor]:
    """Return the function (x, y, W[, b], c, slots...) -> y changed by each row's adapters, for use behind a layer."""
    op, method = site.op, site.method

    def behind(x: Tensor, y: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        b, (c, *slots) = (rest[0], rest[1:]) if biased else (None, rest)
        if site.grouped:
            own, scale = site.split(slots[:-1])
            return method.rows_grouped(op, x, y, own, scale, slots[-1], c)
        if site.at_once and method.has_rows() and where.axis == 0 and where.order != ORDERS[2]:
            made = method.rows_at_once(op, x, y, *site.split(slots), c)
            if made is not None:
                return made
        w, c = op.canonical(w), spread(c, y, where)
        together = method.rows(op, x, y, w, b, *site.split(slots), c) if method.has_rows() else None
        if together is not None:
            return together
        return _sum(y, y, ((c[..., k], method.apply(op, x, y, w, b, s, z)) for k, s, z in site.each(slots)))

    return behind


@dataclass(frozen=True)
class Replaced:
    """A parameter that adapters replace in a call: its site, and its index among the call's arguments.

    ``bias`` is None, unless the method also changes the layer's bias. Then it is the bias's index, -1 for a layer
    without one.
    """

    site: BankSite
    place: int
    bias: int | None = None


def call_of(
    call: Callable[[Mapping[int, Tensor], Sequence[Tensor]], Tensor],
    sites: Sequence[Replaced],
    where: RowAxis,
    own: int,
) -> Callable[..., Tensor]:
    """Return a function that repeats a call once for each adapter, with parameters that the adapter changed.

    It takes (y so far, y, the call's tensors..., the parameters..., c, slots of all sites...) and returns y with the
    changes added. ``call`` takes new values by index, and the ``own`` tensors of the call.
    """

    def again(latest: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
        tensors, rest = rest[:own], rest[own:]
        parameters, (c, *slots) = rest[: len(sites)], rest[len(sites) :]
        c = spread(c, y, where)
        parts: list[list[tuple[int, dict[str, Tensor], Scale]]] = []
        for one in sites:
            parts.append(list(one.site.each(slots[: one.site.tensors])))
            slots = slots[one.site.tensors :]

        def adapted(k: int) -> Tensor:
            new: dict[int, Tensor] = {}
            shifts = []
            for one, p, mine in zip(sites, parameters, parts, strict=True):
                _, s, z = mine[k]
                new[one.place] = changed(one.site, p, s, z)
            for one, mine in zip(sites, parts, strict=True):
                if one.bias is not None:
                    b = None if one.bias < 0 else new.get(one.bias, tensors[one.bias])
                    made = one.site.method.bias(one.site.op, b, *mine[k][1:])
                    if made is not None:
                        shifts.append(one.site.op.along_out(made if b is None else made - b, y))
            return sum(shifts, call(new, tensors))

        return _sum(latest, y, ((c[..., k], adapted(k)) for k in range(sites[0].site.count)))

    return again


def bias_of(site: BankSite, where: RowAxis, layer: Op) -> Callable[..., Tensor]:
    """Return the function (y, b, c, slots...) -> y with each row's own bias in place of b."""

    def behind(y: Tensor, b: Tensor, c: Tensor, *slots: Tensor) -> Tensor:
        c, none = spread(c, y, where), torch.zeros_like(b)
        shifts = ((k, changed(site, b, s, z) - b) for k, s, z in site.each(slots))
        return _sum(y, none, ((c[..., k], layer.along_out(shift, y)) for k, shift in shifts))

    return behind


def changed(site: BankSite, p: Tensor, slots: Slots, scale: Scale) -> Tensor:
    """Return the parameter ``p``, in its stored layout, as one adapter changes it."""
    op, many = site.op, p.ndim > 1
    new = site.method.weight(op, op.canonical(p) if many else p, slots, scale)
    return op.stored(new) if many else new


def _sum(y: Tensor, base: Tensor, terms: Any) -> Tensor:
    """Return y + the sum of c * (adapted - base), computed in float32 where y is in half precision.

    Where a coefficient is zero, the adapter's term is left out and not multiplied, since it may be infinite or NaN.
    """
    wide = y.dtype if y.dtype.itemsize >= 4 else torch.float32
    out, base = cast(y, wide), cast(base, wide)
    for c, adapted in terms:
        change = cast(adapted, wide) - base if base.ndim == adapted.ndim else cast(adapted, wide)
        out = out + torch.where(c == 0, torch.zeros_like(change), cast(c, _real(wide)) * change)
    return cast(out, y.dtype)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
