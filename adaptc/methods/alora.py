"""aLoRA: LoRA from the tokens that invoke it onwards, and the base before them (Greenewald et al., arXiv 2504.12397).

y' = y + c (s B A x), with c one from where the last occurrence of the invocation tokens begins in a row, zero before
it, and zero in a row that has none. So keys and values of the base up to there are also those of the adapter, and a
cache of them can be continued.

Slots: LoRA's, and ``alora_invocation_tokens`` of the model, which follow from the config: each id plus one, filled up
with zeros, which stand for any token or none, to a multiple of eight. The sites are linear layers whose output has a
place for each token: PEFT has no aLoRA at others either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import TargetError
from adaptc.methods._checks import adapter_input
from adaptc.methods.lora import Lora
from adaptc.passes.ir.coefficients import Coefficient, along_tokens
from adaptc.passes.ir.method import Initial, Scale, Slot, Slots
from adaptc.passes.ir.ops import Op, cast

TOKENS = "alora_invocation_tokens"
#: the coefficient
ACTS = "alora_acts"
#: sizes of the slot of tokens are multiples of it, so that most adapters have one size
ROOM = 8


def acts(ids: Tensor, sought: Tensor) -> Tensor:
    """Whether the adapter acts at a token: (batch, length), for ids (batch, length) and the slot of tokens."""
    length = ids.shape[1]
    at = torch.arange(length, device=ids.device)
    places = at.unsqueeze(1) + torch.arange(sought.shape[0], device=ids.device)
    there = ids[:, places.clamp(max=length - 1)] + 1
    begins = ((there == sought) & (places < length) | (sought == 0)).all(-1)
    # One more than the place, so that zero is left for rows that have none.
    last = torch.where(begins, at + 1, 0).amax(1, keepdim=True)
    return (last > 0) & (at + 1 >= last)


@dataclass(frozen=True)
class Alora(Lora):
    """aLoRA at one site. ``tokens``: the ids that invoke it, in order."""

    name: ClassVar[str] = "alora"
    stacks: ClassVar[bool] = True  # or experts would be done one by one, without a token's place
    swappable: ClassVar[frozenset[str]] = Lora.swappable | {"tokens"}

    tokens: tuple[int, ...] = ()

    def slots(self, op: Op) -> dict[str, Slot]:
        if op.kind not in ("linear", "addmm") or not op.callable:
            raise TargetError(
                f"aLoRA acts from a token onwards, which has a meaning at linear layers alone and not at a consumer of "
                f"kind {op.kind!r}: leave it out, or use LoRA (alora_invocation_tokens=None)"
            )
        size = -(-max(len(self.tokens), 1) // ROOM) * ROOM
        # No token has the fill's id: identity values never act.
        slot = Slot((size,), -1, (0,), torch.int64, trainable=False, saved=False, shared=True, apart=True)
        return {**super().slots(op), TOKENS: slot}

    def coefficients(self) -> Mapping[str, Coefficient]:
        return {ACTS: Coefficient(acts, (TOKENS,))}

    def shares(self) -> bool:
        return True

    def minimal(self, op: Op) -> Alora:
        return replace(self, r=2 * op.groups, tokens=())

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Initial:
        plain = Lora(**{f.name: getattr(self, f.name) for f in fields(Lora)})
        first = plain.init(op, W, dtype, generator)
        return Initial({**first.slots, TOKENS: self._sought(op)}, first.base)

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return {**super().derived(op, W, dtype, found), TOKENS: self._sought(op)}

    def _sought(self, op: Op) -> Tensor:
        ids = torch.tensor(self.tokens, dtype=torch.int64) + 1
        return torch.nn.functional.pad(ids, (0, self.slots(op)[TOKENS].shape[0] - len(self.tokens)))

    def has_weight(self) -> bool:
        return False

    def check_merge(self, op: Op) -> str:
        return "aLoRA acts on some tokens and not on others, which no weight can"

    def low_rank(self, found: Slots) -> None:
        return None  # what it adds is not added everywhere

    def following(self, home: str) -> None:
        return None  # at the embedding it has no meaning

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        A, B, *_ = slots.values()
        h = op.down(adapter_input(self, op, x, A.dtype), A)
        on = along_tokens(slots[ACTS], h) if ACTS in slots else None
        # Chosen and not multiplied: what is not finite where it does not act stays out.
        h = h if on is None else torch.where(on, h, 0)
        delta = op.up(h, B)
        if self.with_bias:
            bias = op.along_out(slots["lora_B.bias"], delta)
            delta = delta + (bias if on is None else torch.where(on, bias, 0))
        return cast(y + delta * scale, y.dtype)
