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
from adaptc.passes.protocol.coefficients import ExtraInput, ExtraValues
from adaptc.passes.protocol.method import Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.bank_form import BankForm
from adaptc.passes.protocol.parts.extra_inputs import ExtraInputs
from adaptc.passes.protocol.parts.size_rule import SizeRule

#: how the rows of a batch lie along an axis: the axis is the rows; or each row is repeated in one stretch, as in
#: (batch x sequence); or the whole list of rows is repeated
ROW_LAYOUTS = ("rows", "rows outside", "rows inside")


#: the slot that says where the ranks of each adapter begin and end, at sites that GPU kernels compute
RANK_STARTS = "starts"


@dataclass(frozen=True)
class RowAxis:
    """The position of a batch's rows in a value: an axis, and one of :data:`ROW_LAYOUTS`.

    ``picked_by``: the input that says which of the rows are there, by their indices; "" where all are. ``routed_by``:
    the node that gives experts their tokens, by indices into a value that has the rows in this layout; "" for none.
    """

    axis: int
    layout: str = "rows"
    picked_by: str = ""
    routed_by: str = ""

    def row_indices(self, indices: Any, axis_size: int, row_count: int) -> Any:
        """Return the row, out of ``count``, of each of the indices ``indices`` along an axis of this ``axis_size``."""
        if self.layout == "rows outside":
            return indices // (axis_size // row_count)
        return indices % row_count if self.layout == "rows inside" else indices


class PerRowSizes(SizeRule):
    """The sizes of the method that is applied for each row."""

    method: PerRowMethod

    def minimal(self, op: Op) -> PerRowMethod:
        return replace(self.method, inner=self.method.inner.sizes.minimal(op))

    def rank(self) -> int | None:
        return self.method.inner.sizes.rank()


class PerRowInputs(ExtraInputs):
    """The inputs of the method that is applied for each row."""

    method: PerRowMethod

    def extras(self) -> Mapping[str, ExtraInput]:
        return self.method.inner.extra_inputs.extras()

    def check_inputs(self, slots: Slots, given: ExtraValues) -> str:
        # Any adapter's slots will do for the check, since all adapters have the same sizes.
        one_adapter = {n: t[0] for n, t in slots.items() if n != RANK_STARTS}
        return self.method.inner.extra_inputs.check_inputs(one_adapter, given)


@dataclass(frozen=True)
class PerRowMethod(Method):
    """A method for ``count`` adapters of one method at a site; its slots and scale have a leading axis of adapters.

    It has the name of that method, so that the ids of a program's attachments are the same for rows.
    """

    swappable: ClassVar[frozenset[str]] = frozenset()
    sizes = PerRowSizes()
    extra_inputs = PerRowInputs()

    inner: Method = field(default_factory=Method)
    count: int = 2
    grouped: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    def slots(self, op: Op) -> dict[str, Slot]:
        starts = {RANK_STARTS: Slot((2 * self.count + 1,), dtype=torch.int32, trainable=False)} if self.grouped else {}
        return {n: self._with_adapter_axis(s) for n, s in self.inner.slots(op).items()} | starts

    def _with_adapter_axis(self, slot: Slot) -> Slot:
        axes = {k: tuple(i + 1 for i in getattr(slot, k)) for k in ("free", "shared_axes_cut")}
        return replace(slot, shape=(self.count, *slot.shape), **axes)

    def scale(self, op: Op) -> float | None:
        return self.inner.scale(op)


