"""The optional part of the method protocol: what a method says of its files, its lifecycle and what its sites share.

Every hook has a default that is right for a method with slots of its own at each site, whose files hold the slots as
they are. ``examples/writing_methods.md`` lists them all with when to override which. Generic code asks these hooks, and
never looks at the fields of a method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from adaptc.passes.ir.coefficients import Coefficient, Extra, Given
from adaptc.passes.ir.low_rank import LowRank
from adaptc.passes.ir.ops import Op

Slots = Mapping[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """One adapter tensor of a site.

    ``dtype`` None means the adapter dtype. ``fill`` is the identity value when a constant gives it. ``free`` are the
    axes whose size an adapter may choose (the rank); all others must match on a swap. ``saved`` is False for slots that
    follow from the config and are not in files. ``shared``: one tensor for all sites of the model (VeRA's projections),
    whose key in files has no module path. ``repeated``: files have the shared slot once more under each site.

    ``shared_axes_cut``: axes along which a site reads only the beginning of a shared slot. The slot is as long there as
    the largest site of its adapter needs. Two adapters may have different largest sites, so the length may differ, and
    is cut or filled up with zeros when an adapter is bound.

    ``apart``: its free sizes are its own, and none of them follows from the adapter's rank. Names, one for each free
    axis: sizes of one name are one size in all slots of the site that have it.
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
        """Free axis -> what its size is called, of a slot whose sizes are its own and that is called ``slot``."""
        if isinstance(self.apart, tuple):
            return dict(zip(self.free, self.apart, strict=True))
        return {i: f"{slot}_{i}" for i in self.free}


class Place(Protocol):
    """Where a method is used, as far as a config needs to know it to choose the options there."""

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
    """The hooks and their defaults; :class:`~adaptc.passes.ir.method.Method` adds the mathematics."""

    name: ClassVar[str] = ""
    #: a name that methods of several classes share whose slots have names in common; empty for those of one base class
    kin: ClassVar[str] = ""
    #: it does not read the weight it changes, so it comes first at a weight, and nothing before it is lost
    replaces: ClassVar[bool] = False
    #: whether it gives weights with a leading axis of experts a meaning of its own; if not, it is done per expert
    stacks: ClassVar[bool] = False
    #: whether its formula means something for complex weights: lengths, orders, real transforms and rotations do not
    takes_complex: ClassVar[bool] = True
    #: fields in which an adapter may differ from the method a program was compiled with: sizes along free axes, what
    #: goes into the scale or into slots that are not saved, what acts on first values or in training only
    swappable: ClassVar[frozenset[str]] = frozenset({"r", "alpha", "dropout", "scheme", "training"})

    #: whether the sizes of its slots along free axes mean something, so that none can be filled up to a larger one
    exact_sizes: ClassVar[bool] = False
    #: whether a row of a batch depends on that row alone; where not, rows of one batch cannot have other adapters
    row_wise: ClassVar[bool] = True

    #: the names that its tensors have in files behind the path of a site, for those who read a file without a model
    file_names: ClassVar[tuple[str, ...]] = ()

    # Methods that have these make fields of them. Not annotated: dataclasses would give them a place among the fields.
    training = False
    dropout = 0.0

    # Mathematics that hooks need; see Method.

    def slots(self, op: Op) -> dict[str, Slot]:
        raise AssertionError(f"{type(self).__name__} must define slots()")

    # -- identity: what programs and files know a method by --------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        """What the code of a region depends on: adapters that differ here need regions of their own."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.swappable}
        return {"method": self.name, **options}

    def akin(self, other: object) -> bool:
        """Whether ``other`` is this method or a variant of it: then the two have names of slots in common."""
        return isinstance(other, Hooks) and other.lineage() == self.lineage()

    def lineage(self) -> Any:
        """Equal for methods whose slots may have one name: ``kin``, or the class derived from ``Method`` itself."""
        return self.kin or [c for c in type(self).__mro__ if issubclass(c, Hooks)][-3]

    def options(self) -> dict[str, Any]:
        """The fields as plain JSON values, for the tags of a program's regions."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: str(v) if isinstance(v, torch.dtype) else v for k, v in plain.items()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`options`, after a trip through JSON."""
        return cls(**{k: _from_json(v) for k, v in options.items()})

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def rank(self) -> int | None:
        """The size that adapters choose, for reports and limits; by default the field ``r``, None without one."""
        return next((getattr(self, f.name) for f in dataclasses.fields(self) if f.name == "r"), None)

    def with_rank(self, op: Op, rank: int) -> Any:
        """This method with at least that rank, at a site; None where there is no rank to choose."""
        if self.rank() is None or "r" not in self.swappable:
            return None
        return dataclasses.replace(self, r=-(-rank // op.groups) * op.groups)  # type: ignore[call-arg]

    def minimal(self, op: Op) -> Any:
        """This method with the smallest rank the runtime takes: two, since compilers specialise on sizes 0 and 1."""
        return self

    def with_sizes_of(self, op: Op, slots: Slots) -> Any:
        """This method with its free sizes (the rank) read off slot tensors instead of a config."""
        return self

    def at(self, op: Op) -> Any:
        """This method at a site: fields filled in that follow from its sizes and are part of :meth:`structure`."""
        return self

    # -- values at sites that an adapter lacks, or has no tensors for --------------------------------------------------

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return values for which the site computes exactly the base, as small as the free axes allow.

        A slot that other sites read too has the size of the adapter there, and the others have the sizes that go with
        it."""
        read_elsewhere = any(s.shared and s.free and not s.apart for s in self.slots(op).values())
        return (self if read_elsewhere else self.minimal(op)).filled(op, W, dtype)

    def filled(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every slot at its fill, in the size it has with these options."""
        slots = self.slots(op).items()
        return {n: torch.full(s.shape, s.fill, dtype=s.dtype or dtype, device=W.device) for n, s in slots}

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        """Values of the slots that are not in an adapter's file (``found``: those that are); they follow from it."""
        return self.identity(op, W, dtype)

    def absent(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Values at a site the adapter in use does not have, which leave alone what others do to the same weight."""
        return self.identity(op, W, dtype)

    # -- files -------------------------------------------------------------------------------------------------------

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Slots from the tensors a file has for this site, where the two differ. Raises CheckpointError."""
        return dict(found)

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        """Inverse of :meth:`read`: what a file has for these slots."""
        return dict(slots)

    def keys(self, op: Op) -> list[str]:
        """Names a file may have for this site beyond those of the saved slots: :meth:`read` understands them."""
        return []

    def inner_path(self, rest: str) -> str | None:
        """For a method that trains the tensors of a module as they are: the path inside the module that the ``rest`` of
        a file's key stands for. None for all others."""
        return None

    def in_place(self) -> bool:
        """Whether PEFT trains the base's own tensor, so that the adapter adds no parameters to count."""
        return False

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        """Where a slot lives in the program's state dict (PEFT's name in a wrapped model)."""
        head, _, tail = slot.partition(".")
        return ".".join(p for p in (place, head, adapter, tail) if p)

    # -- several adapters made into one ------------------------------------------------------------------------------

    def summed(self) -> str:
        """The tensor in which the change is linear, by its name in files: adapters that agree in all else are combined
        by its weighted sum. '' where there is none."""
        return ""

    def low_rank(self, found: Slots) -> LowRank | None:
        """What the tensors of a file add at a site, where that is a product of two of them and nothing else; None for
        all other methods. Raises CheckpointError for tensors that do not go together."""
        return None

    def with_low_rank(self, change: LowRank, like: Slots) -> dict[str, Tensor]:
        """Inverse of :meth:`low_rank`: tensors in the shapes of ``like``, those of another adapter of this method at
        this site, but for the rank. The scale is another one's to keep."""
        raise AssertionError(f"{type(self).__name__} has no with_low_rank()")

    # -- lifecycle -----------------------------------------------------------------------------------------------------

    def rebind(self, config: Any, place: Place) -> Any:
        """The method that another adapter's ``config`` has at this site; itself if the config is of another method."""
        make = getattr(config, "method", None)
        new: Any = None if make is None else make(place.name or place.module, place.kind)
        return new if self.akin(new) else self

    def of_model(self, op: Op) -> dict[str, Any]:
        """What the model says of options that a config may leave to it, by name."""
        return {}

    def evaluated(self) -> Self:
        """This method as it is in inference, without dropout."""
        return dataclasses.replace(self, training=False) if self.training else self  # type: ignore[call-arg]

    def trained(self) -> Self:
        """This method as it is in training, with its dropout if it has one."""
        has = any(f.name == "training" for f in dataclasses.fields(self))
        return dataclasses.replace(self, training=True) if has else self  # type: ignore[call-arg]

    def untrainable(self, slots: Slots) -> str:
        """Why an adapter with these values cannot be trained on; '' where it can."""
        return ""

    def constrained(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        """Of the slots of a site, those that training has to keep within bounds, moved there; {} for none."""
        return {}

    def drops_input(self) -> bool:
        """Whether the form around a layer has dropout on what the adapter reads."""
        return bool(self.training and self.dropout)

    def nested(self) -> Any:
        """This method at a layer that PEFT adapts inside another adapted one (MultiheadAttention's ``out_proj``)."""
        return self

    def following(self, home: str) -> Any:
        """This method at a linear layer that is tied to the embedding ``home`` (a module), with the slots it has there:
        the two change one weight. None where it has no such form."""
        return None

    def moves_base(self) -> bool:
        """Whether its first values come with a base weight of their own (PiSSA), which its adapters then go with."""
        return False

    def check_merge(self, op: Op) -> str | None:
        """Why this site cannot be merged, or None when it can."""
        return None

    def clash(self, other: Any) -> str:
        """What this method sets at a weight that ``other`` sets too, if they are of two adapters that act together:
        only the later of the two would count. '' where both do."""
        return ""

    # -- what it reads beside its slots --------------------------------------------------------------------------------

    def coefficients(self) -> Mapping[str, Coefficient]:
        """What its regions read beside the slots, by the name they find it under among them: values that are made once
        in a call (``passes.ir.coefficients``)."""
        return {}

    def extras(self) -> Mapping[str, Extra]:
        """The inputs it adds to the program, by name. A method at a layer finds them among its slots."""
        return {}

    def why_wrong(self, slots: Slots, given: Given) -> str:
        """What is wrong with the values of inputs it added, before they are used; '' for nothing."""
        return ""

    # -- sharing -------------------------------------------------------------------------------------------------------

    def shares(self) -> bool:
        """Whether it has slots that are shared by all sites."""
        return False

    @classmethod
    def settle_shared_sizes(cls, sites: Sequence[tuple[Any, Op]]) -> list[Any]:
        """The methods of all sites of one adapter, given as (method, op), each with what it has to know of the others:
        a shared slot is as large as its largest site needs."""
        return [method for method, _ in sites]

    @classmethod
    def grouped_slots(cls, sites: Sequence[tuple[Any, Op]]) -> list[Mapping[str, int]]:
        """Slots that are one tensor for a group of sites. ``sites``: those of one adapter, as (method, op), in the
        order of the model's modules. For each the names of such slots, with the place in ``sites`` of the first of the
        group.

        What is one tensor is said by the adapter and not by the program: each site has a slot of its own in the program
        and in files, so that an adapter with other groups runs through the same code.
        """
        return [{} for _ in sites]

    def unwrap(self, op: Op) -> tuple[Any, Op]:
        """Of a method that applies another one to parts of a weight (once per expert): that other method, and the op of
        one part. All others return themselves, and ``op``."""
        return self, op

    def rewrap(self, inner: Any) -> Any:
        """Inverse of :meth:`unwrap`: this method around another inner one."""
        return inner


def _from_json(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return tuple(value) if isinstance(value, list) else value
