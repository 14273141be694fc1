"""RandLoRA: W' = W + s B (l * A * g), a sum of n = ceil(min(out, in) / r) bases (Albert et al., 2502.00987).

Slots, in PEFT's shapes, with S and L the smaller and the larger size of the weight: each site has ``randlora_lambda``
(r, n) and ``randlora_gamma`` (n, S). All sites share the frozen ``randlora_A`` (r, 1, S) and ``randlora_B`` (L, n, r),
as large as the largest site needs. A is multiplied to (r n, S), rank-major, and B flattened to (L, n r), basis-major,
so the two are not paired rank by rank. Where in > out, the result is transposed. Files repeat A and B under every site.
s = alpha / r.

The rank is part of the structure: n follows from it, so no size is free of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptc.errors import ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_integers, check_matrix, check_probability, prepare_adapter_input
from adaptc.methods.shared_factors.projections import LargestSites, ProjectionFiles
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.torch_modes import outside_modes


@dataclass
class RandLoraConfig(TargetedConfig):
    """PEFT's ``RandLoraConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        projection_prng_key: the seed of the shared bases.
        save_projection: whether files hold the shared bases.
        sparse: whether the bases have the values -1, 0 and 1, with a third of them not zero.
        very_sparse: whether the bases have few values that are not zero.
        randlora_dropout: the dropout probability of the adapter's input.
        randlora_alpha: the numerator of the scale.

    Example:
        >>> config = adaptc.RandLoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "RANDLORA"
    dropout_field: ClassVar[str] = "randlora_dropout"

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int | float = 640
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r})
        check_probability(self, "randlora_dropout")

    def method(self, name: str, kind: str) -> RandLora:
        return RandLora(
            r=self.r,
            alpha=self.randlora_alpha,
            key=self.projection_prng_key,
            saved=self.save_projection,
            sparsity="very_sparse" if self.very_sparse else "sparse" if self.sparse else "",
            dropout=self.randlora_dropout,
            scheme=self.init_weights,
        )


def _dense_basis_dtype() -> torch.dtype:
    """Return the dtype in which PEFT draws dense bases; as in PEFT, it depends on the GPU."""
    cuda = torch.cuda.is_available()
    return torch.bfloat16 if not cuda or torch.cuda.is_bf16_supported() else torch.float16


