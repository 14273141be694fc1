"""Prefix tuning: a learned KV prefix for every attention (Li and Liang, arXiv 2101.00190).

File key: ``prompt_embeddings`` (num_virtual_tokens, 2 * num_layers * token_dim). With ``prefix_projection`` these rows
are the output of a network of two layers, whose input rows are trained with it. PEFT writes and reads the output only.
adaptc writes the network too, under ``prompt_encoder.``, so that training can continue from a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import ConfigError, short_repr
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.option_checks import check_integers
from adaptc.methods.prompt.key_values import KVPrefixConfig, KVPrefixMethod
from adaptc.methods.prompt.reparameterized_prompt import NETWORK_PREFIX, ReparameterizedPrompt
from adaptc.methods.prompt.virtual_token_method import PROMPT_EMBEDDINGS
from adaptc.passes.analysis.attention.attention_for_prefixes import SelfAttentions
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import InitialValues
from adaptc.passes.protocol.parts.method_part import Slot, Slots

ZERO = "zero"


@dataclass
class PrefixTuningConfig(KVPrefixConfig):
    """PEFT's ``PrefixTuningConfig``: same names, same defaults.

    Attributes:
        init_weights: "zero" starts from zeros. That changes the model, since keys of zeros are attended to like others.
        encoder_hidden_size: the width of the MLP of ``prefix_projection``; None for ``token_dim``.
        prefix_projection: whether an MLP makes the prefix while it is trained.

    Example:
        >>> config = adaptc.PrefixTuningConfig(num_virtual_tokens=20)
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, ZERO):
            raise ConfigError(
                f"{type(self).__name__}.init_weights={short_repr(self.init_weights)} is not None or {ZERO!r}"
            )
        if self.encoder_hidden_size is not None:
            check_integers(self, {"encoder_hidden_size": self.encoder_hidden_size})

    def with_model_defaults(
        self, facts: ModelFacts, embedding_dim: int, attentions: SelfAttentions | None = None
    ) -> Self:
        new = super().with_model_defaults(facts, embedding_dim, attentions)
        return new.with_missing_filled({"encoder_hidden_size": new.token_dim})

    def method(self, name: str, kind: str) -> PrefixTuning | PrefixProjection:
        assert self.num_virtual_tokens is not None
        first = () if self.init_weights is None else (self.init_weights,)
        if self.prefix_projection:
            return PrefixProjection(self.num_virtual_tokens, first, 1, *self.kv_shape, self.encoder_hidden_size or 0)
        return PrefixTuning(self.num_virtual_tokens, first, 1, *self.kv_shape)


@dataclass(frozen=True)
class PrefixTuning(KVPrefixMethod):
    """Prefix tuning without a network: the KV prefix itself is trained. ``first``: ("zero",) or empty."""

    name: ClassVar[str] = "prefix_tuning"

    def slots(self, op: Op) -> dict[str, Slot]:
        return {PROMPT_EMBEDDINGS: Slot((self.count, self.row_size), free=(0,))}

    def prefix_rows(self, slots: Slots) -> Tensor:
        return slots[PROMPT_EMBEDDINGS]

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        rows = torch.randn(self.count, self.row_size, generator=generator)
        return InitialValues(
            {PROMPT_EMBEDDINGS: (torch.zeros_like(rows) if ZERO in self.first else rows).to(W.device, dtype)}
        )


@dataclass(frozen=True)
class PrefixProjection(ReparameterizedPrompt, KVPrefixMethod):
    """Prefix tuning with a network. ``hidden``: the width between its two layers."""

    name: ClassVar[str] = "prefix_projection"
    trainable_alternative: ClassVar[str] = "a PrefixTuningConfig without prefix_projection"

    hidden: int = 0

    def row_widths(self, op: Op) -> tuple[int, int]:
        return self.heads * self.width, self.row_size

    def network_shapes(self, op: Op) -> dict[str, tuple[int, ...]]:
        (trained, made), h = self.row_widths(op), self.hidden
        return {
            "transform.0.weight": (h, trained),
            "transform.0.bias": (h,),
            "transform.2.weight": (made, h),
            "transform.2.bias": (made,),
        }

    def last_layer(self) -> str:
        return "transform.2"

    def run_network(self, x: Tensor, slots: Slots) -> Tensor:
        first, second = ([slots[f"{NETWORK_PREFIX}transform.{i}.{n}"] for n in ("weight", "bias")] for i in (0, 2))
        return F.linear(F.linear(x, *first).tanh(), *second)

    def prefix_rows(self, slots: Slots) -> Tensor:
        return self.compute_rows(slots)

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        found = super().init(op, W, dtype, generator).slots
        last = f"{NETWORK_PREFIX}{self.last_layer()}."
        zero = ZERO in self.first
        return InitialValues({n: torch.zeros_like(t) if zero and n.startswith(last) else t for n, t in found.items()})
