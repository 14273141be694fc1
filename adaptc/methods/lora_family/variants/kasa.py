"""KaSA: W' = W - W_r + s B diag(d) A, W_r the r smallest singular terms of W (Wang et al., arXiv 2412.06071).

Slots: LoRA's, and the trained ``lora_diag`` (r,), for E stacked experts (r*E,), expert-major. ``kasa_A`` and ``kasa_B``
have the shapes of A and B, and their product is W_r. They are frozen and in no file: they are made of the weight when
an adapter is bound, so that a file belongs to the weights that it was trained on. W is the weight as a matrix, kernels
in its columns.

PEFT takes W_r out of the layer's weight for good, and so refuses other adapters beside KaSA. Here the weight stays as
it is: to unload and to swap is exact, and adapters of other methods may act together with KaSA.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError, TargetError
from adaptc.methods._shared.option_checks import OptionGroup
from adaptc.methods.lora_family.lora import LORA_NAMES, Lora, LoraFiles, by_expert
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Scale, Slot, Slots
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.torch_modes import outside_modes
from adaptc.torch_typing import reduced_svd

DIAGONAL = "lora_diag"
#: the slots of the factors of W_r
DROPPED = ("kasa_A", "kasa_B")


@dataclass
class KasaConfig(OptionGroup):
    """PEFT's ``KasaConfig``: same names, same defaults, for ``LoraConfig(kasa_config=...)``.

    Both factors have an effect through :func:`adaptc.training.kasa_loss` alone. Raises ConfigError for negative ones.

    Attributes:
        beta: the factor of the sum of d^2.
        gamma: the factor of |B^T B - I| + |A A^T - I|.

    Example:
        >>> config = adaptc.LoraConfig(r=8, kasa_config=adaptc.KasaConfig(beta=1e-3), target_modules=["q_proj"])
    """

    option: ClassVar[str] = "kasa_config"

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ConfigError(f"KasaConfig.{name} must not be negative, got {getattr(self, name)!r}")


class KasaFiles(LoraFiles):
    method: Kasa

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return self.method.dropped_terms(op, W, dtype)

    def needs_base(self) -> bool:
        return True

    def low_rank(self, found: Slots) -> None:
        return None  # its change depends on the base weight


@dataclass(frozen=True)
class Kasa(Lora):
    """KaSA at one site. ``dropout`` acts on the input of A, and not on that of the dropped terms."""

    name: ClassVar[str] = "kasa"
    takes_complex: ClassVar[bool] = False
    files = KasaFiles(names=(*LORA_NAMES, DIAGONAL))
    sharing = SharedSlots()

    def slots(self, op: Op) -> dict[str, Slot]:
        if op.groups > 1:
            raise TargetError(
                f"KaSA drops singular terms of a matrix, and a convolution with groups={op.groups} has one matrix for "
                "each group: leave the layer out, or use LoRA (kasa_config=None)"
            )
        slots = super().slots(op)
        A, B, *_ = slots.values()
        frozen = [Slot(s.shape, free=s.free, trainable=False, saved=False) for s in (A, B)]
        return {**slots, DIAGONAL: Slot((A.shape[0],), free=(0,)), **dict(zip(DROPPED, frozen, strict=True))}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        plain = Lora(**{f.name: getattr(self, f.name) for f in fields(Lora)})
        values = plain.init(op, W, dtype, generator).slots
        source = torch.device("cpu") if generator is None else generator.device
        # In the dtype of the weight, as in PEFT: another dtype draws other numbers.
        shape = self.slots(op)[DIAGONAL].shape
        diagonal = torch.randn(shape, dtype=W.dtype, device=source, generator=generator)
        return InitialValues({**values, DIAGONAL: diagonal.to(W.device, dtype), **self.dropped_terms(op, W, dtype)})

    @torch.no_grad()
    def dropped_terms(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the factors of the r smallest singular terms of the weight.

        Raises TargetError where no term would be left, and ConfigError for a weight that is not finite.
        """
        M = W.detach() if op.experts else op.matrix(W.detach())
        M = M if M.dtype == torch.float64 else M.float()
        if self.r >= min(M.shape[-2:]):
            raise TargetError(
                f"KaSA drops r singular terms of a weight and keeps the others, and r={self.r} leaves none of a matrix "
                f"of shape {tuple(M.shape[-2:])}; r={min(M.shape[-2:]) - 1} is the most that fits (rank_pattern can "
                "lower it for this site)"
            )
        if not bool(torch.isfinite(M).all()):
            raise ConfigError(f"KaSA decomposes the weight, and this one of shape {op.shape} is not finite")
        with outside_modes():
            U, S, V = reduced_svd(M)
        up = U[..., -self.r :] * S[..., None, -self.r :]
        if op.experts:  # which are the fastest index of B's columns
            up = up.permute(1, 2, 0)
        shapes = [slot.shape for name, slot in self.slots(op).items() if name in DROPPED]
        factors = [t.reshape(shape) for t, shape in zip((V[..., -self.r :, :], up), shapes, strict=True)]
        return {n: t.to(dtype).contiguous() for n, t in zip(DROPPED, factors, strict=True)}

    def inside_multihead_attention(self) -> Kasa:
        return self  # PEFT has no KaSA in MultiheadAttention, and so no files in which it is applied twice

    def conflict_with(self, other: object) -> str:
        return "the smallest singular terms" if isinstance(other, Kasa) else ""

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        A, B = self._factors(op, slots)
        return cast(op.add_low_rank(W, A, B, scale) - op.product(*self._dropped(op, slots)), W.dtype)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        dropped = self._dropped(op, slots)
        kept = y - op.down_up(op.cast_input(x, dropped[0].dtype), *dropped)
        return cast(super().apply(op, x, kept, W, b, slots, scale), y.dtype)

    def _factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        A, B = super()._factors(op, slots)
        rows = (op.experts, -1) if op.experts else (-1,)
        return A * slots[DIAGONAL].reshape(*rows, *[1] * (A.ndim - len(rows))), B

    def _dropped(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        """Return the factors of W_r as ``_factors`` returns A and B. They keep to no ``max_norm``, as W_r does not."""
        A, B = (slots[n] for n in DROPPED)
        return by_expert(op, A, B)
