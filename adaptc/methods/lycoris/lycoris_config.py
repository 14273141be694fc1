"""Define the common base of LoHa and LoKr: options, factorised convolution kernels, dropout and first values.

Source of the factorised kernel: FedPara (Hyeon-Woo et al., arXiv 2108.06098), proposition 3.
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
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_matrix, check_probability, check_ranks
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import InitialValues, Method
from adaptc.patterns import pattern_value

#: a function that fills a tensor with first values
Fill = Callable[[Tensor, torch.Generator | None], None]


@dataclass
class LycorisConfig(TargetedConfig):
    """The fields LoHa's and LoKr's configs have in common, as PEFT has them. Raises ConfigError for illegal values.

    Attributes:
        alpha: the numerator of the scale alpha / r.
        rank_dropout: the probability in training that a row of the change is left out.
        module_dropout: the probability in training that a layer's adapter is left out.
        use_effective_conv2d: whether kernels of convolutions are decomposed, too.
    """

    alpha_field: ClassVar[str] = "alpha"
    #: the values that ``init_weights`` may have
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
    def options_from_tensors(
        cls, modules: Sequence[Mapping[str, Tensor]], shapes: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        return {"use_effective_conv2d": True} if any(n in m for m in modules for n in ("hada_t1", "lokr_t2")) else {}

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        return {"rank_pattern": self.rank_pattern or {}, "alpha_pattern": self.alpha_pattern or {}}

    def method_options(self, name: str) -> dict[str, Any]:
        """Return the fields of a :class:`Lycoris` method at module ``name``."""
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
    """A method W' = W + (alpha / r) * delta.

    In training ``rank_dropout`` drops rows of the delta, and ``module_dropout`` all of it.
    """

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
        """Return whether the kernel positions have a factor of their own: never for a kernel of one position."""
        return self.factor_kernel and any(k != 1 for k in op.kernel)

    def kernel_shape(self, op: Op) -> tuple[int, ...]:
        """Return the last axes of the factor for kernel positions: at least two, as in files."""
        return op.kernel if len(op.kernel) > 1 else (*op.kernel, 1)

    def check_site(self, op: Op) -> None:
        check_matrix(type(self).__name__, op)

    def dropout_factors(self, op: Op, delta: Tensor, rescale: bool) -> Tensor | None:
        """Return the dropout factor of each row of the delta, (out,), or None where nothing is ever dropped.

        ``rescale`` divides by the share of rows left, so that the delta keeps its size. ``delta``: the delta.
        """
        if not self.training or not (self.rank_dropout or self.module_dropout):
            return None
        rows = torch.ones(op.shape[0], dtype=delta.dtype, device=delta.device)
        if self.rank_dropout:
            rows = F.dropout(rows, self.rank_dropout, training=True).sign()
            if rescale:  # clamped, since no row may be left, and 0 / 0 is NaN
                rows = rows / rows.mean().clamp(min=1 / op.shape[0])
        if self.module_dropout:
            rows = rows * F.dropout(torch.ones_like(rows[:1]), self.module_dropout, training=True).sign()
        return rows

    def draw_initial(
        self, op: Op, fills: Mapping[str, Fill], W: Tensor, dtype: torch.dtype, generator: torch.Generator | None
    ) -> InitialValues:
        """Return first values from the initialisers ``fills`` (slot -> fill), drawn in that order.

        They are drawn in the default dtype and then cast, as PEFT does.
        """
        specs = self.slots(op)
        source = torch.device("cpu") if generator is None else generator.device
        out: dict[str, Tensor] = {}
        for name, fill in fills.items():
            value = torch.empty(specs[name].shape, dtype=torch.get_default_dtype(), device=source)
            fill(value, generator)
            out[name] = value.to(device=W.device, dtype=dtype)
        return InitialValues({n: out[n] for n in specs})


def fill_kaiming_uniform(t: Tensor, generator: torch.Generator | None) -> None:
    nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)


def fill_zeros(t: Tensor, generator: torch.Generator | None) -> None:
    nn.init.zeros_(t)


def apply_kernel_factor(t: Tensor, b: Tensor) -> Tensor:
    """Return the sum over j of ``t`` (i, j, *kernel) times ``b`` (j, in): (i, in, prod(kernel)).

    It is written so that tracing records no rank as a constant.
    """
    return torch.matmul(b.t(), t.flatten(2))


def detach_padding_row(op: Op, x: Tensor, delta: Tensor) -> Tensor:
    """Return ``delta`` (*x.shape, width), detached where ``x`` is the padding index of the embedding ``op``.

    The embedding itself gives no gradient to that row either.
    """
    padding = op.other_args[0] if op.other_args else -1
    return delta if padding < 0 else torch.where((x == padding).unsqueeze(-1), delta.detach(), delta)


def supports_row_lookup(op: Op) -> bool:
    """Return whether ``op`` is an embedding at which changing the rows that are read equals changing the table.

    With ``scale_grad_by_freq`` it does not, since gradients are then divided by how often a row is read.
    """
    return op.kind == "embedding" and not (len(op.other_args) > 1 and op.other_args[1])
