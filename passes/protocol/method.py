"""The method protocol: all that passes know of LoRA, DoRA, IA3 and the other methods.

A method states its meaning once, as a pure function on the canonical weight (see ``ops``):

    weight(op, W, slots, scale) -> W'            the definition
    input(op, x, slots, scale) -> x'             optional and cheaper: together they must equal op(x, weight(W)), with
    apply(op, x', y, W, b, slots, scale) -> y'   y = op(x', W, b); a method may have either, both or none
    weight_over(op, W0, W, slots, scale) -> W'   only for methods that read the base W0 when other adapters changed it
    bias(op, b, slots, scale) -> b'              only for methods that change the bias
    bias_over(op, W0, b0, b, slots, scale) -> b' only for methods whose bias depends on the base's weight or bias

Injection, merge, unmerge, save, load, swap and every layer kind follow from these. Methods are frozen dataclasses of
their options, so that equal methods on equal shapes share one trace. No function may depend on a field that is
``swappable``: the code of a region serves adapters of every rank and scale. The optional hooks and objects, each with a
default, are in ``method_hooks``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method_hooks import Hooks
from adaptc.passes.protocol.parts.method_part import Slot, Slots

__all__ = ["InitialValues", "Method", "Scale", "Slot", "Slots"]

#: the scale that a method's functions receive: a 0-d tensor, or None for a method without one
Scale = Any


@dataclass(frozen=True)
class InitialValues:
    """The first values of a site's slots.

    Attributes:
        slots: name -> tensor.
        base: the base weight to use with them if the scheme changes it, as PiSSA does; None leaves it as it is.

    Example:
        >>> first = adaptc.methods.InitialValues({"shift": torch.zeros(7)})
    """

    slots: dict[str, Tensor]
    base: Tensor | None = None


@dataclass(frozen=True)
class Method(Hooks):
    """The base class of all methods; the module docstring says what a subclass defines.

    Arguments of the functions:
        - `op`: the op that reads the weight, an :class:`adaptc.methods.Op`.
        - `W`: the weight in canonical layout, (out, in) or (out, in / groups, *kernel).
        - `base`: the model's own weight, where earlier adapters made ``W`` of it.
        - `b`: the bias (out,), or None.
        - `own`: the model's own bias, where earlier adapters made ``b`` of it.
        - `x`: the input of the layer.
        - `y`: the output of the layer.
        - `slots`: name -> tensor of the adapter at this site.
        - `scale`: a 0-d tensor, or None for a method without one.
        - `dtype`: the adapter's dtype.
        - `generator`: the source of random numbers, None for torch's global generator.

    Example:
        >>> adaptc.methods.register_method(ShiftConfig, Shift)
        >>> adapted = adaptc.compile(model, ShiftConfig(target_modules=["0"]), example_inputs=x)
        >>> torch.equal(adapted(x), model(x))
        True
    """

    def slots(self, op: Op) -> dict[str, Slot]:
        """Return the slots at a site, by their name in PEFT's files.

        Raises:
            TargetError: the method cannot adapt the op.
        """
        raise AssertionError(f"{type(self).__name__} must define slots()")

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        """Return the first values of all slots, in ``dtype`` unless their Slot names another.

        ``W`` is canonical and must not be modified.
        """
        return InitialValues((self.identity if self.defines("identity") else self.filled)(op, W, dtype))

    def scale(self, op: Op) -> float | None:
        """Return the factor on the weight's change, which is bound as a slot of its own; None if there is none."""
        return None

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        """Return the changed weight, with the shape of ``W``, or dense where ``op`` has groups."""
        raise AssertionError(f"{type(self).__name__} must define weight()")

    def weight_over(self, op: Op, base: Tensor, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        """Return the changed weight where earlier adapters made ``W`` of the model's own weight, ``base``.

        It must equal :meth:`weight` where ``W`` and ``base`` are equal. A method with a form around the layer gets the
        base as its ``W`` there, and finds in ``y`` what the other adapters added.
        """
        return self.weight(op, W, slots, scale)

    def bias(self, op: Op, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor | None:
        """Return the changed bias, (out,); None for no bias."""
        return b

    def bias_over(
        self, op: Op, W: Tensor, own: Tensor | None, b: Tensor | None, slots: Slots, scale: Scale
    ) -> Tensor | None:
        """Return the changed bias where it depends on the model's own weight ``W`` or bias ``own``, (out,).

        Earlier adapters made ``b`` of ``own``. By default it is :meth:`bias`.
        """
        return self.bias(op, b, slots, scale)

    def input(self, op: Op, x: Tensor, slots: Slots, scale: Scale) -> Tensor:
        """Return the changed input of the layer, with the shape of ``x``."""
        raise AssertionError(f"{type(self).__name__} has no input()")

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        """Return the changed output of the layer, with the shape of ``y`` = op(x, W, b)."""
        raise AssertionError(f"{type(self).__name__} has no apply()")

    # -- which functions a method defines ------------------------------------------------------------------------------

    def defines(self, *names: str) -> bool:
        """Return whether the method overrides any of these functions of the protocol."""
        return any(getattr(type(self), n) is not getattr(Method, n) for n in names)

    def class_that_defines(self, name: str) -> type:
        """Return the class that defines a function or an object of the protocol, for this method."""
        return next(c for c in type(self).__mro__ if name in vars(c))

    def has_weight(self) -> bool:
        """Return whether the method has a form on the weight; if not, it can only stand around a layer."""
        return self.defines("weight")

    def check_merge(self, op: Op) -> str | None:
        """Return why this site cannot be merged, or None when it can. It cannot without a :meth:`weight`."""
        return None if self.has_weight() else f"{self.name} has no form on the weight"

    def looks_at_base(self) -> bool:
        """Return whether the method defines a :meth:`weight_over` that differs from :meth:`weight`."""
        return self.defines("weight_over")

    def has_input(self, op: Op) -> bool:
        """Return whether :meth:`input` is defined at this site."""
        return op.callable and self.defines("input")

    def has_apply(self, op: Op) -> bool:
        """Return whether :meth:`apply` is defined at this site."""
        return op.callable and self.defines("apply")

    def has_bias(self) -> bool:
        return self.defines("bias", "bias_over")

    def bias_reads_weight(self) -> bool:
        """Return whether the method defines a :meth:`bias_over`, which reads the model's own weight."""
        return self.defines("bias_over")

    def has_apply_form(self, op: Op) -> bool:
        """Return whether there is a form around the layer, which leaves its weight alone."""
        return self.has_input(op) or self.has_apply(op)

    def call_adapted(self, op: Op, x: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        """Return op(x, W, b) adapted by the form around the layer."""
        if self.has_input(op):
            x = self.input(op, x, slots, scale)
        y = op(x, W, b)
        return self.apply(op, x, y, W, b, slots, scale) if self.has_apply(op) else y
