"""Define the optional hooks of the method protocol: file formats, lifecycle, and what the sites of an adapter share.

Every hook has a default. The defaults are right for a method that has its own slots at each site and whose files hold
these slots unchanged. ``examples/writing_methods.md`` lists all hooks and says when to override which. Generic code
calls these hooks and never reads the fields of a method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.coefficients import Coefficient, Extra, ExtraValues
from adaptc.passes.protocol.low_rank import LowRank

Slots = Mapping[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """The specification of one adapter tensor at a site.

    ``shape`` is the size that the method's options give. ``fill`` is the identity value, where it is a constant.
    ``dtype`` None means the adapter's dtype. ``free`` are the axes whose size an adapter may choose, such as the rank.
    All other axes must match when adapters are swapped.

    ``saved`` is False for slots that follow from the config and are not in files. ``shared`` slots are one tensor for
    all sites of the model, such as VeRA's projections. Their key in files has no module path. ``repeated``: files hold
    the shared slot a second time under each site.

    ``shared_axes_cut`` are axes along which a site reads only the beginning of a shared slot. The slot is as long there
    as the largest site of its adapter needs. This length may differ between adapters, so binding an adapter cuts it or
    pads it with zeros.

    ``apart`` says that none of the slot's free sizes follows from the adapter's rank. A tuple names each free axis.
    Sizes with one name are equal in all slots of the site.
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
    apart: bool | tuple[str, ...] = False

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


