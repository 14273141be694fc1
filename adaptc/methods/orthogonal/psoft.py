"""PSOFT: W' = W + B (R - I) A, B A the largest singular terms of W (https://openreview.net/forum?id=FSHrinMArK).

There are r of these terms, and R rotates and scales them:
R = diag(b) (I + Q)(I - Q)^-1 diag(a) with Q skew-symmetric. Slots, in PEFT's shapes: ``psoft_R.weight`` (r(r-1)/2,) is
the upper triangle of Q, or without ``psoft_orth`` R itself, (r, r). ``psoft_R.vector_a`` and ``psoft_R.vector_b`` (r,)
are a and b. A (r, in) and B (out, r) are frozen and in no file: they are made of the weight when an adapter is bound.
A file therefore means something only together with the weight that it was trained on.

PEFT divides B A by the scale psoft_alpha / r and multiplies the change with it, so that the scale cancels. PEFT adapts
linear layers alone; here W is any weight as a matrix, kernels in its columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adaptc.errors import ConfigError, TargetError
from adaptc.global_generator import seeded_global_generator
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import (
    applies_dropout,
    check_integers,
    check_matrix,
    check_probability,
    prepare_adapter_input,
    warn_unused,
)
from adaptc.methods.orthogonal.rotation import (
    MAX_TERMS,
    cayley_neumann,
    cayley_transform,
    skew_symmetric,
    to_solver_dtype,
)
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.torch_modes import outside_modes
from adaptc.torch_typing import reduced_svd, vector_norm

WEIGHT, VECTOR_A, VECTOR_B = "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"
#: the slots of the frozen factors
A, B = "psoft_A", "psoft_B"


@dataclass
class PsoftConfig(TargetedConfig):
    """PEFT's ``PsoftConfig``: same names, same defaults. ``fan_in_fan_out`` follows from the layer.

    Raises ConfigError for values without a meaning.

    Attributes:
        r: the number of singular terms of the weight that are rotated.
        psoft_alpha: has no effect, in PEFT neither: the frozen factors are divided by psoft_alpha / r.
        psoft_dropout: the dropout probability of the adapter's input.
        ab_svd_init: "psoft_init" makes A orthogonal, "pissa_init" shares the singular values between A and B.
        psoft_svd: "full" or "lowrank", which is quicker and less exact.
        psoft_svd_lowrank_niter: the number of iterations of "lowrank".
        random_seed: the seed of "lowrank".
        psoft_orth: whether R without its vectors is a rotation; False for any matrix.
        psoft_mag_b: whether R has the vector b.
        psoft_mag_a: whether R has the vector a.
        use_cayley_neumann: whether the inverse in the rotation is a Neumann series.
        num_cayley_neumann_terms: the number of terms of the series.
        cayley_neumann_eps: the largest norm of Q with the series; None for no limit.

    Example:
        >>> config = adaptc.PsoftConfig(r=64, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "PSOFT"
    dropout_field: ClassVar[str] = "psoft_dropout"

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r, "psoft_alpha": self.psoft_alpha})
        check_integers(self, {"psoft_svd_lowrank_niter": self.psoft_svd_lowrank_niter}, minimum=0)
        check_probability(self, "psoft_dropout")
        warn_unused(self, ["psoft_alpha"], "since the frozen factors are divided by psoft_alpha / r, as in PEFT")
        if self.psoft_svd != "lowrank":
            warn_unused(self, ["psoft_svd_lowrank_niter", "random_seed"], "without psoft_svd='lowrank'")
        series = ["num_cayley_neumann_terms", "cayley_neumann_eps"]
        if not self.psoft_orth:
            warn_unused(self, ["use_cayley_neumann", *series], "without psoft_orth")
        elif not self.use_cayley_neumann:
            warn_unused(self, series, "without use_cayley_neumann")
        else:
            self._check_series()

    def _check_series(self) -> None:
        if not 2 <= self.num_cayley_neumann_terms <= MAX_TERMS:
            raise ConfigError(
                "PsoftConfig.num_cayley_neumann_terms must be 2 or more, or the rotation would always be the identity, "
                f"and at most {MAX_TERMS}, since each is a product in the program; got {self.num_cayley_neumann_terms}."
                " use_cayley_neumann=False is the sum of all terms."
            )
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ConfigError(
                f"PsoftConfig.cayley_neumann_eps must lie between 0 and 1, or be None, got {self.cayley_neumann_eps!r}"
            )

    def method(self, name: str, kind: str) -> Psoft:
        series = self.psoft_orth and self.use_cayley_neumann
        return Psoft(
            r=self.r,
            orthogonal=self.psoft_orth,
            has_a=self.psoft_mag_a,
            has_b=self.psoft_mag_b,
            terms=self.num_cayley_neumann_terms if series else 0,
            radius=(self.cayley_neumann_eps or 0.0) if series else 0.0,
            symmetric=self.ab_svd_init == "pissa_init",
            niter=self.psoft_svd_lowrank_niter if self.psoft_svd == "lowrank" else -1,
            seed=self.random_seed,
            dropout=self.psoft_dropout,
            scheme=self.init_weights,
        )


class PsoftFiles(FileFormat):
    method: Psoft

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return {**self.method.identity(op, W, dtype), **self.method.frozen_factors(op, W, dtype)}


