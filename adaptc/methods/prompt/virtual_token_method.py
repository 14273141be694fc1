"""Define the base class of methods that put virtual tokens, or a KV prefix, in front of a call's tokens.

It extends attention_mask, position_ids and token_type_ids. The number of virtual tokens is the size of a slot, so that
a swap may change it; zero virtual tokens are the identity. A subclass defines its slots, and the embeddings, or the
keys and values, of the virtual tokens.

In a model with an encoder and a decoder an adapter may have rows for each of the two stacks. Its slots then have shape
(2, count, ...). Its files have (2 * count, ...), the encoder's rows first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import CheckpointError
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.coefficients import ExtraValues
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.method_part import Slot, Slots
from adaptc.passes.protocol.parts.size_rule import SizeRule
from adaptc.passes.protocol.program_method import ProgramMethod

PROMPT_EMBEDDINGS = "prompt_embeddings"


class VirtualTokenFiles(FileFormat):
    method: VirtualTokenMethod

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        return f"prompt_encoder.{adapter}.{self.method.peft_names.get(slot, slot)}"


class VirtualTokenSizes(SizeRule):
    method: VirtualTokenMethod

    def rank(self) -> int:
        return self.method.count

    def with_sizes_of(self, op: Op, slots: Slots) -> Any:
        if PROMPT_EMBEDDINGS not in slots or slots[PROMPT_EMBEDDINGS].ndim < 2:
            return self.method
        *stacks, count, _ = slots[PROMPT_EMBEDDINGS].shape
        return replace(self.method, count=count if stacks else count // self.method.sides)


@dataclass(frozen=True)
class VirtualTokenMethod(ProgramMethod):
    """A method with ``count`` virtual tokens.

    ``count`` is the number of rows of the slot :data:`PROMPT_EMBEDDINGS`, unless :meth:`virtual_token_count` is
    overridden.
    ``sides``: the number of stacks (1 or 2) for which there are ``count`` rows each.
    """

    swappable: ClassVar[frozenset[str]] = frozenset({"count", "first", "training"})
    #: slot -> its name in PEFT's prompt encoder module
    peft_names: ClassVar[Mapping[str, str]] = {PROMPT_EMBEDDINGS: "embedding.weight"}
    files = VirtualTokenFiles(names=(PROMPT_EMBEDDINGS,))
    sizes = VirtualTokenSizes(exact=True)

    count: int = 0
    #: the scheme of the first values, in a form of the subclass's own
    first: tuple[Any, ...] = ()
    sides: int = 1

    # -- places --------------------------------------------------------------------------------------------------------

    def virtual_token_count(self, slots: Slots) -> int:
        return slots[PROMPT_EMBEDDINGS].shape[-2]

    def tokens(self, value: Tensor, slots: Slots, given: ExtraValues, plain: int) -> Tensor:
        return self.pad_front(value, slots, plain)

    def attention_mask(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        return self.pad_front(value, slots, 1)

    def position_ids(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        n = self.virtual_token_count(slots)
        own = torch.arange(n, dtype=value.dtype, device=value.device).expand(value.shape[0], -1)
        return torch.cat([own, value + n], 1)

    def token_type_ids(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        return self.pad_front(value, slots, 0)

    def pad_front(self, value: Tensor, slots: Slots, fill: int) -> Tensor:
        return F.pad(value, (self.virtual_token_count(slots), 0), value=fill)

    # -- sizes and names -----------------------------------------------------------------------------------------------

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return replace(self, count=0).filled(op, W, dtype)

    def config_from_model(self, op: Op) -> dict[str, Any]:
        return {"token_dim": op.out_features}

    # -- stacks --------------------------------------------------------------------------------------------------------

    def rows_slot(self, width: int, *before: int) -> Slot:
        """Return the slot for the rows of all stacks: (*before[, sides], count, width), with ``count`` free."""
        stacks = (self.sides,) if self.sides > 1 else ()
        shape = (*before, *stacks, self.count, width)
        return Slot(shape, free=(len(shape) - 2,))

    def split_stacks(self, name: str, rows: Tensor, axis: int = 0) -> Tensor:
        """Return ``rows`` as files have them with ``axis`` split into (sides, count), or as they are for one stack.

        Raises CheckpointError for a tensor without ``axis`` + 2 axes, and for rows that ``sides`` does not divide.
        """
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

    def join_stacks(self, rows: Tensor, axis: int = 0) -> Tensor:
        """Return ``rows`` as files have them: the inverse of :meth:`split_stacks`."""
        return rows if self.sides == 1 else rows.flatten(axis, axis + 1)

    def conflict_with(self, other: Any) -> str:
        # A KV prefix leaves the first tokens of the program alone, so it does not clash with virtual tokens.
        same = isinstance(other, VirtualTokenMethod) and self.changes("past_key_values") == other.changes(
            "past_key_values"
        )
        return "the first tokens" if same else ""
