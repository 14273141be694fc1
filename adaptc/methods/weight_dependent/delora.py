"""DeLoRA: W' = W + (l / r) U V diag(n), r pairs of unit vectors and a trained bound l (Bini et al., arXiv 2503.18225).

V has the rows of A and U has the columns of B, each divided by its length. A length counts as at least 1e-4, so zeros
stay zeros. The lengths of W's columns are n. Before the factors n, the Frobenius norm of the change is at most l.

Slots, in PEFT's shapes: ``delora_A`` (r, in), ``delora_B`` (out, r), ``delora_lambda`` (1,), and ``delora_w_norm``
(in,), which is not trained. Files hold all four: the lengths are those of the weight that the adapter was made for.
Beyond PEFT's linear layers, W is the weight as a matrix, kernels in its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import (
    check_bias,
    check_matrix,
    check_probability,
    check_ranks,
    prepare_adapter_input,
)
from adaptc.methods.lycoris.lycoris_config import fill_kaiming_uniform
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.size_rule import SizeRule
from adaptc.patterns import pattern_value

A, B, LAMBDA, W_NORM = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
#: the least length that a row of A or a column of B is divided by
SHORTEST = 1e-4


@dataclass
class DeloraConfig(TargetedConfig):
    """PEFT's ``DeloraConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        delora_lambda: the first value of the bound.
        module_dropout: the dropout probability of the adapter's input. As in PEFT, single inputs are dropped and not
            whole modules.
        lambda_pattern: name or expression -> the first bound of these modules.

    Example:
        >>> config = adaptc.DeloraConfig(r=8, delora_lambda=15, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "DELORA"
    dropout_field: ClassVar[str] = "module_dropout"

    r: int = 8
    delora_lambda: int | float = 15
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict[str, int])
    lambda_pattern: dict[str, int | float] | None = field(default_factory=dict[str, int | float])

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self)
        check_probability(self, "module_dropout")
        check_bias(self, "delora_only")

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        return {"rank_pattern": self.rank_pattern or {}, "lambda_pattern": self.lambda_pattern or {}}

    def method(self, name: str, kind: str) -> Delora:
        return Delora(
            r=pattern_value(self.rank_pattern, name, self.r),
            bound=pattern_value(self.lambda_pattern, name, self.delora_lambda),
            dropout=self.module_dropout,
            scheme=self.init_weights,
        )


@dataclass(frozen=True)
class Delora(Method):
    """DeLoRA at one site. ``bound``: the first value of l. ``dropout`` acts on the change's input, in training only."""

    name: ClassVar[str] = "delora"
    takes_complex: ClassVar[bool] = False
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"bound"}
    sizes = SizeRule(rank_axes={A: 0})

    r: int = 8
    bound: float = 15
    dropout: float = 0.0
    scheme: bool = True
    training: bool = False

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("DeLoRA", op)
        rows, columns = op.matrix_shape
        return {
            A: Slot((self.r, columns), free=(0,)),
            B: Slot((rows, self.r), free=(1,)),
            LAMBDA: Slot((1,)),
            W_NORM: Slot((columns,), trainable=False),
        }

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        # PEFT draws in the default dtype and casts.
        source = torch.device("cpu") if generator is None else generator.device
        specs = self.slots(op)
        a, b = (torch.zeros(specs[n].shape, device=source) for n in (A, B))
        fill_kaiming_uniform(a, generator)
        if not self.scheme:
            fill_kaiming_uniform(b, generator)
        values = {A: a, B: b, LAMBDA: torch.full((1,), float(self.bound)), W_NORM: _lengths(op.matrix(W.detach()), 0)}
        return InitialValues({n: t.to(W.device, dtype) for n, t in values.items()})

    def scale(self, op: Op) -> float:
        return 1 / self.r

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        down, up = self._factors(slots, scale)
        return cast(W + op.unmatrix(up @ down), W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        down, up = self._factors(slots, scale)
        x = prepare_adapter_input(self, op, x, down.dtype)
        return cast(y + op.low_rank(x, down, up), y.dtype)

    def _factors(self, slots: Slots, scale: Scale) -> tuple[Tensor, Tensor]:
        """Return the factors of the change, (r, columns) and (rows, r), in the dtype of A and B."""
        a, b = slots[A], slots[B]
        # Each factor has its own lengths: their product can be below what half precision holds.
        down = a * (slots[W_NORM] / _lengths(a, 1).clamp(min=SHORTEST).unsqueeze(1))
        up = b * (slots[LAMBDA] * scale / _lengths(b, 0).clamp(min=SHORTEST))
        return cast(down, a.dtype), cast(up, b.dtype)


def _lengths(t: Tensor, axis: int) -> Tensor:
    """Return lengths along an axis of a matrix, in float32 or wider."""
    return vector_norm(t, dim=axis, dtype=torch.promote_types(t.dtype, torch.float32))
