"""Stack the tensors of several adapters, as the code for rows reads them.

Each slot and each scale gets an axis of adapters in front. Smaller ranks are padded in the way that leaves their
adapter as it is. In memory the axis of adapters lies beside that of the ranks. So a matmul over the ranks of all
adapters reads the tensor without a copy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.methods import AdapterConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.bank_method import RANK_STARTS
from adaptc.passes.protocol.method import Method, Slot
from adaptc.runtime.rank_padding import Padding, find_paddings


@dataclass(frozen=True, eq=False)
class AdapterStack:
    """Adapters stacked for calls that mix them by row.

    ``names`` and ``bindings``: the adapters and their bindings, by place. ``capacity``: the number of places that the
    code reads, of which some may be filler. ``binding``: the stacked tensors.
    """

    names: tuple[str, ...]
    bindings: tuple[Binding, ...]
    capacity: int
    binding: Binding

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.binding.values.values())

    @cached_property
    def factor_dtype(self) -> torch.dtype:
        """Return the widest dtype of the factors, without their scales."""
        factors = [t.dtype for t in self.binding.values.values() if t.ndim > 2 and t.is_floating_point()]
        return max(factors, key=lambda dtype: dtype.itemsize, default=torch.float32)

    @property
    def named_bindings(self) -> Iterable[tuple[str, Binding]]:
        """Return each name with its binding."""
        return zip(self.names, self.bindings, strict=True)

    def serves(self, names: tuple[str, ...], table: Mapping[str, Binding]) -> bool:
        """Return whether the stack has the adapters ``names`` as ``table`` has them now, and at most twice as many
        adapters."""
        own = dict(self.named_bindings)
        return all(own.get(n) is table[n] for n in names) and len(self.names) <= 2 * len(names)


def stack_adapters(
    bindings: Sequence[Binding],
    attachments: Sequence[Attachment],
    ops: Mapping[str, Op],
    capacity: int,
    kernel_sites: Collection[str] = (),
) -> Binding:
    """Return a binding of this ``capacity`` that stacks ``bindings``, which are at most so many. Gradients flow to
    their values.

    Its ``methods`` are those of the sites that some of them have. Places that are left over repeat the first binding,
    which is as finite there as it is alone. ``kernel_sites``: ids of sites whose tensors lie as GPU kernels read them
    (``adaptc.kernels.grouped_rows``). Raises AdaptcError where the sizes of the bindings cannot be brought together.
    """
    values: dict[str, Tensor] = {}
    source = f"{len(bindings)} adapters"
    bindings = [*bindings, *[bindings[0]] * (capacity - len(bindings))]
    for a in attachments:
        op = ops[a.id]
        if a.id in kernel_sites:
            values |= _stack_for_kernel(bindings, a, op, capacity)
            continue
        for name, slot in a.method.slots(op).items():
            fqn = a.slots[name]
            if fqn not in values:
                values[fqn] = _stack_slot([b.values[fqn] for b in bindings], capacity, slot, name, a, op)
        if a.scale_slot is not None and a.scale_slot not in values:
            values[a.scale_slot] = _stack_slot(
                [b.values[a.scale_slot] for b in bindings], capacity, Slot(()), "", a, op
            )
    return Binding(values, _methods_in_use(bindings, attachments), AdapterConfig(), source=source)


def restack_adapter(
    stack: AdapterStack,
    name: str,
    binding: Binding,
    attachments: Sequence[Attachment],
    ops: Mapping[str, Op],
    kernel_sites: Collection[str] = (),
) -> AdapterStack:
    """Return a stack with ``binding`` in the place of the adapter ``name``, equal to one that is made anew.

    The tensors of the other adapters are copied all at once. ``stack`` does not change, so calls may go on with it.
    Raises AdaptcError where the sizes cannot be brought together.
    """
    bindings = tuple(binding if n == name else b for n, b in stack.named_bindings)
    filled = [*bindings, *[bindings[0]] * (stack.capacity - len(bindings))]
    changed = [k for k, b in enumerate(filled) if b is binding]
    values: dict[str, Tensor] = {}
    for a in attachments:
        slots = {a.slots[n]: n for n in a.method.slots(ops[a.id])}
        if a.scale_slot is not None:
            slots[a.scale_slot] = ""
        for fqn, slot_name in slots.items():
            if fqn in values:
                continue
            tensors, old = [b.values[fqn] for b in filled], stack.binding.values[fqn]
            if a.id in kernel_sites or _common_shape(tensors) != tuple(old.shape[1:]):
                made = stack_adapters(filled, [a], ops, stack.capacity, kernel_sites).values
                values |= {f: t for f, t in made.items() if f not in values}
                continue
            with torch.inference_mode(False), torch.no_grad():
                values[fqn] = new = old.clone()
                for k in changed:
                    new[k].copy_(_pad_to(tensors[k].detach(), tuple(new.shape[1:]), slot_name, a, ops[a.id]))
    made = replace(stack.binding, values=values, methods=_methods_in_use(bindings, attachments))
    return replace(stack, bindings=bindings, binding=made)


def _methods_in_use(bindings: Iterable[Binding], attachments: Sequence[Attachment]) -> dict[str, Method]:
    """Return the methods of the sites that some adapter has, by the id of the attachment."""
    used = {site for b in bindings for site in b.methods}
    return {a.id: a.method for a in attachments if a.id in used}


def with_rank_starts(a: Attachment) -> Attachment:
    """Return the attachment of a grouped site with the slot that says where the ranks of each adapter begin and end."""
    return replace(a, slots={**a.slots, RANK_STARTS: f"{a.scale_slot}.{RANK_STARTS}"})


def _stack_for_kernel(bindings: Sequence[Binding], a: Attachment, op: Op, capacity: int) -> dict[str, Tensor]:
    """Return the tensors of one grouped site, in which the ranks of one adapter follow those of the one before it.

    The starts, int32 (2 * count + 1,), say where the ranks of each adapter begin and end, and then where all end. The
    scale (2 * count,) has a zero after each adapter's, for the padding behind its ranks.
    """
    values: dict[str, Tensor] = {}
    largest, ranks = 0, [0]
    for name, slot in a.method.slots(op).items():
        tensors, (axis,) = [b.values[a.slots[name]] for b in bindings], slot.free
        # Kernels want the axis of adapters outermost in memory, and that of ranks next.
        turned = [t.movedim(axis, 0) for t in tensors]
        made = _stack_slot(turned, capacity, replace(slot, free=()), name, a, op, axis)
        largest, values[a.slots[name]] = made.shape[1], made.movedim(1, axis + 1)
        ranks = [t.shape[0] if a.id in b.methods else 0 for t, b in zip(turned, bindings, strict=True)]
    assert a.scale_slot is not None
    scale = _stack_slot([b.values[a.scale_slot] for b in bindings], capacity, Slot(()), "", a, op)
    values[a.scale_slot] = torch.stack([scale, torch.zeros_like(scale)], 1).flatten()
    edges = [place for k, rank in enumerate(ranks) for place in (k * largest, k * largest + rank)]
    starts = torch.tensor([*edges, capacity * largest], dtype=torch.int32, device=scale.device)
    return values | {with_rank_starts(a).slots[RANK_STARTS]: starts}


def _stack_slot(
    tensors: Sequence[Tensor], capacity: int, slot: Slot, name: str, attachment: Attachment, op: Op, moved_axis: int = 0
) -> Tensor:
    """Return one slot, or the scale, of all bindings, padded to the largest sizes and stacked (count, ...).

    ``moved_axis``: the axis that was brought to the front of each tensor.
    """
    first = tensors[0]
    shape = _common_shape(tensors)
    axis = slot.free[0] if slot.free else 0
    others = [tuple(t.shape) for t in tensors if tuple(t.shape) != shape]
    if others and isinstance(slot.apart, tuple) and not slot.fills_up:
        raise AdaptcError(
            f"{name!r} has shape {others[0]} in one adapter and {shape} in the largest, and none of "
            f"{' and '.join(slot.apart)} can be filled up: rows of one batch have adapters that agree in them. Run "
            "them in batches of their own"
        )
    if any(t.requires_grad for t in tensors):
        return torch.stack([_pad_to(t, shape, name, attachment, op) for t in tensors])
    room = (*shape[:axis], capacity, *shape[axis:])
    dtype = first.dtype
    with torch.inference_mode(False), torch.no_grad():  # later calls outside inference mode could not use it
        out = torch.empty(room, dtype=dtype, device=first.device).movedim(axis, 0)
        for k, t in enumerate(tensors):
            out[k].copy_(_pad_to(t.detach(), shape, name, attachment, op, moved_axis))
    return out


def _common_shape(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return the largest size of each axis."""
    return tuple(max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True))


def _pad_to(
    t: Tensor, shape: tuple[int, ...], name: str, attachment: Attachment, op: Op, moved_axis: int = 0
) -> Tensor:
    if tuple(t.shape) == shape:
        return t
    if attachment.method.sizes.exact:
        raise AdaptcError(
            f"site {attachment.fqn!r}: {name!r} has shape {tuple(t.shape)} in one adapter and {shape} in another, and "
            f"two of {attachment.method.name} that differ so cannot share a call. Run them in batches of their own"
        )
    if moved_axis:
        wanted = (*shape[1 : moved_axis + 1], shape[0], *shape[moved_axis + 1 :])
        return _pad_to(t.movedim(0, moved_axis), wanted, name, attachment, op).movedim(moved_axis, 0)
    how = (find_paddings(attachment.method, op, attachment.form) or {}).get(name, Padding())
    try:
        return how(t, shape)
    except ValueError as error:
        raise AdaptcError(
            f"site {attachment.fqn!r}: {name!r} has shape {tuple(t.shape)} in one adapter and {shape} in another, and "
            f"the two cannot share a call ({error}). Run them in batches of their own"
        ) from error