@lru_cache(maxsize=2)
def draw_bases(key: int, r: int, small: int, large: int, sparsity: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the bases A (r, 1, small) and B (large, n, r) as PEFT draws them, with standard deviation one, on the CPU.

    They are cached: copy them, never write to them. ``dtype``: in which dense bases are drawn. Raises ConfigError for a
    basis whose values are all equal.
    """
    n = -(-small // r)
    with outside_modes(), torch.no_grad():
        generator = torch.Generator(device="cpu").manual_seed(key)
        if sparsity:
            keep = 1 / (2 * (sqrt(small) if sparsity == "very_sparse" else 3))
            drawn = [torch.rand(s, generator=generator) for s in ((r, 1, small), (large, n, r))]
            a, b = ((t > 1 - keep).float() - (t < keep).float() for t in drawn)
        else:
            shapes = [(r, 1, small), *[(large, 1, r)] * n]
            empty = (torch.empty(s, dtype=dtype, device="cpu") for s in shapes)
            a, *parts = [nn.init.kaiming_uniform_(t, a=sqrt(5), generator=generator) for t in empty]
            b = torch.cat(parts, 1)
        for t in (a, b):
            if t.numel() < 2 or not bool(t.std() > 0):
                raise ConfigError(
                    f"r={r} and projection_prng_key={key} give a {sparsity or 'dense'} basis of {t.numel()} equal "
                    "values, which cannot be normalised; take another key or rank, or a basis that is not sparse"
                )
        return a / a.std(), b / b.std()


class RandLoraFiles(ProjectionFiles):
    method: RandLora

    def keys(self, op: Op) -> list[str]:
        return ["randlora_A", "randlora_B"]  # a file may hold what could be drawn again


@dataclass(frozen=True)
class RandLora(Method):
    """RandLoRA at one site. ``inputs`` and ``outputs``: the largest sizes among the adapter's sites, 0 for this site's.

    ``dropout`` acts on the input of the adapter, in training only. ``saved``: whether the bases are in files.
    """

    name: ClassVar[str] = "randlora"
    swappable: ClassVar[frozenset[str]] = (Method.swappable - {"r"}) | {"key", "saved", "sparsity", "inputs", "outputs"}
    files = RandLoraFiles()
    sharing = LargestSites(shares=True)

    r: int = 32
    alpha: float = 640
    key: int = 0
    saved: bool = True
    sparsity: str = ""
    dropout: float = 0.0
    scheme: bool = True
    training: bool = False
    inputs: int = 0
    outputs: int = 0

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("RandLoRA", op)
        small, n = min(op.matrix_shape), self._num_bases(min(op.matrix_shape))
        most = self._largest_sizes(op)
        a, b = (self.r, 1, min(most)), (max(most), self._num_bases(min(most)), self.r)
        common: Any = {"trainable": False, "saved": self.saved, "shared": True, "repeated": True}
        return {
            "randlora_lambda": Slot((self.r, n)),
            "randlora_gamma": Slot((n, small)),
            "randlora_A": Slot(a, shared_axes_cut=(2,), **common),
            "randlora_B": Slot(b, shared_axes_cut=(0, 1), **common),
        }

    def _num_bases(self, small: int) -> int:
        """Return how many bases a weight with the smaller size ``small`` needs for full rank."""
        return -(-small // self.r)

    def _largest_sizes(self, op: Op) -> tuple[int, int]:
        rows, columns = op.matrix_shape
        return max(self.outputs, rows), max(self.inputs, columns)

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        specs = self.slots(op)
        r_n, n_small = specs["randlora_lambda"].shape, specs["randlora_gamma"].shape
        if self.scheme:
            first, gamma = torch.zeros(r_n, dtype=dtype), torch.full(n_small, 1 / max(n_small), dtype=dtype)
        else:
            first = torch.randn(r_n, generator=generator).to(dtype)
            gamma = torch.full(n_small, 1 / max(op.matrix_shape), dtype=dtype)
        return InitialValues(
            {"randlora_lambda": first, "randlora_gamma": gamma, **self.shared_projections(op, W, dtype)}
        )

    def shared_projections(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        most = self._largest_sizes(op)
        a, b = draw_bases(self.key, self.r, min(most), max(most), self.sparsity, _dense_basis_dtype())
        # PEFT holds them in the base weight's dtype before it casts them, which rounds them.
        return {"randlora_A": a.to(W.dtype).to(dtype), "randlora_B": b.to(W.dtype).to(dtype)}

    def scale(self, op: Op) -> float:
        return self.alpha / self.r

    def _factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        """Return the down projection (n r, columns) and the up projection (rows, n r)."""
        rows, columns = op.matrix_shape
        small, n = min(rows, columns), self._num_bases(min(rows, columns))
        first, gamma = slots["randlora_lambda"], slots["randlora_gamma"]
        A = cast(slots["randlora_A"].narrow(2, 0, small), first.dtype)
        A = (first.unsqueeze(-1) * A * gamma).flatten(0, 1)
        # Basis-major, so that a site's bases are the first columns and need no copy.
        B = slots["randlora_B"].flatten(1).narrow(1, 0, n * self.r).narrow(0, 0, max(rows, columns))
        B = cast(B, first.dtype)
        return (A, B) if small == columns else (B.t(), A.t())

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        down, up = self._factors(op, slots)
        return cast(W + op.unmatrix(up @ down) * scale, W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        down, up = self._factors(op, slots)
        x = prepare_adapter_input(self, op, x, down.dtype)
        delta = op.up(op(x, down.reshape(-1, *op.shape[1:])), up)
        return cast(y + delta * scale, y.dtype)
