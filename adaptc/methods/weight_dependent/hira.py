"""HiRA: W' = W + W * (B A), product by entries (Huang et al., ICLR 2025, openreview TwJrTz9cRS).

The rank of the change is that of the weight, though A and B have a rank of ``r``. Where other adapters changed W
before, the factor is still the model's own weight, as in PEFT: changes of several adapters add up.

Slots, in PEFT's shapes: ``hira_A`` (r, in[, *kernel]) and ``hira_B`` (out, r[, 1...]); at embeddings
``hira_embedding_A`` (r, vocab) and ``hira_embedding_B`` (width, r). At a convolution with groups, which PEFT refuses,
``in`` is that of one group, so that the change has the weight's own shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptc.errors import ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import (
    applies_dropout,
    check_matrix,
    check_probability,
    check_ranks,
    prepare_adapter_input,
)
from adaptc.methods.lycoris.lycoris_config import detach_padding_row, fill_kaiming_uniform, supports_row_lookup
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.size_rule import SizeRule
from adaptc.patterns import pattern_value

A, B = "hira_A", "hira_B"
EMBEDDING_A, EMBEDDING_B = "hira_embedding_A", "hira_embedding_B"


@dataclass
class HiraConfig(TargetedConfig):
    """PEFT's ``HiraConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        r: the rank of A and B.
        hira_dropout: the dropout probability of the adapter's input.
        init_weights: True starts as the identity; "gaussian" does too, with A drawn from a normal distribution at
            linear layers. False draws A and B.
        rank_pattern: name or expression -> the rank of these modules. PEFT 0.21.2 ignores it for the first adapter of
            a layer, so the ranks of a file are those of its tensors. A file with such ranks loads in PEFT beside
            another adapter only.

    Example:
        >>> config = adaptc.HiraConfig(r=32, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "HIRA"
    dropout_field: ClassVar[str] = "hira_dropout"

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self)
        check_probability(self, "hira_dropout")
        if isinstance(self.init_weights, str) and self.init_weights.lower() != "gaussian":
            raise ConfigError(f"HiraConfig.init_weights must be True, False or 'gaussian', got {self.init_weights!r}")

    def ranks_differ_in_files(self) -> bool:
        return bool(self.rank_pattern)

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        return {"rank_pattern": self.rank_pattern or {}}

    def method(self, name: str, kind: str) -> Hira:
        scheme = self.init_weights.lower() if isinstance(self.init_weights, str) else self.init_weights
        return Hira(pattern_value(self.rank_pattern, name, self.r), self.hira_dropout, scheme)


@dataclass(frozen=True)
class Hira(Method):
    """HiRA at one site. ``dropout`` acts on the input of the change, in training only; an embedding has none."""

    name: ClassVar[str] = "hira"
    sizes = SizeRule(rank_axes={A: 0, EMBEDDING_A: 0})

    r: int = 32
    dropout: float = 0.0
    scheme: bool | str = True
    training: bool = False

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("HiRA", op)
        a, b = (EMBEDDING_A, EMBEDDING_B) if op.kind == "embedding" else (A, B)
        ones = (1,) * len(op.kernel)
        return {
            a: Slot((self.r, *op.shape[1:]), free=(0,)),
            b: Slot((op.shape[0], self.r, *ones), free=(1,)),
        }

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        # PEFT draws in the default dtype and casts. What it draws first stays where ``scheme`` is False.
        source = torch.device("cpu") if generator is None else generator.device
        specs = self.slots(op)
        a, b = (torch.randn(s.shape, generator=generator, device=source) for s in specs.values())
        if self.scheme is not False and op.kind == "embedding":
            nn.init.zeros_(a)
            nn.init.normal_(b, generator=generator)
        elif self.scheme is not False:
            if self.scheme == "gaussian" and not op.kernel:
                nn.init.normal_(a, std=1 / self.r, generator=generator)
            else:
                fill_kaiming_uniform(a, generator)
            nn.init.zeros_(b)
        return InitialValues({n: t.to(W.device, dtype) for n, t in zip(specs, (a, b), strict=True)})

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return self.weight_over(op, W, W, slots, scale)

    def weight_over(self, op: Op, base: Tensor, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return cast(W + self._change(op, base, slots), W.dtype)

    def has_apply(self, op: Op) -> bool:
        # The product needs a whole matrix, except for the rows that an embedding reads.
        return supports_row_lookup(op) or (op.callable and applies_dropout(self, op))

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        if op.kind == "embedding":
            down, up = slots.values()
            # Rows of the base: other adapters may have changed those in y.
            delta = op(x, W) * F.linear(F.embedding(x, down.t()), up)
            return cast(y + detach_padding_row(op, x, delta), y.dtype)
        x = prepare_adapter_input(self, op, x, slots[A].dtype)
        return cast(y + op(x, cast(self._change(op, W, slots), x.dtype)), y.dtype)

    def _change(self, op: Op, base: Tensor, slots: Slots) -> Tensor:
        """Return W' - W, in the wider dtype of weight and slots."""
        down, up = slots.values()
        return base * op.unmatrix(up.flatten(1) @ down.flatten(1))
