"""Define the base class of methods that rotate the inputs of a layer: x' = x R, or W' = W R^T on the weight's rows.

A subclass defines how rows are rotated. At a layer that reads each input channel at one place only, the input is
rotated, which costs the rotation alone. At an embedding the looked-up vectors are rotated. All other layers get the
rotated weight. Rotations for half-precision tensors are made in float32, since torch has no linear solver below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.methods._shared.option_checks import check_matrix
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import Method, Scale, Slots

#: the most terms of the Cayley-Neumann series, which has converged long before
MAX_TERMS = 256


@dataclass(frozen=True)
class Rotation(Method):
    """A method defined by its rotation, :meth:`rotate`.

    It takes rows v (..., n) and gives v R, or v R^T with ``transpose``; n is ``width(op)``.
    """

    takes_complex: ClassVar[bool] = False

    def rotation_size(self, op: Op) -> int:
        """Return the length of the rotated vectors: an embedding's width, else the weight's columns as a matrix."""
        check_matrix(self.name.upper(), op)
        return op.out_features if op.kind == "embedding" else op.matrix_shape[1]

    def drops_input(self) -> bool:
        return False  # dropout acts on blocks of the rotation, in the form on the weight as in that around the layer

    def rotate(self, op: Op, v: Tensor, slots: Slots, transpose: bool = False) -> Tensor:
        raise AssertionError(f"{type(self).__name__} must define turn()")

    def can_rotate_input(self, op: Op) -> bool:
        """Return whether rotating the input equals rotating the rows of the weight."""
        return op.is_pointwise

    def has_input(self, op: Op) -> bool:
        return op.callable and self.can_rotate_input(op)

    def has_apply(self, op: Op) -> bool:
        return op.kind == "embedding"

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        dtype = torch.promote_types(W.dtype, _slot_dtype(slots))
        if op.kind == "embedding":
            return cast(self.rotate(op, cast(W.t(), dtype), slots).t(), W.dtype)
        turned = self.rotate(op, cast(W.flatten(1), dtype), slots, transpose=True)
        return cast(turned.reshape(W.shape), W.dtype)

    def input(self, op: Op, x: Tensor, slots: Slots, scale: Scale) -> Tensor:
        v = cast(x, torch.promote_types(x.dtype, _slot_dtype(slots)))
        if op.is_conv:
            channels = -1 - len(op.kernel)
            return cast(self.rotate(op, v.movedim(channels, -1), slots).movedim(-1, channels), x.dtype)
        return cast(self.rotate(op, v, slots), x.dtype)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        if op.kind != "embedding":
            return y
        return cast(self.rotate(op, cast(y, torch.promote_types(y.dtype, _slot_dtype(slots))), slots), y.dtype)


def _slot_dtype(slots: Slots) -> torch.dtype:
    return next(iter(slots.values())).dtype


def to_solver_dtype(t: Tensor) -> Tensor:
    """Return ``t`` in a dtype that torch has solvers for: float32, or float64 as it is."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def cayley_transform(K: Tensor) -> Tensor:
    """Return the rotations (I - K)(I + K)^-1 of skew-symmetric matrices ``K`` (..., b, b)."""
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    return solve_unchecked(eye + K, eye - K, left=False)


def solve_unchecked(A: Tensor, B: Tensor, left: bool = True) -> Tensor:
    """Return X with A X = B, or X A = B for ``left=False``; ``A`` must not be singular.

    The check for singular matrices is left out, since it would wait for the GPU.
    """
    return torch.linalg.solve_ex(A, B, left=left).result


def skew_symmetric(rows: Tensor, b: int) -> Tensor:
    """Return the skew-symmetric matrices (k, b, b) with the upper triangles ``rows`` (k, b(b-1)/2)."""
    if b == 1:
        return rows.sum(1).reshape(-1, 1, 1)
    # The index, in the row of the slot, of each entry of the matrix.
    at = torch.arange(b, device=rows.device)
    i, j = at.unsqueeze(1), at
    low = torch.minimum(i, j)
    where = (low * (2 * b - 1 - low) // 2 + torch.maximum(i, j) - low - 1).clamp(min=0)
    return rows[:, where.flatten()].reshape(-1, b, b) * (j - i).sign()


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """Return I + 2Q + 2Q^2 + ... + Q^(terms - 1), the last power without the factor 2.

    ``terms`` of 3 gives the same sum as 4, as in PEFT.
    """
    R = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) + 2 * Q
    if terms == 2:
        return R
    power = Q @ Q
    R = R + 2 * power
    for _ in range(terms - 4):
        power = power @ Q
        R = R + 2 * power
    return R + power @ Q


def multiply_blocks(v: Tensor, R: Tensor) -> Tensor:
    """Return rows ``v`` (..., k b) times the block-diagonal matrix of the blocks ``R`` (k, b, b)."""
    k, b, _ = R.shape
    return torch.bmm(v.reshape(-1, k, b).transpose(0, 1), R).transpose(0, 1).reshape(v.shape)


def drop_to_identity(R: Tensor, p: float) -> Tensor:
    """Return matrices ``R`` (..., b, b), each replaced by the identity with probability ``p``."""
    kept = torch.nn.functional.dropout(torch.ones_like(R[..., :1, :1]), p, training=True).sign()
    return kept * R + (1 - kept) * torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)


@cache
def divisors(n: int) -> tuple[int, ...]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))
