"""The base class of the optional objects of a method, and the slots that they are about.

A method class names such an object, as in ``files = LoraFiles()``. Read from a method, it is bound to that method:
``method.files.write(op, slots)`` calls ``LoraFiles.write``, where ``self.method`` is the method. Each kind of object
has a default for all of its functions, so a method names only the objects in which it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

Slots = Mapping[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """The specification of one adapter tensor at a site.

    Attributes:
        shape: the shape that the method's options give.
        fill: the identity value, where it is a constant.
        free: the axes whose size an adapter may choose, such as the rank. All other axes must match when adapters are
            swapped.
        dtype: the dtype; None means the adapter's dtype.
        trainable: whether training changes the slot.
        saved: whether files hold the slot. False for slots that follow from the config.
        shared: whether the slot is one tensor for all sites of the model, such as VeRA's projections. Its key in files
            has no module path.
        shared_axes_cut: axes along which a site reads only the beginning of a shared slot. The slot is as long there as
            the largest site of its adapter needs. This length may differ between adapters, so binding an adapter cuts
            it or pads it with zeros.
        repeated: whether files hold the shared slot a second time under each site.
        key: the slot's key in files, for a tensor of the whole model that only some sites share; '' for the slot's name
            below the site. It may depend on what ``settle_shared_sizes`` settles, which is known once all sites are.
        apart: whether none of the slot's free sizes follows from the adapter's rank. A tuple names the size along each
            free axis. Sizes with one name are equal in all slots of the site.
        fills_up: whether zeros at the end of such named axes, in all slots that have them, change nothing. Adapters
            that differ in these sizes can then be in one bank.

    Example:
        >>> adaptc.methods.Slot((3, 24), free=(0,)).shape
        (3, 24)
    """

    shape: tuple[int, ...]
    fill: float = 0.0
    free: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    trainable: bool = True
    saved: bool = True
    shared: bool = False
    shared_axes_cut: tuple[int, ...] = ()
    repeated: bool = False
    key: str = ""
    apart: bool | tuple[str, ...] = False
    fills_up: bool = False

    def size_names(self, slot: str) -> dict[int, str]:
        """Return the name of the size along each free axis. Only for a slot with ``apart``, whose name is ``slot``."""
        if isinstance(self.apart, tuple):
            return dict(zip(self.free, self.apart, strict=True))
        return {i: f"{slot}_{i}" for i in self.free}


class SiteDescription(Protocol):
    """A place where a method is used, with what a config needs to choose the options there."""

    @property
    def key(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def entry(self) -> str: ...


class MethodPart:
    """An object of a method; ``method`` is the method that it was read from, and the class's own object has none."""

    # Subclasses annotate it with their method's class.
    method: Any = None

    def __get__(self, instance: Any, owner: Any = None) -> Self:
        if instance is None:
            return self
        bound = object.__new__(type(self))
        vars(bound).update(vars(self), method=instance)
        return bound

    def defines(self, *names: str) -> bool:
        """Return whether the object overrides any of these functions of its kind."""
        *_, kind, _, _ = type(self).__mro__  # the last two are MethodPart and object
        return any(getattr(type(self), n) is not getattr(kind, n) for n in names)
