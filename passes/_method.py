"""The method protocol: all that passes know of LoRA, DoRA, IA3 and the rest.

A method states its meaning once, as a pure function on the canonical weight (see ``_kinds``):

    weight(op, W, slots, scale) -> W'            the definition
    input(op, x, slots, scale) -> x'             optional and cheaper: together they must equal op(x, weight(W)), with
    apply(op, x', y, W, b, slots, scale) -> y'   y = op(x', W, b); a method may have either, both or none
    bias(op, b, slots, scale) -> b'              only for methods that change the bias
    fused(op, x, W, b, slots, scale) -> y'       optional: apply and input by kernels for a GPU

Injection, merge, unmerge, save, load, swap and every layer kind follow from these. Methods are frozen dataclasses of
the options that shape them, so that equal methods on equal shapes share one trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
    follow from the config and are not in files. ``shared``: one tensor for all sites of the model (VeRA's projections),
    whose key in files has no module path. ``roomy``: axes of a shared slot that are as long as the largest site needs;
    an adapter with other sites has another length there, of which its sites read the beginning. ``repeated``: files
    have the shared slot once more under each site.
    """

    shape: tuple[int, ...]
    fill: float = 0.0
    free: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    trainable: bool = True
    saved: bool = True
    shared: bool = False
    roomy: tuple[int, ...] = ()
    repeated: bool = False