@dataclass(frozen=True)
class BankSite:
    """A method and its op where per-row adapters act, as regions are traced with. ``slot_names`` are its slots, in
    order."""

    method: Method
    op: Op
    slot_names: tuple[str, ...]
    has_scale: bool
    adapter_count: int
    #: whether dedicated operators for per-row adapters may replace plain ones
    uses_fused_ops: bool = False
    #: whether slots are laid out for GPU kernels (:func:`grouped`), with :data:`RANK_STARTS` as one more slot
    uses_kernel: bool = False

    def split_tensors(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the slots by name and the scale, from the tensors that a region reads last."""
        return dict(zip(self.slot_names, tensors, strict=False)), tensors[-1] if self.has_scale else None

    def values_by_adapter(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, dict[str, Tensor], Scale]]:
        """Yield (index, slots, scale) for each adapter in turn."""
        slots, scale = self.split_tensors(tensors)
        for k in range(self.adapter_count):
            yield k, {n: t.select(0, k) for n, t in slots.items()}, None if scale is None else scale.select(0, k)

    @property
    def tensor_count(self) -> int:
        """Return how many slots and scales a region reads."""
        return len(self.slot_names) + self.has_scale + self.uses_kernel


def repeat_coefficients(c: Tensor, n: Any, row_axis: RowAxis) -> Tensor:
    """Return the coefficients (rows, count) as (n, count), for an axis of size ``n`` that has the rows."""
    if row_axis.layout == "rows outside":
        return c.unsqueeze(1).expand(-1, n // c.shape[0], -1).flatten(0, 1)
    if row_axis.layout == "rows inside":
        return c.unsqueeze(0).expand(n // c.shape[0], -1, -1).flatten(0, 1)
    return c


def expand_coefficients(c: Tensor, y: Tensor, row_axis: RowAxis) -> Tensor:
    """Return the coefficients (rows, count) as (*1, n, *1, count), with n on the axis of ``y`` that has the rows."""
    c = repeat_coefficients(c, y.shape[row_axis.axis], row_axis)
    for _ in range(row_axis.axis):
        c = c.unsqueeze(0)
    for _ in range(y.ndim - row_axis.axis - 1):
        c = c.unsqueeze(-2)
    return c


def uses_bank_kernel(method: Method, op: Op, y: Tensor, row_axis: RowAxis) -> bool:
    """Return whether GPU kernels compute per-row adapters of a method at a layer.

    ``y`` is the layer's output, or a fake one. It has the batch's rows at ``row_axis``, as the layer's input has.
    """
    has_kernel = method.bank.is_defined() and method.bank.has_kernel(op)
    return has_kernel and (_has_stretches(row_axis) or _is_packed(y, y, row_axis))


def _has_stretches(row_axis: RowAxis) -> bool:
    """Return whether each row's share of a value is one stretch of the value's first axis."""
    return row_axis.axis == 0 and row_axis.layout != ROW_LAYOUTS[2]


def _is_packed(x: Tensor, y: Tensor, row_axis: RowAxis) -> bool:
    """Return whether the rows lie along the second axis of values whose first axis has size one: packed tokens."""
    is_second = (row_axis.axis, row_axis.layout) == (1, ROW_LAYOUTS[0])
    return is_second and all(type(n) is int and n == 1 for n in (x.shape[0], y.shape[0]))


def make_input_function(site: BankSite, row_axis: RowAxis) -> Callable[..., Tensor]:
    """Return the function (x, c, slots...) -> x changed by each row's adapters, for use in front of a layer."""

    def change_input(x: Tensor, c: Tensor, *slots: Tensor) -> Tensor:
        c = expand_coefficients(c, x, row_axis)
        return _add_weighted_changes(
            x, x, ((c[..., k], site.method.input(site.op, x, s, z)) for k, s, z in site.values_by_adapter(slots))
        )

    return change_input


def make_output_function(site: BankSite, row_axis: RowAxis, has_bias: bool) -> Callable[..., Tensor]:
    """Return the function (x, y, W[, b], c, slots...) -> y changed by each row's adapters, for use behind a layer."""
    op, method = site.op, site.method

    def change_output(x: Tensor, y: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        b, (c, *slots) = (rest[0], rest[1:]) if has_bias else (None, rest)
        is_packed = _is_packed(x, y, row_axis)
        if site.uses_kernel:
            own, scale = site.split_tensors(slots[:-1])
            rows = (x[0], y[0]) if is_packed else (x, y)
            made = method.bank.apply_kernel(op, *rows, own, scale, slots[-1], c)
            return made[None] if is_packed else made
        bank = method.bank if method.bank.is_defined() else BankForm()
        if site.uses_fused_ops and (is_packed or _has_stretches(row_axis)):
            rows = (x[0], y[0]) if is_packed else (x, y)
            made = bank.apply_fused(op, *rows, *site.split_tensors(slots), c)
            if made is not None:
                return made[None] if is_packed else made
        w, c = op.canonical(w), expand_coefficients(c, y, row_axis)
        together = bank.apply(op, x, y, w, b, *site.split_tensors(slots), c)
        if together is not None:
            return together
        return _add_weighted_changes(
            y, y, ((c[..., k], method.apply(op, x, y, w, b, s, z)) for k, s, z in site.values_by_adapter(slots))
        )

    return change_output


@dataclass(frozen=True)
class ReplacedParameter:
    """A parameter that adapters replace in a call: its site, and its index among the call's arguments.

    ``bias`` is None, unless the method also changes the layer's bias. Then it is the bias's index, -1 for a layer
    without one.
    """

    site: BankSite
    position: int
    bias_position: int | None = None


def make_call_function(
    call: Callable[[Mapping[int, Tensor], Sequence[Tensor]], Tensor],
    sites: Sequence[ReplacedParameter],
    row_axis: RowAxis,
    tensor_count: int,
) -> Callable[..., Tensor]:
    """Return a function that repeats a call once for each adapter, with parameters that the adapter changed.

    It takes (y so far, y, the call's tensors..., the parameters..., c, slots of all sites...) and returns y with the
    changes added. ``call`` takes new values by index, and the ``own`` tensors of the call.
    """

    def repeat_call(latest: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
        tensors, rest = rest[:tensor_count], rest[tensor_count:]
        parameters, (c, *slots) = rest[: len(sites)], rest[len(sites) :]
        c = expand_coefficients(c, y, row_axis)
        site_values: list[list[tuple[int, dict[str, Tensor], Scale]]] = []
        for one in sites:
            site_values.append(list(one.site.values_by_adapter(slots[: one.site.tensor_count])))
            slots = slots[one.site.tensor_count :]

        def adapted(k: int) -> Tensor:
            new: dict[int, Tensor] = {}
            shifts: list[Tensor] = []
            for one, p, mine in zip(sites, parameters, site_values, strict=True):
                _, s, z = mine[k]
                new[one.position] = change_parameter(one.site, p, s, z)
            for one, p, mine in zip(sites, parameters, site_values, strict=True):
                if one.bias_position is not None:
                    b = None if one.bias_position < 0 else new.get(one.bias_position, tensors[one.bias_position])
                    method, op = one.site.method, one.site.op
                    made = method.bias_over(op, op.canonical(p), b, b, *mine[k][1:])
                    if made is not None:
                        shifts.append(one.site.op.along_out(made if b is None else made - b, y))
            return sum(shifts, call(new, tensors))

        return _add_weighted_changes(latest, y, ((c[..., k], adapted(k)) for k in range(sites[0].site.adapter_count)))

    return repeat_call


def make_bias_function(site: BankSite, row_axis: RowAxis, layer: Op) -> Callable[..., Tensor]:
    """Return the function (y, b, c, slots...) -> y with each row's own bias in place of b."""

    def change_bias(y: Tensor, b: Tensor, c: Tensor, *slots: Tensor) -> Tensor:
        c, none = expand_coefficients(c, y, row_axis), torch.zeros_like(b)
        shifts = ((k, change_parameter(site, b, s, z) - b) for k, s, z in site.values_by_adapter(slots))
        return _add_weighted_changes(y, none, ((c[..., k], layer.along_out(shift, y)) for k, shift in shifts))

    return change_bias


def change_parameter(site: BankSite, p: Tensor, slots: Slots, scale: Scale) -> Tensor:
    """Return the parameter ``p``, in its stored layout, as one adapter changes it."""
    op, many = site.op, p.ndim > 1
    new = site.method.weight(op, op.canonical(p) if many else p, slots, scale)
    return op.stored(new) if many else new


def _add_weighted_changes(y: Tensor, base: Tensor, terms: Any) -> Tensor:
    """Return y + the sum of c * (adapted - base), computed in float32 where y is in half precision.

    Where a coefficient is zero, the adapter's term is left out and not multiplied, since it may be infinite or NaN.
    """
    compute_dtype = y.dtype if y.dtype.itemsize >= 4 else torch.float32
    out, base = cast(y, compute_dtype), cast(base, compute_dtype)
    for c, adapted in terms:
        change = cast(adapted, compute_dtype) - base if base.ndim == adapted.ndim else cast(adapted, compute_dtype)
        out = out + torch.where(c == 0, torch.zeros_like(change), cast(c, _real_dtype(compute_dtype)) * change)
    return cast(out, y.dtype)


def _real_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
