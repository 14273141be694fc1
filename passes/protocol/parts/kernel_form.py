"""A whole adapted layer, computed by kernels made for a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.parts.method_part import MethodPart, Slots


class KernelForm(MethodPart):
    """The kernels of a method. By default there are none.

    Arguments of the functions:
        - `op`: the op that reads the weight, an :class:`adaptc.methods.Op`.
        - `x`: the input of the layer.
        - `W`: the weight in canonical layout.
        - `b`: the bias (out,), or None.
        - `slots`: name -> tensor of the adapter at this site.
        - `scale`: a 0-d tensor, or None for a method without one.

    Example:
        >>> class ShiftKernels(adaptc.methods.KernelForm):
        ...     def why_missing(self, op):
        ...         return "" if op.kind == "linear" else "the kernel is for linear layers"
        ...     def apply(self, op, x, W, b, slots, scale):
        ...         return op(x, W, b) + x.sum(-1, keepdim=True) * slots["shift"]
        >>> @dataclass(frozen=True)
        ... class FastShift(Shift):
        ...     kernels = ShiftKernels()
        >>> FastShift().kernels.defines("apply")
        True
    """

    def why_missing(self, op: Op) -> str:
        """Return why :meth:`apply` is not defined at this site; '' where it is.

        A class that overrides ``apply``, ``input`` or ``bias`` of a class with kernels loses the kernels, since they do
        not match its forms.
        """
        owner = self.method.class_that_defines("kernels")
        forms = (self.method.class_that_defines(n) for n in ("apply", "input", "bias"))
        if self.defines("apply") and all(issubclass(owner, form) for form in forms):
            return ""
        return f"{self.method.name} has no kernels"

    def apply(self, op: Op, x: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Any) -> Tensor:
        """Return what the layer with the method's ``input`` and ``apply`` computes, up to rounding."""
        raise AssertionError(f"{type(self).__name__} has no apply()")