@dataclass(frozen=True)
class Psoft(Method):
    """PSOFT at one site. The rank is part of the structure, since the length of the triangle is no multiple of it.

    ``terms`` 0: the exact Cayley transform. ``radius`` 0: no limit. ``symmetric``: whether A and B share the singular
    values. ``niter`` -1: the full SVD. ``dropout`` acts on the input of the adapter, in training only.
    """

    name: ClassVar[str] = "psoft"
    takes_complex: ClassVar[bool] = False
    swappable: ClassVar[frozenset[str]] = (Method.swappable - {"r"}) | {"symmetric", "niter", "seed"}
    files = PsoftFiles(names=(WEIGHT, VECTOR_A, VECTOR_B))

    r: int = 32
    orthogonal: bool = True
    has_a: bool = True
    has_b: bool = True
    terms: int = 0
    radius: float = 0.0
    symmetric: bool = False
    niter: int = -1
    seed: int = 0
    dropout: float = 0.0
    scheme: bool = True
    training: bool = False

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("PSOFT", op)
        (rows, columns), r = op.matrix_shape, self.r
        if r > min(rows, columns):
            raise TargetError(
                f"PSOFT rotates r singular terms of a weight, and r={r} is more than a matrix of shape "
                f"{(rows, columns)} has; r={min(rows, columns)} is the most that fits"
            )
        vectors = [VECTOR_A] * self.has_a + [VECTOR_B] * self.has_b
        return {
            WEIGHT: Slot((r * (r - 1) // 2,) if self.orthogonal else (r, r)),
            **{name: Slot((r,), fill=1.0) for name in vectors},
            A: Slot((r, columns), trainable=False, saved=False),
            B: Slot((rows, r), trainable=False, saved=False),
        }

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return R = I between factors of zeros, which need no SVD of the weight."""
        values = self.filled(op, W, dtype)
        return values if self.orthogonal else {**values, WEIGHT: torch.eye(self.r, dtype=dtype, device=W.device)}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        values = self.files.derived(op, W, dtype, {})
        if not self.scheme:
            source = torch.device("cpu") if generator is None else generator.device
            # In the dtype of the weight, as in PEFT: another dtype draws other numbers.
            noise = torch.empty(values[WEIGHT].shape, dtype=W.dtype, device=source)
            # The last bits differ between normal numbers of a standard deviation and multiples of standard ones.
            if self.orthogonal:
                noise.normal_(0.0, 0.1, generator=generator)
            else:
                noise = noise.normal_(generator=generator) * 0.1
            values[WEIGHT] = values[WEIGHT] + noise.to(W.device, dtype)
        return InitialValues(values)

    @torch.no_grad()
    def frozen_factors(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return A (r, columns) and B (rows, r) of the weight, for the scale 1."""
        self.slots(op)  # it says which rank fits
        M = op.matrix(W).detach().float()  # as in PEFT, and for a float64 copy of a model the same factors
        if not bool(torch.isfinite(M).all()):
            raise ConfigError(f"PSOFT decomposes the weight, and this one of shape {op.shape} is not finite")
        with outside_modes():
            if self.niter < 0:
                U, S, V = reduced_svd(M)
            else:
                with seeded_global_generator(self.seed, M.device):  # which svd_lowrank reads
                    U, S, V = torch.svd_lowrank(M, q=self.r, niter=self.niter)
                V = V.T
        U, S, V = U[:, : self.r], S[: self.r], V[: self.r]
        left, right = (S.sqrt(), S.sqrt().unsqueeze(-1)) if self.symmetric else (S, torch.ones_like(S).unsqueeze(-1))
        return {A: (right * V).to(dtype).contiguous(), B: (U * left).to(dtype).contiguous()}

    def scale(self, op: Op) -> float:
        return 1.0

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        delta = self._up(slots) @ slots[A]
        return cast(W + op.unmatrix(delta) * scale, W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and (op.groups == 1 or applies_dropout(self, op))

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        x = prepare_adapter_input(self, op, x, slots[A].dtype)
        if op.groups > 1:
            return cast(y + op(x, op.unmatrix(self._up(slots) @ slots[A])) * scale, y.dtype)
        return cast(y + op.low_rank(x, slots[A], self._up(slots)) * scale, y.dtype)

    def _up(self, slots: Slots) -> Tensor:
        """Return B (R - I), (rows, r)."""
        R = self._rotation(slots)
        change = R - torch.eye(self.r, dtype=R.dtype, device=R.device)
        return slots[B] @ cast(change, slots[B].dtype)

    def _rotation(self, slots: Slots) -> Tensor:
        """Return R (r, r), in a dtype that torch has solvers for."""
        R = to_solver_dtype(slots[WEIGHT])
        if self.orthogonal:
            Q = self._within_radius(skew_symmetric(R.unsqueeze(0), self.r).squeeze(0))
            R = cayley_neumann(Q, self.terms) if self.terms else cayley_transform(-Q)
        if self.has_b:
            R = cast(slots[VECTOR_B], R.dtype).unsqueeze(-1) * R
        return R * cast(slots[VECTOR_A], R.dtype) if self.has_a else R

    def _within_radius(self, Q: Tensor) -> Tensor:
        if not self.radius:
            return Q
        norm = vector_norm(Q)
        return torch.where(norm > self.radius, Q * (self.radius / (norm + 1e-12)), Q)
