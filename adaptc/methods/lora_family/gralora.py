"""GraLoRA: LoRA for each block of a k by k grid of the weight (Jung et al., arXiv 2505.20355).

    W'[j, n] = W[j, n] + s B[j, n]^T A[n, j]^T          s = alpha / (r + hybrid_r)
    W'       = W' + s B_general A_general               with hybrid_r > 0, plain LoRA beside the blocks

W is the weight as a matrix: kernels in its columns, embeddings (width, vocabulary). Its block W[j, n] makes the j-th
part of the outputs from the n-th part of the inputs, and changes by rank r / k.

Slots: ``gralora_A`` (k, in/k, k, r/k) with the axes n, inputs, j and ranks. ``gralora_B`` (k, k, r/k, out/k) has the
axes j, n, ranks and outputs. In PEFT's files the axes of sizes k and r/k are one of r. With ``hybrid_r`` there are
``gralora_A_general.weight`` (hybrid_r, in) and ``gralora_B_general.weight`` (out, hybrid_r).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import (
    check_integers,
    check_matrix,
    check_probability,
    prepare_adapter_input,
)
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.size_rule import SizeRule

A, B = "gralora_A", "gralora_B"
A_GENERAL, B_GENERAL = "gralora_A_general.weight", "gralora_B_general.weight"


@dataclass
class GraloraConfig(TargetedConfig):
    """PEFT's ``GraloraConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        r: the rank of a row or column of blocks, a multiple of ``gralora_k``. Each block has the rank r / gralora_k.
        hybrid_r: the rank of the plain LoRA beside the blocks; 0 for none.
        alpha: the numerator of the scale.
        gralora_dropout: the dropout probability of the adapter's input.
        gralora_k: the number of blocks along the inputs, and along the outputs.

    Example:
        >>> config = adaptc.GraloraConfig(r=16, gralora_k=4, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "GRALORA"
    dropout_field: ClassVar[str] = "gralora_dropout"

    r: int = 32
    hybrid_r: int = 0
    alpha: int | float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r, "gralora_k": self.gralora_k})
        check_integers(self, {"hybrid_r": self.hybrid_r}, 0)
        check_probability(self, "gralora_dropout")
        r, k = self.r, self.gralora_k
        if r % k:
            raise ConfigError(
                f"GraloraConfig.r must be a multiple of gralora_k, since each block has the rank r / gralora_k; got "
                f"r={r} and gralora_k={k}. r={-(-r // k) * k} fits"
            )

    def method(self, name: str, kind: str) -> Gralora:
        return Gralora(
            self.r,
            self.hybrid_r > 0,
            self.hybrid_r,
            self.gralora_k,
            self.alpha,
            self.gralora_dropout,
            scheme=self.init_weights,
        )


class GraloraFiles(FileFormat):
    method: Gralora

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        k, values = self.method.k, dict(found)
        for name, axis in ((A, 2), (B, 1)):
            if name not in values:
                continue
            t = values[name]
            if t.ndim != 3 or t.shape[axis] % k:
                raise CheckpointError(
                    f"{name!r} has shape {tuple(t.shape)}; expected three axes, with a multiple of gralora_k={k} ranks "
                    f"along axis {axis}"
                )
            values[name] = t.unflatten(axis, (k, -1))
        return values

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        first_axes = {A: 2, B: 1}
        return {n: t.flatten(first_axes[n], first_axes[n] + 1) if n in first_axes else t for n, t in slots.items()}


