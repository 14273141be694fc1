"""aLoRA: LoRA from the tokens that invoke it onwards, and the base before them (Greenewald et al., arXiv 2504.12397).

y' = y + c (s B A x). c is one from the first token of the last occurrence of the invocation tokens in a row of the
batch, and zero before it; it is zero in a row without them. So up to there the adapter's keys and values are the
base's, and a KV cache of the base can be continued.

Slots: LoRA's, and the shared slot ``alora_invocation_tokens``, which follows from the config. It holds each token id
plus one, padded to a multiple of eight with zeros that match any token or none. Sites are linear layers whose output
has an entry for each token: PEFT has no aLoRA at other layers either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import TargetError
from adaptc.methods._shared.option_checks import prepare_adapter_input
from adaptc.methods.lora_family.lora import LORA_NAMES, Lora, LoraFiles, LoraSizes
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.coefficients import Coefficient, along_tokens
from adaptc.passes.protocol.method import InitialValues, Scale, Slot, Slots
from adaptc.passes.protocol.parts.extra_inputs import ExtraInputs
from adaptc.passes.protocol.parts.shared_slots import SharedSlots

INVOCATION_TOKENS = "alora_invocation_tokens"
#: the name of the coefficient c, the token gate
TOKEN_GATE = "alora_acts"
#: the size of the token slot is a multiple of it, so that most adapters have the same size
TOKEN_SLOT_MULTIPLE = 8


def token_gate(ids: Tensor, invocation_tokens: Tensor) -> Tensor:
    """Return whether the adapter acts at each token, (batch, length) of bool.

    ``ids``: input_ids (batch, length). ``invocation_tokens``: the slot ``alora_invocation_tokens``.
    """
    length = ids.shape[1]
    at = torch.arange(length, device=ids.device)
    places = at.unsqueeze(1) + torch.arange(invocation_tokens.shape[0], device=ids.device)
    there = ids[:, places.clamp(max=length - 1)] + 1
    begins = ((there == invocation_tokens) & (places < length) | (invocation_tokens == 0)).all(-1)
    # Positions are counted from one, so that zero stands for a row without the invocation tokens.
    last = torch.where(begins, at + 1, 0).amax(1, keepdim=True)
    return (last > 0) & (at + 1 >= last)


class AloraFiles(LoraFiles):
    method: Alora

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return {**super().derived(op, W, dtype, found), INVOCATION_TOKENS: self.method.token_slot_values(op)}

    def low_rank(self, found: Slots) -> None:
        return None  # B A x is not added at every token


class AloraSizes(LoraSizes):
    method: Alora

    def minimal(self, op: Op) -> Alora:
        return replace(self.method, r=2 * op.groups, tokens=())


class AloraInputs(ExtraInputs):
    method: Alora

    def coefficients(self) -> Mapping[str, Coefficient]:
        return {TOKEN_GATE: Coefficient(token_gate, (INVOCATION_TOKENS,))}


@dataclass(frozen=True)
class Alora(Lora):
    """aLoRA at one site. ``tokens``: the ids of the invocation tokens, in order."""

    name: ClassVar[str] = "alora"
    stacks: ClassVar[bool] = True  # else it would be applied per expert, where the position of a token is unknown
    swappable: ClassVar[frozenset[str]] = Lora.swappable | {"tokens"}
    files = AloraFiles(names=LORA_NAMES)
    sizes = AloraSizes()
    sharing = SharedSlots(shares=True)
    extra_inputs = AloraInputs()

    tokens: tuple[int, ...] = ()

    def slots(self, op: Op) -> dict[str, Slot]:
        if op.kind not in ("linear", "addmm") or not op.callable:
            raise TargetError(
                f"aLoRA acts from a token onwards, which has a meaning at linear layers alone and not at a consumer of "
                f"kind {op.kind!r}: leave it out, or use LoRA (alora_invocation_tokens=None)"
            )
        size = -(-max(len(self.tokens), 1) // TOKEN_SLOT_MULTIPLE) * TOKEN_SLOT_MULTIPLE
        # The fill -1 equals no id plus one, so that the adapter never acts with identity values.
        slot = Slot((size,), -1, (0,), torch.int64, trainable=False, saved=False, shared=True, apart=True)
        return {**super().slots(op), INVOCATION_TOKENS: slot}

    def with_other_slots(self, op: Op, W: Tensor, first: InitialValues) -> InitialValues:
        return InitialValues({**first.slots, INVOCATION_TOKENS: self.token_slot_values(op)}, first.base)

    def token_slot_values(self, op: Op) -> Tensor:
        ids = torch.tensor(self.tokens, dtype=torch.int64) + 1
        return torch.nn.functional.pad(ids, (0, self.slots(op)[INVOCATION_TOKENS].shape[0] - len(self.tokens)))

    def has_weight(self) -> bool:
        return False

    def check_merge(self, op: Op) -> str:
        return "aLoRA acts on some tokens and not on others, which no weight can"

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        A, B, *_ = slots.values()
        h = op.down(prepare_adapter_input(self, op, x, A.dtype), A)
        on = along_tokens(slots[TOKEN_GATE], h) if TOKEN_GATE in slots else None
        # Not multiplied by c: a NaN or infinity at a token where the adapter does not act would stay NaN.
        h = h if on is None else torch.where(on, h, 0)
        delta = op.up(h, B)
        if self.with_bias:
            bias = op.along_out(slots["lora_B.bias"], delta)
            delta = delta + (bias if on is None else torch.where(on, bias, 0))
        return cast(y + delta * scale, y.dtype)