@dataclass(frozen=True)
class Initial:
    """First values of a site's slots, and the base weight to use with them if the scheme changes it (PiSSA)."""

    slots: dict[str, Tensor]
    base: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """Base class of all methods; see the module docstring for what a subclass defines."""

    name: ClassVar[str] = ""
    #: a name that methods of several classes share whose slots have names in common; empty for those of one base class
    kin: ClassVar[str] = ""
    #: what does not read the weight it changes comes first, so that nothing before it is lost
    replaces: ClassVar[bool] = False
    #: whether it gives weights with a leading axis of experts a meaning of its own; if not, it is done per expert
    stacks: ClassVar[bool] = False
    #: fields in which an adapter may differ from the method a program was compiled with: sizes along free axes, what
    #: goes into the scale or into slots that are not saved, what acts on first values or in training only
    swappable: ClassVar[frozenset[str]] = frozenset({"r", "alpha", "dropout", "scheme", "training"})

    def structure(self) -> dict[str, Any]:
        """What the code of a region depends on: adapters that differ here need regions of their own."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.swappable}
        return {"method": self.name, **options}

    def akin(self, other: object) -> bool:
        """Whether ``other`` is this method or a variant of it: then the two have names of slots in common."""
        return isinstance(other, Method) and _kin(type(other)) == _kin(type(self))

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

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        """Values of the slots that are not in an adapter's file (``found``: those that are); they follow from it."""
        return self.identity(op, W, dtype)

    def absent(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Values at a site the adapter in use does not have, which leave alone what others do to the same weight."""
        return self.identity(op, W, dtype)

    def minimal(self, op: Op) -> Method:
        """This method with the smallest rank the runtime takes: two, since compilers specialise on sizes 0 and 1."""
        return self

    def rebind(self, config: Any, attachment: Attachment) -> Method:
        """The method that another adapter's ``config`` has at this site; itself if the config is of another method."""
        make = getattr(config, "method", None)
        new: Any = None if make is None else make(attachment.name or attachment.module, attachment.kind)
        return new if self.akin(new) else self

    def at(self, op: Op) -> Method:
        """This method at a site: fields filled in that follow from its sizes and are part of :meth:`structure`."""
        return self

    def shares(self) -> bool:
        """Whether it has slots that are shared by all sites."""
        return False

    def inside(self, op: Op) -> tuple[Method, Op]:
        """The method that this one applies to parts of the weight, and the op of a part; itself if there is none."""
        return self, op

    def around(self, inner: Method) -> Method:
        """This method with another one :meth:`inside`."""
        return inner

    @classmethod
    def jointly(cls, sites: Sequence[tuple[Method, Op]]) -> list[Method]:
        """The methods of one adapter's sites, each knowing what the others need of a shared slot (its size)."""
        return [method for method, _ in sites]

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Slots from the tensors a file has for this site, where the two differ. Raises CheckpointError."""
        return dict(found)

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        """Inverse of :meth:`read`: what a file has for these slots."""
        return dict(slots)

    def keys(self, op: Op) -> list[str]:
        """Names a file may have for this site beyond those of the saved slots: :meth:`read` understands them."""
        return []

    def evaluated(self) -> Self:
        """This method as it is in inference, without dropout."""
        if not getattr(self, "training", False):
            return self
        return dataclasses.replace(self, training=False)  # type: ignore[call-arg]

    def trained(self) -> Self:
        """This method as it is in training, with its dropout if it has one."""
        if not hasattr(self, "training"):
            return self
        return dataclasses.replace(self, training=True)  # type: ignore[call-arg]

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

    def input(self, op: Op, x: Tensor, slots: Slots, scale: Scale) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no input()")

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no apply()")

    def has_weight(self) -> bool:
        """Whether the method means something for a weight; if not, it can only stand around a layer."""
        return type(self).weight is not Method.weight

    def has_input(self, op: Op) -> bool:
        """Whether :meth:`input` is defined at this site."""
        return op.callable and type(self).input is not Method.input

    def has_apply(self, op: Op) -> bool:
        """Whether :meth:`apply` is defined at this site."""
        return op.callable and type(self).apply is not Method.apply

    def has_outside(self, op: Op) -> bool:
        """Whether there is a form around the layer, which leaves its weight alone."""
        return self.has_input(op) or self.has_apply(op)

    def outside(self, op: Op, x: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        """op(x, W, b) adapted by that form."""
        if self.has_input(op):
            x = self.input(op, x, slots, scale)
        y = op(x, W, b)
        return self.apply(op, x, y, W, b, slots, scale) if self.has_apply(op) else y

    def fused(self, op: Op, x: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        """What :meth:`outside` computes, up to rounding, with kernels made for a GPU; optional."""
        raise AssertionError(f"{type(self).__name__} has no fused()")

    def unfused(self, op: Op) -> str:
        """Why :meth:`fused` is not defined at this site; '' where it is. Not in a class that changes the other forms of
        one that has it."""
        owner = _owner(type(self), "fused")
        if owner is not Method and all(issubclass(owner, _owner(type(self), n)) for n in ("apply", "input", "bias")):
            return ""
        return f"{self.name} has no kernels"

    def has_bias(self) -> bool:
        return type(self).bias is not Method.bias

    def check_merge(self, op: Op) -> str | None:
        """Why this site cannot be merged, or None when it can."""
        return None

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        """Where a slot lives in the program's state dict (PEFT's name in a wrapped model)."""
        head, _, tail = slot.partition(".")
        return ".".join(p for p in (place, head, adapter, tail) if p)


def _owner(method: type[Method], name: str) -> type:
    """The class that defines a function of the protocol."""
    return next(c for c in method.__mro__ if name in vars(c))


def _kin(method: type[Method]) -> Any:
    """Equal for methods whose slots may have one name: the class derived from :class:`Method` itself, or its word."""
    return method.kin or [c for c in method.__mro__ if issubclass(c, Method)][-2]


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
    variant: int = 0
    why: str = ""

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
        return f"{self.fqn}|{self.method.name}" + (f".{self.variant}" if self.variant else "")

    def slot_fqn(self, name: str, slot: Slot) -> str:
        """Where a slot lives in the program's state dict."""
        return self.method.fqn("" if slot.shared else self.place, name, self.adapter)

    @property
    def scale_fqn(self) -> str:
        # Adapters of several methods at one weight each have a scale of their own.
        return self.method.fqn(self.place, f"scaling.{self.method.name}", self.adapter)

    def file_key(self, name: str, slot: Slot) -> str:
        """The bare key of a slot in files."""
        return name if slot.shared or not self.key else f"{self.key}.{name}"

    def tag(self, role: str) -> dict[str, Any]:
        return {"method": self.method.name, "adapter": self.adapter, "site": self.id, "role": role}
