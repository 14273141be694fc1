"""Adaption prompt: y' = y + g softmax(q K^T / sqrt(d)) V, with K and V of learned tokens (Zhang et al., 2303.16199).

LLaMA-Adapter: each of the last layers has learned tokens of its own, of which the layer's projections make K and V. The
queries of the attention attend to them with a softmax of their own, apart from the model's tokens. The result is added
to the attention's output; a gate g of zero is no change.

q is the attention's query after rotary embedding, and after normalisation where the model has one. Scores are scaled
as the attention scales its own. K and V are the plain outputs of the projections, without rotary embedding. The output
projection reads the sum. PEFT adds that projection's bias a second time; adaptc does not.

Slots of a layer's attention: ``adaption_prompt`` (1, adapter_len, width of the model) and ``adaption_gate`` (1,).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import ConfigError
from adaptc.methods._shared.option_checks import check_integers
from adaptc.methods.prompt.attention_config import AttentionConfig
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.attention_method import AttentionMethod, ScoreFunction
from adaptc.passes.protocol.method import InitialValues, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.size_rule import SizeRule

PROMPT, GATE = "adaption_prompt", "adaption_gate"


@dataclass
class AdaptionPromptConfig(AttentionConfig):
    """PEFT's ``AdaptionPromptConfig``: same names, same defaults.

    Raises ConfigError where a number is missing or not positive.

    Attributes:
        adapter_len: the number of learned tokens of a layer.

    Example:
        >>> config = adaptc.AdaptionPromptConfig(adapter_len=10, adapter_layers=2, task_type="CAUSAL_LM")
    """

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"

    adapter_len: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("adapter_len", "adapter_layers"):
            if (value := getattr(self, name)) is None:
                raise ConfigError(f"{type(self).__name__}.{name} must be given: it has no default")
            check_integers(self, {name: value})

    def method(self, name: str, kind: str) -> AdaptionPrompt:
        return AdaptionPrompt(self.adapter_len or 0)

    def with_ranks(self, ranks: dict[str, int]) -> AdaptionPromptConfig:  # type: ignore[override]
        return self.replace(adapter_len=next(iter(ranks.values()), self.adapter_len))


class AdaptionPromptSizes(SizeRule):
    method: AdaptionPrompt

    def rank(self) -> int:
        return self.method.count

    def minimal(self, op: Op) -> AdaptionPrompt:
        return replace(self.method, count=2)

    def with_sizes_of(self, op: Op, slots: Slots) -> AdaptionPrompt:
        prompt = slots.get(PROMPT)
        return self.method if prompt is None or prompt.ndim != 3 else replace(self.method, count=prompt.shape[1])


@dataclass(frozen=True)
class AdaptionPrompt(AttentionMethod):
    """Adaption prompt with ``count`` learned tokens at one layer."""

    name: ClassVar[str] = "adaption_prompt"
    swappable: ClassVar[frozenset[str]] = frozenset({"count", "training"})
    files = FileFormat(names=(PROMPT, GATE))
    sizes = AdaptionPromptSizes(exact=True)

    count: int = 0

    def slots(self, op: Op) -> dict[str, Slot]:
        return {PROMPT: Slot((1, self.count, op.out_features), free=(1,)), GATE: Slot((1,))}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        source = W.device if generator is None else generator.device
        prompt = torch.empty(self.slots(op)[PROMPT].shape, dtype=W.dtype, device=source).normal_(generator=generator)
        return InitialValues({PROMPT: prompt.to(W.device, dtype), GATE: torch.zeros(1, dtype=dtype, device=W.device)})

    def tokens(self, slots: Slots) -> Tensor:
        return slots[PROMPT][0]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, slots: Slots, to_scores: ScoreFunction) -> Tensor:
        scores = to_scores(query @ cast(keys, query.dtype).mT)
        chances = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return cast(slots[GATE] * chances, values.dtype) @ values
