"""Define the hooks of a method beside its mathematics: its identity, values at special sites, and its lifecycle.

Every hook has a default, and so has each of the objects ``files``, ``sizes``, ``bank``, ``kernels``, ``sharing`` and
``extra_inputs`` (``passes.protocol.parts``). The defaults are right for a method that has its own slots at each site
and whose files hold these slots unchanged. ``examples/writing_methods.md`` lists all hooks and says when to override
which. Generic code calls hooks and never reads the fields of a method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.parts.bank_form import BankForm
from adaptc.passes.protocol.parts.extra_inputs import ExtraInputs
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.kernel_form import KernelForm
from adaptc.passes.protocol.parts.method_part import SiteDescription, Slot, Slots
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.passes.protocol.parts.size_rule import SizeRule


@dataclass(frozen=True)
class Hooks:
    """The hooks of a method and their defaults; :class:`~adaptc.passes.protocol.method.Method` adds the mathematics."""

    name: ClassVar[str] = ""
    #: the name of a family of method classes that use the same slot names; empty where one base class tells the family
    slot_family: ClassVar[str] = ""
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

    # The optional objects. They are not annotated, because an annotation would make them fields.
    #: how slots are written to adapter files and read from them
    files = FileFormat()
    #: the sizes that adapters choose, such as the rank
    sizes = SizeRule()
    #: per-row adapters in one computation
    bank = BankForm()
    #: the adapted layer by kernels for a GPU
    kernels = KernelForm()
    #: slots that are one tensor for several sites
    sharing = SharedSlots()
    #: coefficients and inputs that the method adds to the program
    extra_inputs = ExtraInputs()

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

    def is_variant_of(self, other: object) -> bool:
        """Return whether ``other`` is this method or a variant of it, so that both may use the same slot names."""
        return isinstance(other, Hooks) and other.family_key() == self.family_key()

    def family_key(self) -> Any:
        """Return a key, equal for methods whose slots may share a name.

        It is ``slot_family``, or else the class below ``Method``.
        """
        return self.slot_family or [c for c in type(self).__mro__ if issubclass(c, Hooks)][-3]

    def options(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, for the tags of a program's regions; dtypes become text."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: str(v) if isinstance(v, torch.dtype) else v for k, v in plain.items()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Return the method with these options, which may have been through JSON; the inverse of :meth:`options`."""
        return cls(**{k: _from_json(v) for k, v in options.items()})

    # -- values at sites that an adapter lacks, or has no tensors for --------------------------------------------------

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return slot values for which the site computes exactly the base, as small as the free axes allow.

        If other sites share a slot with a free size, its size is the adapter's. All slots then keep the sizes of these
        options instead of the minimal ones.
        """
        read_elsewhere = any(s.shared and s.free and not s.apart for s in self.slots(op).values())
        return (self if read_elsewhere else self.sizes.minimal(op)).filled(op, W, dtype)

    def filled(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return every slot at its ``fill`` value, in the shape that these options give."""
        slots = self.slots(op).items()
        return {n: torch.full(s.shape, s.fill, dtype=s.dtype or dtype, device=W.device) for n, s in slots}

    def absent(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return slot values at a site that the bound adapter lacks, which keep all changes by other adapters."""
        return self.identity(op, W, dtype)

    def with_layer_bias(self, b: Tensor | None) -> Any:
        """Return this method for making values at a layer with the bias ``b`` (out,), None for a layer without one.

        ``init`` and ``files.derived`` are called on it. Only methods whose values follow from the bias, too, need it.
        """
        return self

    # -- lifecycle -----------------------------------------------------------------------------------------------------

    def rebind(self, config: Any, place: SiteDescription) -> Any:
        """Return the method that another adapter's ``config`` gives at this site.

        It is this method where that one is no variant of it.
        """
        make = getattr(config, "method", None)
        new: Any = None if make is None else make(place.name or place.module, place.kind)
        return new if self.is_variant_of(new) else self

    def is_made_by(self, config: Any, place: SiteDescription) -> bool:
        """Return whether ``config`` makes this method or a variant of it at this site."""
        make = getattr(config, "method", None)
        return make is None or self.is_variant_of(make(place.name or place.module, place.kind))

    def config_from_model(self, op: Op) -> dict[str, Any]:
        """Return values, by name, for the options that a config may leave to the model."""
        return {}

    def evaluated(self) -> Self:
        """Return this method as it is in inference, without dropout."""
        return dataclasses.replace(self, training=False) if self.training else self  # type: ignore[call-arg]

    def trained(self) -> Self:
        """Return this method as it is in training, with its dropout if it has one."""
        has = any(f.name == "training" for f in dataclasses.fields(self))
        return dataclasses.replace(self, training=True) if has else self  # type: ignore[call-arg]

    def in_mode_of(self, other: Any) -> Any:
        """Return this method as it is in training where ``other`` is so, which is the method of the program's code."""
        return self.trained() if other.training else self

    def untrainable(self, slots: Slots) -> str:
        """Return the reason why an adapter with these values cannot be trained; '' where it can."""
        return ""

    def constrained(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        """Return the slots of a site that training must keep within bounds, moved into these bounds; {} for none."""
        return {}

    def drops_input(self) -> bool:
        """Return whether the form around a layer applies dropout to what the adapter reads."""
        return bool(self.training and self.dropout)

    def is_random(self) -> bool:
        """Return whether the form around a layer draws random numbers, for dropout or for noise."""
        return self.drops_input()

    def trains_at_layer(self) -> bool:
        """Return whether this method, as it is, has a derivative of its own that only the form around a layer has."""
        return False

    def noiseless(self) -> Self:
        """Return this method with nothing random in it, not even in inference."""
        return self.evaluated()

    def inside_multihead_attention(self) -> Any:
        """Return this method for a layer inside another adapted one: MultiheadAttention's ``out_proj`` in PEFT."""
        return self

    def changes_base_at_init(self) -> bool:
        """Return whether its first values come with a changed base weight (PiSSA), which its adapters then need."""
        return False

    def base_needs_data(self) -> bool:
        """Return whether the changed base weight was made of data (CorDA), so that a file cannot bring it back."""
        return False

    def base_scheme(self) -> Any:
        """Return the scheme by which the first values quantise the base weight (LoftQ); None where they do not.

        ``InitialValues.base`` then is a quantised tensor. A weight that is quantised already stays as it is.
        """
        return None

    def check_merge(self, op: Op) -> str | None:
        """Return why this site cannot be merged, or None when it can."""
        return None

    def conflict_with(self, other: Any) -> str:
        """Return the part of a weight that both this method and ``other`` overwrite; '' where both take effect.

        Of two adapters that act together, only the later one would set that part.
        """
        return ""

    # -- methods around others ---------------------------------------------------------------------------------------

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
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value
