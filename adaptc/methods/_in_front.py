"""Tokens in front of those of a call: what mask, positions and token types are for them, whatever they are.

How many there are is the size of a slot, so that a swap may change it, and none at all are the identity. A method of
this kind says what its slots are, and what stands at the places: embeddings, or keys and values.

An adapter of a model with an encoder and a decoder may have rows for each of the two stacks. They are slices of its
slots, (2, count, ...), and one behind the other in files, (2 * count, ...). Those of the encoder come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import CheckpointError
from adaptc.passes.ir.coefficients import Given
from adaptc.passes.ir.method_hooks import Slot, Slots
from adaptc.passes.ir.ops import Op
from adaptc.passes.ir.program_method import ProgramMethod

PROMPT = "prompt_embeddings"


@dataclass(frozen=True)
class InFront(ProgramMethod):
    """``count``: how many tokens, which are as many as the rows of the slot :data:`PROMPT` unless :meth:`lengthens` is
    overridden. ``sides``: for how many stacks of the model there are as many rows."""

    swappable: ClassVar[frozenset[str]] = frozenset({"count", "first", "training"})
    #: slot -> what PEFT's module of the prompt calls it
    modules: ClassVar[Mapping[str, str]] = {PROMPT: "embedding.weight"}
    file_names: ClassVar[tuple[str, ...]] = (PROMPT,)

    count: int = 0
    #: how first values are made; what it holds is up to the method
    first: tuple[Any, ...] = ()
    sides: int = 1

    # -- places --------------------------------------------------------------------------------------------------------

    def lengthens(self, slots: Slots) -> int:
        return slots[PROMPT].shape[-2]

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
        if PROMPT not in slots or slots[PROMPT].ndim < 2:
            return self
        *stacks, count, _ = slots[PROMPT].shape
        return replace(self, count=count if stacks else count // self.sides)

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return replace(self, count=0).filled(op, W, dtype)

    def of_model(self, op: Op) -> dict[str, Any]:
        return {"token_dim": op.out_features}

    # -- stacks --------------------------------------------------------------------------------------------------------

    def rows_of(self, width: int, *before: int) -> Slot:
        """The slot of rows of this width for all stacks."""
        stacks = (self.sides,) if self.sides > 1 else ()
        shape = (*before, *stacks, self.count, width)
        return Slot(shape, free=(len(shape) - 2,))

    def divided(self, name: str, rows: Tensor, axis: int = 0) -> Tensor:
        """Rows as files have them, by stacks. Raises CheckpointError for what is no rows, and for a number of them that
        is not as many for each."""
        if rows.ndim != axis + 2:
            what = "a row for each token" if not axis else f"{axis + 2} axes"
            raise CheckpointError(f"{name!r} has shape {tuple(rows.shape)}; expected {what}")
        if self.sides == 1:
            return rows
        if rows.shape[axis] % self.sides:
            raise CheckpointError(
                f"{name!r} has {rows.shape[axis]} rows, and the config says that they are as many for each of "
                f"{self.sides} stacks (num_transformer_submodules)"
            )
        return rows.unflatten(axis, (self.sides, -1))

    def joined(self, rows: Tensor, axis: int = 0) -> Tensor:
        """Inverse of :meth:`divided`."""
        return rows if self.sides == 1 else rows.flatten(axis, axis + 1)

    def clash(self, other: Any) -> str:
        # Keys and values come before all tokens, and leave the first of these alone.
        same = isinstance(other, InFront) and self.changes("cached") == other.changes("cached")
        return "the first tokens" if same else ""

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        return f"prompt_encoder.{adapter}.{self.modules.get(slot, slot)}"
