"""Per-row adapters of a method, computed at once: the form of a bank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.parts.method_part import MethodPart, Slots


class BankForm(MethodPart):
    """The form of a site where each row of a batch has its own mix of adapters. By default they act one by one.

    Args:
        row_wise: whether each row of a batch is computed from that row alone; where not, per-row adapters are
            impossible.

    Arguments of the functions:
        - `op`: the op that reads the weight, an :class:`adaptc.methods.Op`.
        - `x`: the input of the layer.
        - `y`: the output of the layer without adapters.
        - `W`: the weight in canonical layout.
        - `b`: the bias (out,), or None.
        - `slots`: name -> tensor, those of all adapters.
        - `scale`: the scales of all adapters, or None for a method without one.
        - `mix`: how much of each adapter acts, in a shape that broadcasts to (*y.shape, adapters).
        - `c`: how much of each adapter acts in a row, (rows, adapters).
        - `starts`: the first and last rank of each adapter among the ranks of all.

    Example:
        >>> class ShiftBank(adaptc.methods.BankForm):
        ...     def apply(self, op, x, y, W, b, slots, scale, mix):
        ...         changes = x.sum(-1)[..., None, None] * slots["shift"].T
        ...         return y + (mix * changes).sum(-1)
        >>> slots, mix = {"shift": torch.ones(2, 7)}, torch.tensor([1.0, 0.5])
        >>> ShiftBank().apply(None, torch.ones(2, 5), torch.zeros(2, 7), None, None, slots, None, mix)[0, 0]
        tensor(7.5000)
    """

    def __init__(self, row_wise: bool = True) -> None:
        self.row_wise = row_wise

    def is_defined(self) -> bool:
        """Return whether :meth:`apply` matches the method's ``apply``: no subclass has overridden only the latter."""
        own = self.defines("apply")
        return own and issubclass(self.method.class_that_defines("bank"), self.method.class_that_defines("apply"))

    def apply(
        self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Any, mix: Tensor
    ) -> Tensor | None:
        """Return y + the sum over k of mix[..., k] * (y'_k - y), for per-row adapters in one computation.

        ``slots`` and ``scale`` have a leading axis of adapters, and ``mix`` broadcasts to (*y.shape, adapters). None
        where this is not cheaper than one adapter after the other. A trace in which no op holds the number of adapters
        serves every number.
        """
        return None

    def apply_fused(self, op: Op, x: Tensor, y: Tensor, slots: Slots, scale: Any, c: Tensor) -> Tensor | None:
        """Return what :meth:`apply` returns, by a dedicated operator, for code that is run and not exported.

        ``c`` has the shape (rows, adapters). Each row's share of ``x`` and ``y`` is one stretch of their first axis.
        None where there is no such operator.
        """
        return None

    def expert_factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor] | None:
        """Return the two factors that change an expert's weight by their product, for adapters of stacked experts.

        They are (adapters, experts, rank, in) and (adapters, experts, out, rank). ``op`` is of stacked experts, and
        ``slots`` have a leading axis of adapters. None where the change is not of that form; adapters act one by one
        then.
        """
        return None

    def has_kernel(self, op: Op) -> bool:
        """Return whether :meth:`apply_kernel` computes per-row adapters of this op on a GPU."""
        return False

    def apply_kernel(self, op: Op, x: Tensor, y: Tensor, slots: Slots, scale: Any, starts: Tensor, c: Tensor) -> Tensor:
        """Return what :meth:`apply` returns, by GPU kernels; called only where :meth:`has_kernel` returns True.

        All adapters' slots are padded to the largest rank, and ranks are counted across all of them. Adapter k has the
        ranks from ``starts[2 k]`` to ``starts[2 k + 1]``. ``scale`` has a zero after each adapter's scale.
        """
        raise AssertionError(f"{type(self).__name__} has no apply_kernel()")