class GraloraSizes(SizeRule):
    method: Gralora

    def with_rank(self, op: Op, rank: int) -> Gralora:
        k = self.method.k
        return dataclasses.replace(self.method, r=-(-rank // k) * k)

    def minimal(self, op: Op) -> Gralora:
        return dataclasses.replace(self.method, r=2 * self.method.k, hybrid_r=2 if self.method.hybrid else 0)

    def with_sizes_of(self, op: Op, slots: Slots) -> Gralora:
        sizes = {}
        if A in slots and slots[A].ndim in (3, 4):
            sizes["r"] = math.prod(slots[A].shape[2:])
        if A_GENERAL in slots and slots[A_GENERAL].ndim == 2:
            sizes["hybrid_r"] = slots[A_GENERAL].shape[0]
        return dataclasses.replace(self.method, **sizes)


@dataclass(frozen=True)
class Gralora(Method):
    """GraLoRA at one site. ``hybrid``: whether there is a plain LoRA of rank ``hybrid_r`` beside the blocks.

    ``scheme`` False: B is random at first, too.

    ``dropout`` acts on the input of the blocks, and once more on that of the plain LoRA, in training only.
    """

    name: ClassVar[str] = "gralora"
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"hybrid_r"}
    files = GraloraFiles(names=(A, B, A_GENERAL, B_GENERAL))
    sizes = GraloraSizes()

    r: int = 32
    hybrid: bool = False
    hybrid_r: int = 0
    k: int = 2
    alpha: float = 64
    dropout: float = 0.0
    scheme: bool = True
    training: bool = False

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("GraLoRA", op)
        (rows, columns), k = op.matrix_shape, self.k
        if rows % k or columns % k:
            common = math.gcd(rows, columns)
            valid = [n for n in range(1, common + 1) if common % n == 0]
            raise TargetError(
                f"GraLoRA cuts the weight ({rows}, {columns}) into gralora_k={k} parts along both axes, and {k} does "
                f"not divide both; gralora_k may be {', '.join(map(str, valid))}"
            )
        slots = {
            A: Slot((k, columns // k, k, self.r // k), free=(3,)),
            B: Slot((k, k, self.r // k, rows // k), free=(2,)),
        }
        if self.hybrid:
            slots[A_GENERAL] = Slot((self.hybrid_r, columns), free=(0,), apart=("hybrid_r",), fills_up=True)
            slots[B_GENERAL] = Slot((rows, self.hybrid_r), free=(1,), apart=("hybrid_r",), fills_up=True)
        return slots

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        (rows, columns), k = op.matrix_shape, self.k
        source = torch.device("cpu") if generator is None else generator.device

        def draw(*shape: int) -> Tensor:
            t = torch.empty(shape, dtype=torch.get_default_dtype(), device=source)
            return torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)

        def draw_up(*shape: int) -> Tensor:
            return torch.zeros(shape, device=source) if self.scheme else draw(*shape)

        # PEFT draws the two factors of one block after the other.
        pairs = [(draw(self.r, columns // k), draw_up(rows // k, self.r)) for _ in range(k)]
        values = {A: torch.stack([a.t() for a, _ in pairs]), B: torch.stack([b.t() for _, b in pairs])}
        if self.hybrid:
            # PEFT makes layers, which draw values, and then draws again: without this, one seed would give other ones.
            down, up = (self.hybrid_r, columns), (rows, self.hybrid_r)
            draw(*down)
            draw(*up)
            values |= {A_GENERAL: draw(*down), B_GENERAL: draw_up(*up)}
        return InitialValues({n: t.to(W.device, dtype) for n, t in self.files.read(op, values).items()})

    def scale(self, op: Op) -> float:
        return self.alpha / (self.r + (self.hybrid_r if self.hybrid else 0))

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        delta = torch.einsum("nijs,jnso->joni", slots[A], slots[B]).reshape(op.matrix_shape)
        if self.hybrid:
            delta = delta + slots[B_GENERAL] @ slots[A_GENERAL]
        return cast(W + op.unmatrix(delta) * scale, W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        a = slots[A]
        read = prepare_adapter_input(self, op, x, a.dtype)
        if op.kind in ("linear", "addmm"):  # a k-th of the work that factors with zeros off the blocks take
            h = torch.einsum("...ni,nijs->...njs", read.unflatten(-1, (self.k, -1)), a)
            delta = torch.einsum("...njs,jnso->...jo", h, slots[B]).flatten(-2)
        else:
            delta = op.low_rank(read, *_as_matrices(a, slots[B]))
        if self.hybrid:
            read = prepare_adapter_input(self, op, x, a.dtype)
            delta = delta + op.low_rank(read, slots[A_GENERAL], slots[B_GENERAL])
        return cast(y + delta * scale, y.dtype)


def _as_matrices(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return a down projection (k r, in) and an up projection (out, k r) of the same change, with zeros off blocks."""
    columns = a.shape[0] * a.shape[1]
    down = torch.diag_embed(a.flatten(2).permute(2, 1, 0), dim1=0, dim2=2).reshape(-1, columns)
    up = torch.diag_embed(b.permute(3, 1, 2, 0), dim1=0, dim2=3)
    return down, up.flatten(2).flatten(0, 1)
