"""The method protocol: all that passes know of LoRA, DoRA, IA3 and the rest.

A method states its meaning once, as a pure function on the canonical weight (see ``_kinds``):

    weight(op, W, slots, scale) -> W'            the definition
    apply(op, x, y, W, slots, scale) -> y'       optional and cheaper; must equal op(x, weight(W))
    bias(op, b, slots, scale) -> b'              only for methods that change the bias

Injection, merge, unmerge, save, load, swap and every layer kind follow from these. Methods are frozen dataclasses of
the options that shape them, so that equal methods on equal shapes share one trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptc.passes._kinds import Op

Slots = Mapping[str, Tensor]
#: a 0-d tensor; None for a method without a scale, which then does not look at it
Scale = Any


@dataclass(frozen=True)
class Slot:
    """One adapter tensor of a site.

    ``dtype`` None means the adapter dtype. ``fill`` is the identity value when a constant gives it. ``free`` are the
    axes whose size an adapter may choose (the rank); all others must match on a swap. ``saved`` is False for slots that
    follow from the config and are not in files.
    """

    shape: tuple[int, ...]
    fill: float = 0.0
    free: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    trainable: bool = True
    saved: bool = True


@dataclass(frozen=True)
class Initial:
    """First values of a site's slots, and the base weight to use with them if the scheme changes it (PiSSA)."""

    slots: dict[str, Tensor]
    base: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """Base class of all methods; see the module docstring for what a subclass defines."""

    name: ClassVar[str] = ""
    #: what does not read the weight it changes comes first, so that nothing before it is lost
    replaces: ClassVar[bool] = False

    def options(self) -> dict[str, Any]:
        """The fields as plain JSON values, for the tags of a program's regions."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: str(v) if isinstance(v, torch.dtype) else v for k, v in plain.items()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`options`, after a trip through JSON."""
        return cls(**{k: _from_json(v) for k, v in options.items()})

    def slots(self, op: Op) -> dict[str, Slot]:
        """The slots at a site, by their name in PEFT's files. Raises TargetError where the method has no meaning."""
        raise AssertionError(f"{type(self).__name__} must define slots()")

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Initial:
        """First values, all slots in ``dtype`` unless their Slot says otherwise; ``W`` canonical, never modified."""
        return Initial(self.identity(op, W, dtype))

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Values for which the site computes exactly the base, as small as the free axes allow."""
        small = self.minimal(op).slots(op).items()
        return {n: torch.full(s.shape, s.fill, dtype=s.dtype or dtype, device=W.device) for n, s in small}

    def absent(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Values at a site the adapter in use does not have, which leave alone what others do to the same weight."""
        return self.identity(op, W, dtype)

    def minimal(self, op: Op) -> Method:
        """This method with the smallest rank the runtime takes: two, since compilers specialise on sizes 0 and 1."""
        return self

    def rebind(self, config: Any, attachment: Attachment) -> Method:
        """This method at the same site with the options of another adapter's ``config``."""
        return self

    def nested(self) -> Method:
        """This method at a layer that PEFT adapts inside another adapted one (MultiheadAttention's ``out_proj``)."""
        return self

    def fit(self, op: Op, slots: Slots) -> Method:
        """This method with its free sizes (the rank) read off slot tensors instead of a config."""
        return self

    def scale(self, op: Op) -> float | None:
        """The factor on the change of the weight, a slot of its own; None for methods without one."""
        return None

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        raise AssertionError(f"{type(self).__name__} must define weight()")

    def bias(self, op: Op, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor | None:
        return b

    def apply(
        self, op: Op, x: Tensor, y: Tensor, W: Tensor, slots: Slots, scale: Scale
    ) -> Tensor:  # pragma: no cover - replaced where has_apply says so
        raise AssertionError(f"{type(self).__name__} has no apply()")

    def has_apply(self, op: Op) -> bool:
        """Whether :meth:`apply` is defined and pays at this site."""
        return op.callable and type(self).apply is not Method.apply

    def has_bias(self) -> bool:
        return type(self).bias is not Method.bias

    def check_merge(self, op: Op) -> str | None:
        """Why this site cannot be merged, or None when it can."""
        return None

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        """Where a slot lives in the program's state dict (PEFT's name in a wrapped model)."""
        head, _, tail = slot.partition(".")
        return ".".join(p for p in (place, head, adapter, tail) if p)


def _from_json(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Attachment:
    """A method at a site of a program: everything needed to inject, merge, save and describe it.

    ``key`` is the site's path in PEFT's files, ``module``/``param`` its path in the model, ``consumers`` the names of
    the nodes that read the weight, ``slots`` and ``scale`` the FQNs of its tensors once injected. ``entry`` is the
    target entry that chose the site, ``name`` what per-module patterns (rank_pattern) are matched against. ``tied``:
    other consumers read the weight too.
    """

    key: str
    module: str
    param: str
    kind: str
    method: Method
    adapter: str = "default"
    form: str = "auto"
    consumers: tuple[str, ...] = ()
    slots: Mapping[str, str] = field(default_factory=dict)
    scale: str | None = None
    entry: str = ""
    name: str = ""
    tied: bool = False

    @property
    def fqn(self) -> str:
        """FQN of the base parameter."""
        return f"{self.module}.{self.param}" if self.module else self.param

    @property
    def place(self) -> str:
        """Where the slots live in the program: ``key``, unless that is the name of the parameter itself."""
        return self.key if self.key != self.fqn else f"{self.module}.adapted_{self.param}".removeprefix(".")

    @property
    def id(self) -> str:
        """Unique in a program: what region tags point to."""
        return f"{self.fqn}|{self.method.name}"

    def tag(self, role: str) -> dict[str, Any]:
        return {"method": self.method.name, "adapter": self.adapter, "site": self.id, "role": role}
