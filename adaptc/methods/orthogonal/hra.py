"""HRA: W' = W H_1 H_2 ... H_r, reflections H_i = I - 2 u_i u_i^T / |u_i|^2 (Yuan et al., arXiv 2405.17484).

Slot, in PEFT's shape: ``hra_u`` (n, r). The product of reflections is computed as I - U T U^T, with T triangular
(Schreiber and Van Loan, 1989); no code depends on the rank. A column of zeros stands for the identity. With
``apply_GS`` the vectors are made orthogonal first. The product is then I - 2 P, with P the projection on their span.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import AdaptcWarning, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_bias, check_integers
from adaptc.methods.orthogonal.rotation import Rotation, solve_unchecked, to_solver_dtype
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Slot, Slots
from adaptc.passes.protocol.parts.size_rule import SizeRule


@dataclass
class HRAConfig(TargetedConfig):
    """PEFT's ``HRAConfig``: same names, same defaults.

    Attributes:
        r: the number of reflections.
        apply_GS: whether the vectors of the reflections are made orthogonal.

    Example:
        >>> config = adaptc.HRAConfig(r=8, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "HRA"

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r})
        check_bias(self, "hra_only")

    def method(self, name: str, kind: str) -> Hra:
        return Hra(self.r, self.apply_GS, self.init_weights)


class HraSizes(SizeRule):
    method: Hra

    def minimal(self, op: Op) -> Hra:
        return dataclasses.replace(self.method, r=2)


@dataclass(frozen=True)
class Hra(Rotation):
    """HRA at one site."""

    name: ClassVar[str] = "hra"
    sizes = HraSizes(rank_axes={"hra_u": 1})

    r: int = 8
    orthogonal: bool = False
    scheme: bool = True

    def slots(self, op: Op) -> dict[str, Slot]:
        n = self.rotation_size(op)
        if self.orthogonal and self.r > max(n, 2):  # identity values have two columns
            raise TargetError(
                f"HRA with apply_GS=True makes r={self.r} vectors orthogonal, and here they have {n} entries; "
                f"r={n} or less fits"
            )
        return {"hra_u": Slot((n, self.r), free=(1,))}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        pairs = self.scheme and self.r % 2 == 0 and not self.orthogonal
        if self.scheme and not pairs:
            # Equal vectors cannot be made orthogonal: PEFT makes pairs with apply_GS too, and gets rounding noise.
            why = "apply_GS=True, which leaves no two equal" if self.orthogonal else f"the odd r={self.r}"
            warnings.warn(
                f"HRA starts from the unchanged layer by reflecting twice at each vector, which {why} does not allow: "
                "this adapter changes the layer from the start",
                AdaptcWarning,
                stacklevel=2,
            )
        u = torch.empty(self.rotation_size(op), self.r // 2 if pairs else self.r)
        torch.nn.init.kaiming_uniform_(u, a=math.sqrt(5), generator=generator)
        return InitialValues({"hra_u": (u.repeat_interleave(2, 1) if pairs else u).to(dtype)})

    def rotate(self, op: Op, v: Tensor, slots: Slots, transpose: bool = False) -> Tensor:
        U, V = self._factors(to_solver_dtype(slots["hra_u"]))
        U, V = cast(U, v.dtype), cast(V, v.dtype)
        return v - (v @ V) @ U.mT if transpose else v - (v @ U) @ V.mT

    def _factors(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return U and V, both (n, r), with H_1 ... H_r = I - V U^T."""
        squares = (u * u).sum(0)
        used = squares > 0
        U = u * torch.where(used, squares, 1).rsqrt()
        gram = U.mT @ U
        if self.orthogonal:
            # Without the addition on the diagonal, vectors that are zero or depend on others would make this singular.
            ridge = torch.where(used, 4 * torch.finfo(u.dtype).eps, 1.0).to(u.dtype)
            return U, 2 * solve_unchecked(gram + torch.diag_embed(ridge), U, left=False)
        # T^-1 is the part of U^T U above the diagonal, and one half on it. Nothing reads the diagonal. Its addition
        # brings the matmul back to the dtype of U, where autocast computed it in another.
        inverse = 2 * gram + torch.diag_embed(squares)
        return U, 2 * torch.linalg.solve_triangular(inverse, U, upper=True, left=False, unitriangular=True)