@dataclass(frozen=True)
class Hooks:
    """The hooks of a method and their defaults; :class:`~adaptc.passes.protocol.method.Method` adds the mathematics."""

    name: ClassVar[str] = ""
    #: the name of a family of method classes that use the same slot names; empty where one base class tells the family
    kin: ClassVar[str] = ""
    #: True for a method that replaces a weight without reading it. It must come first at a weight: it would discard
    #: the changes of methods before it.
    replaces: ClassVar[bool] = False
    #: whether the method itself handles weights with a leading axis of experts; otherwise it is applied to each expert
    stacks: ClassVar[bool] = False
    #: whether its formula is defined for complex weights; norms, orderings, real transforms and rotations are not
    takes_complex: ClassVar[bool] = True
    #: fields in which an adapter may differ from the method that a program was compiled with: sizes along free axes,
    #: values that only reach the scale or unsaved slots, and options of initialisation or of training
    swappable: ClassVar[frozenset[str]] = frozenset({"r", "alpha", "dropout", "scheme", "training"})

    #: whether the size of a slot along a free axis has a meaning, so that the slot must not be padded to a larger one
    exact_sizes: ClassVar[bool] = False
    #: whether each row of a batch is computed from that row alone; where not, per-row adapters are impossible
    row_wise: ClassVar[bool] = True

    #: the names of its tensors in files, after the path of the site; for readers of a file that have no model
    file_names: ClassVar[tuple[str, ...]] = ()

    # Methods that use these two declare them as fields. They are not annotated here, because an annotation would make
    # them fields of every method.
    training = False
    dropout = 0.0

    # The part of the mathematics that hooks call; Method documents it.

    def slots(self, op: Op) -> dict[str, Slot]:
        raise AssertionError(f"{type(self).__name__} must define slots()")

    # -- identity: how programs and files name a method ------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        """Return the method's name and the options that its region's code depends on: those not ``swappable``.

        Adapters that differ here need regions of their own.
        """
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.swappable}
        return {"method": self.name, **options}

    def akin(self, other: object) -> bool:
        """Return whether ``other`` is this method or a variant of it, so that both may use the same slot names."""
        return isinstance(other, Hooks) and other.lineage() == self.lineage()

    def lineage(self) -> Any:
        """Return a key, equal for methods whose slots may share a name: ``kin``, or else the class below ``Method``."""
        return self.kin or [c for c in type(self).__mro__ if issubclass(c, Hooks)][-3]

    def options(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, for the tags of a program's regions; dtypes become text."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: str(v) if isinstance(v, torch.dtype) else v for k, v in plain.items()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Return the method with these options, which may have been through JSON; the inverse of :meth:`options`."""
        return cls(**{k: _from_json(v) for k, v in options.items()})

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def rank(self) -> int | None:
        """Return the size that adapters choose, for reports and limits: the field ``r``, or None without one."""
        return next((getattr(self, f.name) for f in dataclasses.fields(self) if f.name == "r"), None)

    def with_rank(self, op: Op, rank: int) -> Any:
        """Return this method with at least that rank at a site, as a multiple of its groups; None without a rank."""
        if self.rank() is None or "r" not in self.swappable:
            return None
        return dataclasses.replace(self, r=-(-rank // op.groups) * op.groups)  # type: ignore[call-arg]

    def minimal(self, op: Op) -> Any:
        """Return this method with rank two, the smallest that the runtime takes: compilers specialise on 0 and 1."""
        return self

    def with_sizes_of(self, op: Op, slots: Slots) -> Any:
        """Return this method with its free sizes, such as the rank, read from slot tensors instead of a config."""
        return self

    def at(self, op: Op) -> Any:
        """Return this method with the fields of :meth:`structure` filled in that follow from the site's sizes."""
        return self

    # -- values at sites that an adapter lacks, or has no tensors for --------------------------------------------------

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return slot values for which the site computes exactly the base, as small as the free axes allow.

        If other sites share a slot with a free size, its size is the adapter's. All slots then keep the sizes of these
        options instead of the minimal ones.
        """
        read_elsewhere = any(s.shared and s.free and not s.apart for s in self.slots(op).values())
        return (self if read_elsewhere else self.minimal(op)).filled(op, W, dtype)

    def filled(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return every slot at its ``fill`` value, in the shape that these options give."""
        slots = self.slots(op).items()
        return {n: torch.full(s.shape, s.fill, dtype=s.dtype or dtype, device=W.device) for n, s in slots}

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        """Return values of the slots that a file does not hold, derived from ``found``, the slots that it does."""
        return self.identity(op, W, dtype)

    def absent(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return slot values at a site that the bound adapter lacks, which keep all changes by other adapters."""
        return self.identity(op, W, dtype)

    # -- files -------------------------------------------------------------------------------------------------------

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the slots made from a file's tensors for this site. Raises CheckpointError."""
        return dict(found)

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        """Return the tensors that a file holds for these slots; the inverse of :meth:`read`."""
        return dict(slots)

    def keys(self, op: Op) -> list[str]:
        """Return further names that a file may have for this site beside the saved slots, for :meth:`read`."""
        return []

    def inner_path(self, rest: str) -> str | None:
        """Return the path inside the adapted module that ``rest`` stands for, the end of a file's key.

        Only a method that trains a module's own tensors has such a path. None for all others.
        """
        return None

    def in_place(self) -> bool:
        """Return whether PEFT trains the base's own tensor, so that the adapter adds no parameters to count."""
        return False

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        """Return the name of a slot in the program's state dict, which is PEFT's name in a wrapped model."""
        head, _, tail = slot.partition(".")
        return ".".join(p for p in (place, head, adapter, tail) if p)

    # -- several adapters made into one ------------------------------------------------------------------------------

    def summed(self) -> str:
        """Return the name in files of the tensor in which the weight's change is linear; '' where there is none.

        Adapters that agree in all other tensors are combined by a weighted sum of this one.
        """
        return ""

    def low_rank(self, found: Slots) -> LowRank | None:
        """Return the change that a file's tensors make at a site, if it is the matmul of two tensors and nothing else.

        None for all other methods. Raises CheckpointError for tensors that do not fit together.
        """
        return None

    def with_low_rank(self, change: LowRank, like: Slots) -> dict[str, Tensor]:
        """Return the tensors that make a low-rank change at this site; the inverse of :meth:`low_rank`.

        ``like`` are the tensors of another adapter of this method at this site. The result has their shapes, except for
        the rank. The tensors do not hold ``change.scale``, so the caller has to account for it.
        """
        raise AssertionError(f"{type(self).__name__} has no with_low_rank()")

    # -- lifecycle -----------------------------------------------------------------------------------------------------

    def rebind(self, config: Any, place: SiteDescription) -> Any:
        """Return the method that another adapter's ``config`` gives at this site; this one if that is not akin."""
        make = getattr(config, "method", None)
        new: Any = None if make is None else make(place.name or place.module, place.kind)
        return new if self.akin(new) else self

    def of_model(self, op: Op) -> dict[str, Any]:
        """Return values, by name, for the options that a config may leave to the model."""
        return {}

    def evaluated(self) -> Self:
        """Return this method as it is in inference, without dropout."""
        return dataclasses.replace(self, training=False) if self.training else self  # type: ignore[call-arg]

    def trained(self) -> Self:
        """Return this method as it is in training, with its dropout if it has one."""
        has = any(f.name == "training" for f in dataclasses.fields(self))
        return dataclasses.replace(self, training=True) if has else self  # type: ignore[call-arg]

    def untrainable(self, slots: Slots) -> str:
        """Return the reason why an adapter with these values cannot be trained; '' where it can."""
        return ""

    def constrained(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        """Return the slots of a site that training must keep within bounds, moved into these bounds; {} for none."""
        return {}

    def drops_input(self) -> bool:
        """Return whether the form around a layer applies dropout to what the adapter reads."""
        return bool(self.training and self.dropout)

    def nested(self) -> Any:
        """Return this method for a layer inside another adapted one: MultiheadAttention's ``out_proj`` in PEFT."""
        return self

    def following(self, home: str) -> Any:
        """Return this method for a linear layer tied to the embedding at module ``home``, using the embedding's slots.

        The two then change one weight. None where the method has no such form.
        """
        return None

    def moves_base(self) -> bool:
        """Return whether its first values come with a changed base weight (PiSSA), which its adapters then need."""
        return False

    def check_merge(self, op: Op) -> str | None:
        """Return why this site cannot be merged, or None when it can."""
        return None

    def clash(self, other: Any) -> str:
        """Return the part of a weight that both this method and ``other`` overwrite; '' where both take effect.

        Of two adapters that act together, only the later one would set that part.
        """
        return ""

    # -- values that regions read beside the slots ---------------------------------------------------------------------

    def coefficients(self) -> Mapping[str, Coefficient]:
        """Return the coefficients that its regions read, by the name under which they appear among the slots.

        A program makes each coefficient once in a call; see ``passes.protocol.coefficients``.
        """
        return {}

    def extras(self) -> Mapping[str, Extra]:
        """Return the inputs that it adds to the program, by name. A method at a layer finds them among its slots."""
        return {}

    def why_wrong(self, slots: Slots, given: ExtraValues) -> str:
        """Return what is wrong with the values of the inputs it added, checked before they are used; '' for nothing."""
        return ""

    # -- sharing -------------------------------------------------------------------------------------------------------

    def shares(self) -> bool:
        """Return whether it has slots that all sites share."""
        return False

    @classmethod
    def settle_shared_sizes(cls, sites: Sequence[tuple[Any, Op]]) -> list[Any]:
        """Return the methods of all sites of one adapter, given as (method, op), adjusted to each other's sizes.

        A shared slot must be as large as its largest site needs.
        """
        return [method for method, _ in sites]

    @classmethod
    def grouped_slots(cls, sites: Sequence[tuple[Any, Op]]) -> list[Mapping[str, int]]:
        """Return, for each site, the slots that it shares with others: slot name -> index of the group's first site.

        ``sites`` are those of one adapter, as (method, op), in the order of the model's modules. The index counts in
        ``sites``. The adapter decides which slots are one tensor. In the program and in files each site has a slot of
        its own, so adapters with different groups run through the same code.
        """
        return [{} for _ in sites]

    def unwrap(self, op: Op) -> tuple[Any, Op]:
        """Return the inner method and the op of one part, for a method that applies another one to parts of a weight.

        An example is a method that runs once per expert. All other methods return themselves and ``op``.
        """
        return self, op

    def rewrap(self, inner: Any) -> Any:
        """Return this method around another inner one; the inverse of :meth:`unwrap`."""
        return inner


def _from_json(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return tuple(value) if isinstance(value, list) else value
