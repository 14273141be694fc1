"""Tokens in front of those of a call: what mask, positions and token types are for them, whatever they are.

How many there are is the size of a slot, so that a swap may change it, and none at all are the identity. A method of
this kind says what its slots are, and what stands at the places: embeddings, or keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.passes.ir.coefficients import Given
from adaptc.passes.ir.method_hooks import Slots
from adaptc.passes.ir.ops import Op
from adaptc.passes.ir.program_method import ProgramMethod

PROMPT = "prompt_embeddings"


@dataclass(frozen=True)
class InFront(ProgramMethod):
    """``count``: how many tokens, which are as many as the rows of the slot :data:`PROMPT` unless :meth:`lengthens` is
    overridden."""

    swappable: ClassVar[frozenset[str]] = frozenset({"count", "first", "training"})
    #: slot -> what PEFT's module of the prompt calls it
    modules: ClassVar[Mapping[str, str]] = {PROMPT: "embedding.weight"}
    file_names: ClassVar[tuple[str, ...]] = (PROMPT,)

    count: int = 0
    #: how first values are made; what it holds is up to the method
    first: tuple[Any, ...] = ()

    # -- places --------------------------------------------------------------------------------------------------------

    def lengthens(self, slots: Slots) -> int:
        return slots[PROMPT].shape[0]

    def tokens(self, value: Tensor, slots: Slots, given: Given, plain: int) -> Tensor:
        return self.padded(value, slots, plain)

    def attended(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        return self.padded(value, slots, 1)

    def positions(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        n = self.lengthens(slots)
        own = torch.arange(n, dtype=value.dtype, device=value.device).expand(value.shape[0], -1)
        return torch.cat([own, value + n], 1)

    def segments(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        return self.padded(value, slots, 0)

    def padded(self, value: Tensor, slots: Slots, fill: int) -> Tensor:
        return F.pad(value, (self.lengthens(slots), 0), value=fill)

    # -- sizes and names -----------------------------------------------------------------------------------------------

    def rank(self) -> int:
        return self.count

    def with_sizes_of(self, op: Op, slots: Slots) -> Any:
        return replace(self, count=slots[PROMPT].shape[0]) if PROMPT in slots else self

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return replace(self, count=0).filled(op, W, dtype)

    def clash(self, other: Any) -> str:
        return "the first tokens" if isinstance(other, InFront) else ""

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        return f"prompt_encoder.{adapter}.{self.modules.get(slot, slot)}"
