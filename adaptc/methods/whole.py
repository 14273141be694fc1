"""Whole parameters as slots: ``modules_to_save`` and trainable biases, and single rows: trainable tokens.

W' = slot for a whole parameter; its identity is the base itself. W'[i] = slot row for the chosen token indices i
(PEFT's trainable tokens); all other rows are the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.passes._kinds import Op, cast
from adaptc.passes._method import Attachment, Method, Slot, Slots


@dataclass(frozen=True)
class Whole(Method):
    """The parameter itself is trained. ``slot`` is its name in the file, ``place`` the module the program keeps it in.

    Buffers of a trained module (running statistics) are slots too, changed by the program but not by an optimizer.
    """

    name: ClassVar[str] = "whole"

    slot: str = "weight"
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    place: str = "modules_to_save"
    trainable: bool = True

    def slots(self, op: Op) -> dict[str, Slot]:
        return {self.slot: Slot(self.shape, dtype=self.dtype, trainable=self.trainable)}

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {self.slot: op.stored(W).detach().clone()}

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Tensor | None) -> Tensor:
        return cast(op.canonical(slots[self.slot]), W.dtype)

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        return ".".join(p for p in (place, self.place, adapter, slot) if p)


@dataclass(frozen=True)
class TokenRows(Method):
    """Rows of an embedding, or of a head tied to one, replaced by trained ones. Canonical W is (width, vocab)."""

    name: ClassVar[str] = "trainable_tokens"

    indices: tuple[int, ...] = ()

    DELTA: ClassVar[str] = "token_adapter.trainable_tokens_delta"
    INDEX: ClassVar[str] = "token_adapter.indices"

    def slots(self, op: Op) -> dict[str, Slot]:
        width, vocab = self._size(op)
        bad = [i for i in self.indices if not 0 <= i < vocab]
        if bad or len(set(self.indices)) != len(self.indices):
            raise ConfigError(
                f"token indices must be distinct and below the vocabulary size {vocab}; got {bad or 'doubles'}"
            )
        return {
            self.DELTA: Slot((len(self.indices), width), free=(0,)),
            self.INDEX: Slot((len(self.indices),), free=(0,), dtype=torch.int64, trainable=False, saved=False),
        }

    def _size(self, op: Op) -> tuple[int, int]:
        rows = op.kind == "embedding"
        return (op.out_features, op.in_features) if rows else (op.in_features, op.out_features)

    def rebind(self, config: Any, attachment: Attachment) -> Method:
        tokens = getattr(config, "trainable_token_indices", None)
        if isinstance(tokens, Mapping):
            names = (attachment.key, attachment.entry)
            tokens = next((v for k, v in tokens.items() if any(n == k or n.endswith(f".{k}") for n in names)), None)
        return self if tokens is None else TokenRows(tuple(tokens))

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        index = torch.tensor(self.indices, dtype=torch.int64, device=W.device)
        rows = W.t() if op.kind == "embedding" else W
        return {self.DELTA: rows.detach()[index].to(dtype), self.INDEX: index}

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Tensor | None) -> Tensor:
        delta, index = cast(slots[self.DELTA], W.dtype), slots[self.INDEX]
        if op.kind == "embedding":
            return torch.index_copy(W, 1, index, delta.t())
        return torch.index_copy(W, 0, index, delta)

    def has_apply(self, op: Op) -> bool:
        return op.kind in ("embedding", "linear", "addmm")

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, slots: Slots, scale: Tensor | None) -> Tensor:
        delta, index = cast(slots[self.DELTA], W.dtype), slots[self.INDEX]
        if op.kind == "embedding":
            match = x.unsqueeze(-1) == index
            row = delta[match.to(torch.int64).argmax(-1)]
            return torch.where(match.any(-1, keepdim=True), row, y)
        # What the replaced rows add to their logits; a bias of the layer stays as it is.
        change = torch.nn.functional.linear(x, delta - W[index])
        return torch.index_add(y, -1, index, change)
