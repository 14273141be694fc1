"""The method protocol: all that passes know of LoRA, DoRA, IA3 and the rest.

A method states its meaning once, as a pure function on the canonical weight (see ``ops``):

    weight(op, W, slots, scale) -> W'            the definition
    input(op, x, slots, scale) -> x'             optional and cheaper: together they must equal op(x, weight(W)), with
    apply(op, x', y, W, b, slots, scale) -> y'   y = op(x', W, b); a method may have either, both or none
    weight_over(op, W0, W, slots, scale) -> W'   only for methods that look at the base where other adapters changed it
    bias(op, b, slots, scale) -> b'              only for methods that change the bias
    fused(op, x, W, b, slots, scale) -> y'       optional: apply and input by kernels for a GPU

Injection, merge, unmerge, save, load, swap and every layer kind follow from these. Methods are frozen dataclasses of
the options that shape them, so that equal methods on equal shapes share one trace. No function may depend on a field
that is ``swappable``: the code of a region serves adapters of every rank and scale. The optional part of the protocol,
with a default for everything, is in ``method_hooks``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.passes.ir.method_hooks import Hooks, Slot, Slots
from adaptc.passes.ir.ops import Op

__all__ = ["Initial", "Method", "Scale", "Slot", "Slots"]

#: a 0-d tensor; None for a method without a scale, which then does not look at it
Scale = Any


@dataclass(frozen=True)
class Initial:
    """First values of a site's slots, and the base weight to use with them if the scheme changes it (PiSSA)."""

    slots: dict[str, Tensor]
    base: Tensor | None = None


@dataclass(frozen=True)
class Method(Hooks):
    """Base class of all methods; see the module docstring for what a subclass defines."""

    def slots(self, op: Op) -> dict[str, Slot]:
        """The slots at a site, by their name in PEFT's files. Raises TargetError where the method has no meaning."""
        raise AssertionError(f"{type(self).__name__} must define slots()")

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Initial:
        """First values, all slots in ``dtype`` unless their Slot says otherwise; ``W`` canonical, never modified."""
        return Initial((self.identity if self.defines("identity") else self.filled)(op, W, dtype))

    def scale(self, op: Op) -> float | None:
        """The factor on the change of the weight, a slot of its own; None for methods without one."""
        return None

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        """W', of the shape of W, or dense where ``op`` has groups."""
        raise AssertionError(f"{type(self).__name__} must define weight()")

    def weight_over(self, op: Op, base: Tensor, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        """W' where adapters before this one made W of the model's own weight, ``base``. Equal to :meth:`weight` where
        they are one. A method with a form of its own around the layer has the base there as its W, and in y what the
        others added."""
        return self.weight(op, W, slots, scale)

    def bias(self, op: Op, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor | None:
        """b', (out,); None for no bias."""
        return b

    def input(self, op: Op, x: Tensor, slots: Slots, scale: Scale) -> Tensor:
        """x', of the shape of x."""
        raise AssertionError(f"{type(self).__name__} has no input()")

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        """y', of the shape of y = op(x, W, b)."""
        raise AssertionError(f"{type(self).__name__} has no apply()")

    def fused(self, op: Op, x: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        """What :meth:`call_adapted` computes, up to rounding, with kernels made for a GPU; optional."""
        raise AssertionError(f"{type(self).__name__} has no fused()")

    def rows(
        self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale, mix: Tensor
    ) -> Tensor | None:
        """y + the sum over k of mix[..., k] * (y'_k - y), for several adapters at once: ``slots`` and ``scale`` have an
        axis of them in front, ``mix`` broadcasts to (*y.shape, adapters). Optional and cheaper than one after the
        other; None where it is not. Where no operator has their number, one code serves all numbers of them."""
        return None

    def rows_at_once(self, op: Op, x: Tensor, y: Tensor, slots: Slots, scale: Scale, c: Tensor) -> Tensor | None:
        """:meth:`rows` by an operator made for it, for code that is run and not exported: ``c`` (rows, adapters), and
        each row's share of ``x`` and ``y`` in one stretch of their first axis. None where there is no such operator."""
        return None

    def rows_grouped(
        self, op: Op, x: Tensor, y: Tensor, slots: Slots, scale: Scale, starts: Tensor, c: Tensor
    ) -> Tensor:
        """The same with kernels made for a GPU, where :meth:`groups` says so: slots lie rank by rank, of which adapter
        k has those from ``starts[2 k]`` to ``starts[2 k + 1]``; ``scale`` has zeros between its numbers."""
        raise AssertionError(f"{type(self).__name__} has no rows_grouped()")

    # -- which of these there are --------------------------------------------------------------------------------------

    def defines(self, *names: str) -> bool:
        """Whether it overrides any of these functions of the protocol."""
        return any(getattr(type(self), n) is not getattr(Method, n) for n in names)

    def has_weight(self) -> bool:
        """Whether the method means something for a weight; if not, it can only stand around a layer."""
        return self.defines("weight")

    def check_merge(self, op: Op) -> str | None:
        """Say why this site cannot be merged, or give None when it can. A method without :meth:`weight` cannot."""
        return None if self.has_weight() else f"{self.name} has no form on the weight"

    def looks_at_base(self) -> bool:
        """Whether :meth:`weight_over` is another one than :meth:`weight`."""
        return self.defines("weight_over")

    def has_input(self, op: Op) -> bool:
        """Whether :meth:`input` is defined at this site."""
        return op.callable and self.defines("input")

    def has_apply(self, op: Op) -> bool:
        """Whether :meth:`apply` is defined at this site."""
        return op.callable and self.defines("apply")

    def has_bias(self) -> bool:
        return self.defines("bias")

    def has_apply_form(self, op: Op) -> bool:
        """Whether there is a form around the layer, which leaves its weight alone."""
        return self.has_input(op) or self.has_apply(op)

    def unfused(self, op: Op) -> str:
        """Why :meth:`fused` is not defined at this site; '' where it is. Not in a class that changes the other forms of
        one that has it."""
        owner = _owner(type(self), "fused")
        if owner is not Method and all(issubclass(owner, _owner(type(self), n)) for n in ("apply", "input", "bias")):
            return ""
        return f"{self.name} has no kernels"

    def groups(self, op: Op) -> bool:
        """Whether rows of several adapters are computed by :meth:`rows_grouped` on a GPU."""
        return False

    def has_rows(self) -> bool:
        """Whether :meth:`rows` is of this method, and not of one whose other forms it changes."""
        owner = _owner(type(self), "rows")
        return owner is not Method and issubclass(owner, _owner(type(self), "apply"))

    def call_adapted(self, op: Op, x: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        """op(x, W, b) adapted by the form around the layer."""
        if self.has_input(op):
            x = self.input(op, x, slots, scale)
        y = op(x, W, b)
        return self.apply(op, x, y, W, b, slots, scale) if self.has_apply(op) else y


def _owner(method: type[Method], name: str) -> type:
    """The class that defines a function of the protocol."""
    return next(c for c in method.__mro__ if name in vars(c))
