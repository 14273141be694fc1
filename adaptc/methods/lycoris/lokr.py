"""LoKr: W' = W + (alpha / r) kron(W1, W2) (Yeh et al., arXiv 2309.14859; Edalati et al., arXiv 2212.10650).

The output and input sizes are split as out = l k and in = m n (of one group). Slots, in PEFT's shapes:

- W1: ``lokr_w1`` (l, m), or with ``decompose_both`` and a rank below half of max(l, m) ``lokr_w1_a`` (l, r) and
  ``lokr_w1_b`` (r, m).
- W2: ``lokr_w2`` (k, n[, *kernel]), or with a rank below half of max(k, n) ``lokr_w2_a`` (k, r) and ``lokr_w2_b``
  (r, n[*kernel]).
- A factorised W2 with ``use_effective_conv2d`` and a kernel of more than one position: ``lokr_t2`` (r, r, *kernel),
  ``lokr_w2_a`` (r, k) and ``lokr_w2_b`` (r, n). A one-dimensional kernel has 1 as a second size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isqrt, prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import ConfigError, short_repr
from adaptc.methods.lycoris.lycoris_config import (
    Lycoris,
    LycorisConfig,
    apply_kernel_factor,
    detach_padding_row,
    fill_kaiming_uniform,
    fill_zeros,
    supports_row_lookup,
)
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Scale, Slot, Slots
from adaptc.passes.protocol.parts.size_rule import SizeRule


@dataclass
class LoKrConfig(LycorisConfig):
    """PEFT's ``LoKrConfig``: same names, same defaults. Raises ConfigError for illegal values.

    Attributes:
        decompose_both: whether the first factor of the product is decomposed, too.
        decompose_factor: the size of the first factor; -1 for the most even split.
        rank_dropout_scale: whether the rows that ``rank_dropout`` leaves are scaled up.

    Example:
        >>> config = adaptc.LoKrConfig(r=8, alpha=8, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "LOKR"
    schemes: ClassVar[tuple[Any, ...]] = (True, False, "lycoris")

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.decompose_factor
        if factor < 1 and factor != -1:
            raise ConfigError(
                f"LoKrConfig.decompose_factor must be a positive integer, or -1 for factors close to each other; "
                f"got {factor!r}"
            )

    @classmethod
    def options_from_tensors(
        cls, modules: Sequence[Mapping[str, Tensor]], shapes: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        # Each size is split by the factor alone, so the factor is -1 or the first part of a split: the first value that
        # gives all splits is taken.
        splits: list[tuple[int, int]] = []
        for m, shape in zip(modules, shapes, strict=True):
            (l, n1), (k, n2) = _factor_sizes(m, "lokr_w1"), _factor_sizes(m, "lokr_w2", prod(shape[2:]))  # noqa: E741  # the paper's
            splits += [(l, k), (n1, n2)]
        known = (
            f for f in (-1, *sorted({a for a, _ in splits})) if all(split_size(a * b, f) == (a, b) for a, b in splits)
        )
        factor = next(known, None)
        if factor is None:
            raise ConfigError(
                f"no decompose_factor splits the layers as this LoKr has them: {short_repr(sorted(set(splits))[:3])}; "
                f"compile "
                "for its layers one group at a time"
            )
        both = any("lokr_w1_a" in m for m in modules)
        return {**super().options_from_tensors(modules, shapes), "decompose_factor": factor, "decompose_both": both}

    def method(self, name: str, kind: str) -> LoKr:
        return LoKr(
            **self.method_options(name),
            decompose_both=self.decompose_both,
            factor=self.decompose_factor,
            centred=self.rank_dropout_scale,
        )


class LoKrSizes(SizeRule):
    method: LoKr

    def specialized_for(self, op: Op) -> LoKr:
        if self.method.whole is not None or len(op.shape) < 2:
            return self.method
        (l, k), (m, n) = self.method.split_sizes(op)  # noqa: E741  # the paper's names
        return dataclasses.replace(
            self.method,
            whole=(not self.method.decompose_both or 2 * self.method.r >= max(l, m), 2 * self.method.r >= max(k, n)),
        )

    def minimal(self, op: Op) -> LoKr:
        return dataclasses.replace(self.specialized_for(op), r=2)


@dataclass(frozen=True)
class LoKr(Lycoris):
    """LoKr at one site, of any kind with a weight of two axes or more.

    ``whole``: whether W1, and whether W2, is one tensor. None: :meth:`LoKrSizes.specialized_for` decides by the rank
    and the site's sizes.
    """

    name: ClassVar[str] = "lokr"
    swappable: ClassVar[frozenset[str]] = Lycoris.swappable | {"centred"}
    sizes = LoKrSizes(rank_axes={"lokr_w2_b": 0, "lokr_w1_b": 0})

    decompose_both: bool = False
    factor: int = -1
    centred: bool = False
    whole: tuple[bool, bool] | None = None

    def split_sizes(self, op: Op) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return ((l, k), (m, n)), the splits of the weight's first two sizes."""
        return split_size(op.shape[0], self.factor), split_size(op.shape[1], self.factor)

    def slots(self, op: Op) -> dict[str, Slot]:
        self.check_site(op)
        (l, k), (m, n) = self.split_sizes(op)  # noqa: E741
        r = self.r
        first, second = self.sizes.specialized_for(op).whole or (True, True)
        slots: dict[str, Slot] = {}
        if first:
            slots["lokr_w1"] = Slot((l, m))
        else:
            slots |= {"lokr_w1_a": Slot((l, r), free=(1,)), "lokr_w1_b": Slot((r, m), free=(0,))}
        if second:
            slots["lokr_w2"] = Slot((k, n, *op.kernel))
        elif self.has_factored_kernel(op):
            slots["lokr_w2_a"] = Slot((r, k), free=(0,))
            slots["lokr_w2_b"] = Slot((r, n), free=(0,))
            slots["lokr_t2"] = Slot((r, r, *self.kernel_shape(op)), free=(0, 1))
        else:
            slots["lokr_w2_a"] = Slot((k, r), free=(1,))
            slots["lokr_w2_b"] = Slot((r, n * prod(op.kernel)), free=(0,))
        return slots

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        has, names = (
            self.slots(op),
            ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
        zero = () if self.scheme is False else ("lokr_w1", "lokr_w1_a")
        if self.scheme == "lycoris":
            zero = ("lokr_w2", "lokr_w2_b")
        how = {n: fill_zeros if n in zero else fill_kaiming_uniform for n in names if n in has}
        return self.draw_initial(op, how, W, dtype, generator)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        first, (b, a) = self._left_factor(slots), self._right_factor(op, slots)
        (_, k), (_, n) = self.split_sizes(op)
        second = (b if a is None else a @ b.flatten(1)).reshape(k, n, *op.kernel)
        if not self._is_misaligned(op):
            first = first.reshape(*first.shape, *(1 for _ in op.kernel))
        delta = torch.kron(first, second).reshape(op.shape) * scale
        rows = self.dropout_factors(op, delta, self.centred)
        if rows is not None:
            delta = delta * rows.reshape(-1, *(1 for _ in op.shape[1:]))
        return cast(W + delta, W.dtype)

    def has_apply(self, op: Op) -> bool:
        if op.is_conv:
            return op.groups == 1 and not self._is_misaligned(op)
        return op.kind in ("linear", "addmm") or supports_row_lookup(op)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        first, (down, up) = self._left_factor(slots), self._right_factor(op, slots)
        x = op.cast_input(x, first.dtype)
        if op.kind == "embedding":
            delta = detach_padding_row(op, x, self._embedding_delta(op, x, first, down, up))
        elif op.is_conv:
            delta = self._conv_delta(op, x, first, down, up)
        else:
            _, (m, n) = self.split_sizes(op)
            delta = _project_up(F.linear(x.unflatten(-1, (m, n)), down), up)
            delta = F.linear(delta.transpose(-1, -2), first).transpose(-1, -2).flatten(-2)
        rows = self.dropout_factors(op, delta, self.centred)
        if rows is not None:
            delta = delta * op.along_out(rows, delta)
        return cast(y + delta * scale, y.dtype)

    def _embedding_delta(self, op: Op, x: Tensor, first: Tensor, down: Tensor, up: Tensor | None) -> Tensor:
        """Return the delta's vectors for the token indices ``x``: (*x.shape, width).

        Column v of a Kronecker product is the product of column v // n of one factor and column v % n of the other.
        """
        _, (_, n) = self.split_sizes(op)
        left, right = F.embedding(x // n, first.t()), _project_up(F.embedding(x % n, down.t()), up)
        return (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)

    def _conv_delta(self, op: Op, x: Tensor, first: Tensor, down: Tensor, up: Tensor | None) -> Tensor:
        """Return the delta's output of a convolution: the second factor acts on each of m parts of the channels.

        The first factor then mixes the parts.
        """
        _, (m, n) = self.split_sizes(op)
        axis = x.ndim - len(op.kernel) - 1  # 0 without a batch
        parts = x.unflatten(axis, (m, n)).flatten(0, axis)
        h = _project_up(op(parts, down).movedim(1, -1), up).unflatten(0, (-1, m)).movedim(1, -1)
        mixed = F.linear(h, first).transpose(-1, -2).flatten(-2).movedim(-1, 1)
        return mixed if axis else mixed.squeeze(0)

    def _is_misaligned(self, op: Op) -> bool:
        """Return whether the site has PEFT's misaligned Kronecker product: a Conv1d with W2 in one tensor.

        PEFT then multiplies l with n, and m with the kernel axis. Adapters are trained with that product, so it is what
        their tensors mean.
        """
        return op.kind == "conv1d" and (self.sizes.specialized_for(op).whole or (True, True))[1]

    def _left_factor(self, slots: Slots) -> Tensor:
        return slots["lokr_w1"] if "lokr_w1" in slots else slots["lokr_w1_a"] @ slots["lokr_w1_b"]

    def _right_factor(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor | None]:
        """Return (B, A) of W2 = A B, with B (r, n[, *kernel]) and A (k, r); or (W2, None) where W2 is one tensor."""
        if "lokr_w2" in slots:
            return slots["lokr_w2"], None
        _, (_, n) = self.split_sizes(op)
        a, b = slots["lokr_w2_a"], slots["lokr_w2_b"]
        if self.has_factored_kernel(op):
            a, b = a.t(), apply_kernel_factor(slots["lokr_t2"], b)
        return b.reshape(-1, n, *op.kernel), a


def _factor_sizes(tensors: Mapping[str, Tensor], name: str, positions: int = 1) -> tuple[int, int]:
    """Return (rows, columns) of W1 or W2, read off its ``tensors``. ``positions``: the number of kernel positions."""
    if name in tensors:
        return tuple(tensors[name].shape[:2])  # type: ignore[return-value]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if "lokr_t2" in tensors and name == "lokr_w2":
        return a.shape[1], b.shape[1]
    return a.shape[0], b.shape[1] // positions


def _project_up(h: Tensor, a: Tensor | None) -> Tensor:
    return h if a is None else F.linear(h, a)


@cache
def split_size(size: int, factor: int = -1) -> tuple[int, int]:
    """Return two factors of ``size``: ``factor`` and the quotient where ``factor`` divides it.

    Otherwise they are the two divisors closest to each other, smaller first, the smaller at most ``factor`` (-1: any).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = isqrt(size) if factor < 0 else min(isqrt(size), factor)
    small = next(d for d in range(limit, 0, -1) if size % d == 0)
    return small, size // small
