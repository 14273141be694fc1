"""Keep the states of a recurrent model after a text, from which its next token is computed.

A state has one size for any number of positions. It holds no single tokens, so none can be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.cache.cache_layout import HybridLayout, StateLayout
from adaptc.generation.cache.sliding_window import RingRange, copy_ring
from adaptc.generation.cache.step_cache import StepCache


class StateCache(StepCache):
    """A cache of the states after a text, whose size no length changes; no token can be taken back."""

    layout: StateLayout  # type: ignore[assignment]

    @property
    def is_croppable(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(self.layout.layer_numbers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise AdaptcError("this cache keeps states, and no keys and values of single tokens")

    def reserve(self, rows: int, length: int) -> None:
        if not self.tensors:
            self.rows = rows
            if self.prefix is not None:
                self._allocate_prefix(rows)
            else:
                self._set_attributes(
                    tensors=list(self.layout.zeros(rows, self.device).values()), ring_range=RingRange()
                )
        if length > self.mask.shape[1]:
            wider = torch.ones(rows, min(max(2 * length, 64), self.max_length), dtype=torch.int64, device=self.device)
            if self.length:
                wider[:, : self.length] = self.mask[:, : self.length]
            self.mask = wider

    def filled_tensors(self) -> list[Tensor]:
        return list(self.tensors)

    @property
    def is_intact(self) -> bool:
        return self.ring_high_water <= self.length

    def can_crop(self, length: int) -> bool:
        return length in (0, self.prefix_length, self.length)

    def check_crop(self, new_length: int) -> None:
        if not self.can_crop(new_length):
            raise AdaptcError(
                f"a state of {self.length} positions cannot be taken back to {new_length}: compute the text again with "
                "gen.prefill(input_ids), and keep copies of what you go on from"
            )

    def crop(self, tokens_to_remove: int) -> None:
        left = min(self.length, tokens_to_remove) if tokens_to_remove > 0 else max(0, self.length + tokens_to_remove)
        self.check_crop(left)
        if left <= self.prefix_length:
            self.reset()

    def _empty_attributes(self) -> dict[str, Any]:
        return {"tensors": [torch.zeros_like(t) for t in self.tensors]}

    def last_position(self) -> list[Tensor]:
        return []  # no token of a state cache is computed again


class HybridCache(StateCache):
    """A cache of keys and values, which grows with the text, and of the states after it.

    No token can be taken back, because the states cannot.
    """

    layout: HybridLayout  # type: ignore[assignment]

    def reserve(self, rows: int, length: int) -> None:
        StepCache.reserve(self, rows, length)

    def _reallocate(self, rows: int, length: int, ring: int | None) -> None:
        made = list(self.layout.zeros(rows, self.device, length).values())
        if old_tensors := self.tensors:
            grown = zip(old_tensors, made, self.layout.is_state, strict=True)
            made = [old if is_state else copy_ring(old, new, 0, self.length) for old, new, is_state in grown]
        self._set_attributes(tensors=made)

    def filled_tensors(self) -> list[Tensor]:
        filled = zip(self.tensors, self.layout.is_state, strict=True)
        return [t if is_state else t[:, :, : self.length].contiguous() for t, is_state in filled]
