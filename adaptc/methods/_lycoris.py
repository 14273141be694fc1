"""What LoHa and LoKr share: PEFT's common options, a factorised convolution kernel, what training drops, first values.

Source of the kernel: FedPara (Hyeon-Woo et al., arXiv 2108.06098), proposition 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptc.errors import ConfigError
from adaptc.methods._checks import check_matrix, check_probability, check_ranks
from adaptc.methods._config import TargetedConfig
from adaptc.methods._name_patterns import pattern_value
from adaptc.passes.ir.method import Initial, Method
from adaptc.passes.ir.ops import Op

#: fills a tensor with first values
Fill = Callable[[Tensor, torch.Generator | None], None]


@dataclass
class LycorisConfig(TargetedConfig):
    """The fields LoHa's and LoKr's configs have in common, as PEFT has them. Raises ConfigError for illegal values."""

    alpha_field: ClassVar[str] = "alpha"
    #: what ``init_weights`` may be
    schemes: ClassVar[tuple[Any, ...]] = (True, False)

    r: int = 8
    alpha: int | float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_ranks(self)
        check_probability(self, "rank_dropout", "module_dropout")
        if not any(self.init_weights is s or (isinstance(s, str) and self.init_weights == s) for s in self.schemes):
            known = ", ".join(repr(s) for s in self.schemes)
            raise ConfigError(f"{name}.init_weights must be one of {known}, got {self.init_weights!r}")

    @classmethod
    def options_of(cls, modules: Sequence[Mapping[str, Tensor]], shapes: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {"use_effective_conv2d": True} if any(n in m for m in modules for n in ("hada_t1", "lokr_t2")) else {}

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        return {"rank_pattern": self.rank_pattern or {}, "alpha_pattern": self.alpha_pattern or {}}

    def options(self, name: str) -> dict[str, Any]:
        """The fields of a :class:`Lycoris` method at module ``name``."""
        return {
            "r": pattern_value(self.rank_pattern, name, self.r),
            "alpha": pattern_value(self.alpha_pattern, name, self.alpha),
            "rank_dropout": self.rank_dropout,
            "module_dropout": self.module_dropout,
            "factor_kernel": self.use_effective_conv2d,
            "scheme": self.init_weights,
        }


@dataclass(frozen=True)
class Lycoris(Method):
    """W' = W + (alpha / r) * delta. ``rank_dropout`` drops rows of the delta, ``module_dropout`` all of it."""

    swappable: ClassVar[frozenset[str]] = frozenset(
        {"r", "alpha", "rank_dropout", "module_dropout", "scheme", "training"}
    )

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    factor_kernel: bool = False
    scheme: bool | str = True
    training: bool = False

    def scale(self, op: Op) -> float:
        return self.alpha / self.r

    def has_factored_kernel(self, op: Op) -> bool:
        """Whether kernel positions have a factor of their own; kernels of a single one have not."""
        return self.factor_kernel and any(k != 1 for k in op.kernel)

    def kernel_shape(self, op: Op) -> tuple[int, ...]:
        """The last axes of the factor for kernel positions, which are never fewer than two in files."""
        return op.kernel if len(op.kernel) > 1 else (*op.kernel, 1)

    def check(self, op: Op) -> None:
        check_matrix(type(self).__name__, op)

    def kept(self, op: Op, like: Tensor, centred: bool) -> Tensor | None:
        """What training leaves of each row of the delta: (out,) factors, or None when nothing is ever dropped.

        ``centred`` divides by the share of rows left, so that the delta keeps its size.
        """
        if not self.training or not (self.rank_dropout or self.module_dropout):
            return None
        rows = torch.ones(op.shape[0], dtype=like.dtype, device=like.device)
        if self.rank_dropout:
            rows = F.dropout(rows, self.rank_dropout, training=True).sign()
            if centred:  # where no row is left there is nothing to divide by
                rows = rows / rows.mean().clamp(min=1 / op.shape[0])
        if self.module_dropout:
            rows = rows * F.dropout(torch.ones_like(rows[:1]), self.module_dropout, training=True).sign()
        return rows

    def drawn(
        self, op: Op, how: Mapping[str, Fill], W: Tensor, dtype: torch.dtype, generator: torch.Generator | None
    ) -> Initial:
        """First values from the initialisers ``how``, in that order. PEFT draws in the default dtype, and casts."""
        specs = self.slots(op)
        source = torch.device("cpu") if generator is None else generator.device
        out: dict[str, Tensor] = {}
        for name, fill in how.items():
            value = torch.empty(specs[name].shape, dtype=torch.get_default_dtype(), device=source)
            fill(value, generator)
            out[name] = value.to(device=W.device, dtype=dtype)
        return Initial({n: out[n] for n in specs})


def he(t: Tensor, generator: torch.Generator | None) -> None:
    nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)


def zeros(t: Tensor, generator: torch.Generator | None) -> None:
    nn.init.zeros_(t)


def kernel_down(t: Tensor, b: Tensor) -> Tensor:
    """``t`` (i, j, *kernel) and ``b`` (j, in) -> (i, in, prod(kernel)): sum over j. No rank becomes a number."""
    return torch.matmul(b.t(), t.flatten(2))


def padded(op: Op, x: Tensor, delta: Tensor) -> Tensor:
    """``delta`` (*x.shape, width) without a gradient where the embedding ``op`` gives none: at its padding index."""
    padding = op.rest[0] if op.rest else -1
    return delta if padding < 0 else torch.where((x == padding).unsqueeze(-1), delta.detach(), delta)


def can_look_up(op: Op) -> bool:
    """Whether changing the rows that are read is changing the table: not if gradients are divided by their counts."""
    return op.kind == "embedding" and not (len(op.rest) > 1 and op.rest[1])
