"""Give a cache the methods that transformers calls, and make each change to it all or nothing.

A change of rows is one update of the attributes. A call that writes to a cache of its caller does so in a
:class:`CacheChange`. So an interrupt leaves all or nothing changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, short_repr
from adaptc.generation.cache.cache_layout import CacheLayout, check_row_indices
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.cache.sliding_window import RingRange
from adaptc.torch_typing import attributes_of


class CacheInterface:
    """The part of a cache of keys and values that ``transformers.generate`` calls."""

    layout: CacheLayout
    max_length: int
    device: torch.device
    sliding_window: int | None
    ring_range: RingRange
    keeps_all_positions: bool
    prefix: CachePrefix | None
    length: int
    rows: int
    left_padding: Tensor | None
    active_from: dict[str, Tensor]
    tensors: list[Tensor]
    mask: Tensor
    #: (rows,) by how much the position after a prompt with images exceeds its number of tokens; None for texts
    position_offset: Tensor | None = None
    #: the position from which all tokens are counted with that offset
    offset_from: int = 0

    @property
    def ring_start(self) -> int:
        """Return the first position that the rings hold."""
        return self.ring_range.start

    @property
    def ring_high_water(self) -> int:
        """Return the position after the last one that was ever written to the rings."""
        return self.ring_range.high_water

    @property
    def prefix_length(self) -> int:
        """Return the number of positions that the cache began with, for virtual tokens."""
        return 0 if self.prefix is None else self.prefix.count

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    get_max_cache_shape = get_max_length

    def __len__(self) -> int:
        return len(self.layout.layers)

    @property
    def batch_size(self) -> int:
        return self.rows

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    is_linear = is_dummy = is_sliding

    def can_crop(self, length: int) -> bool:
        """Return whether the next token could be computed from the first ``length`` positions."""
        return self.sliding_window is None or length == 0 or max(0, length - self.sliding_window + 1) >= self.ring_start

    def check_crop(self, new_length: int) -> None:
        """Raise AdaptcError where the cache cannot be cropped to ``new_length`` positions."""
        if self.position_offset is not None and 0 < new_length < self.offset_from:
            raise AdaptcError(
                f"{new_length} positions would be left, and the prompt's images or audio, which are read as a whole, "
                f"take {self.offset_from}: keep these, or give the prompt anew without the cache"
            )
        if not self.can_crop(new_length):
            raise AdaptcError(
                f"{new_length} positions would be left of {self.length}, and layers that look back on "
                f"{self.sliding_window} keep those from {self.ring_start} on: compute the text again with "
                "gen.prefill(input_ids)"
            )

    @property
    def is_croppable(self) -> bool:
        return self.keeps_all_positions or self.ring_start == 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions; the virtual tokens that the cache began with stay.

        A positive ``tokens_to_remove`` is the number of positions that stay, as in older transformers. Raises
        AdaptcError where sliding-window layers have dropped positions that the next token attends to.
        """
        left = min(self.length, tokens_to_remove) if tokens_to_remove > 0 else max(0, self.length + tokens_to_remove)
        left = max(left, min(self.prefix_length, self.length))
        self.check_crop(left)
        self.length = left
        if left == 0:
            self.ring_range.start = self.ring_range.high_water = 0
            self.position_offset = None
        if self.tensors:
            self.mask[:, left:] = 1

    def offset_positions(self, position_ids: Tensor | None, tokens: int) -> Tensor | None:
        """Return the position_ids of the next ``tokens`` tokens, after the mask of these was written.

        ``position_ids`` is None, (rows, tokens) as counted by the attention mask, or (axes, rows, tokens) of a prompt
        with images. What such a prompt adds to the count is kept, for the tokens after it.
        """
        if position_ids is not None and position_ids.ndim == 3:
            if self.length == 0:
                mask, positions = self.mask[:, :tokens], position_ids.to(self.device)
                offset = positions[..., -1].amax(0) + 1 - mask.sum(1)
                counted = mask.cumsum(1) - 1 + offset[:, None]
                differs = ((positions != counted).any(0) & mask.bool()).any(0).nonzero()
                start = int(differs[-1]) + 1 if len(differs) else 0
                self._set_attributes(position_offset=offset, offset_from=start)
            return position_ids
        if self.position_offset is None:
            return position_ids
        if position_ids is None:
            seen = self.mask[:, : self.length].sum(1, keepdim=True)
            position_ids = seen + torch.arange(tokens, device=self.device)
        return position_ids.to(self.device) + self.position_offset[:, None]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (rows,), in this order; a row may be there several times."""
        index = check_row_indices(indices, self.rows).to(self.device)
        self._set_attributes(rows=index.shape[0], **self._map_rows(lambda t: t.index_select(0, index)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, one copy after another."""
        given: Any = repeats  # callers may give anything
        if not isinstance(given, int) or isinstance(given, bool) or repeats < 1:
            raise AdaptcError(
                f"repeats={short_repr(repeats)} must be a number of one or more: how often each row is there"
            )
        self._set_attributes(rows=self.rows * repeats, **self._map_rows(lambda t: t.repeat_interleave(repeats, 0)))

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the attributes that have rows, by name, with ``change`` applied to each tensor."""
        return {
            "tensors": [change(t) for t in self.tensors],
            "active_from": {n: change(t) for n, t in self.active_from.items()},
            "left_padding": None if self.left_padding is None else change(self.left_padding),
            "position_offset": None if self.position_offset is None else change(self.position_offset),
            "mask": change(self.mask) if self.tensors else self.mask,
        }

    def _set_attributes(self, **attributes: Any) -> None:
        """Set all attributes in one update, so that an interrupt leaves all or none of them changed."""
        vars(self).update(attributes)


class CacheChange:
    """A context in which a call writes to the cache ``past``, all or nothing.

    After a call that ended, the cache holds what the call wrote. After one that raised or was interrupted, at whatever
    line, the cache is as it was. A step may have overwritten what that needs, such as a state or entries of a ring.
    Then the cache is marked as unfinished, and every later call refuses it.

    ``generating`` says that all steps of a generation write, and not one step. The cache is marked from the first line
    to the last, so no interrupt goes unnoticed, in the block or in this class.
    """

    def __init__(self, past: Any, generating: bool = False) -> None:
        self.past, self.flag_name = past, "generating" if generating else "unfinished"
        self.restore_point: dict[str, Any] = {}
        self.saved_last_position: list[Any] = []

    def __enter__(self) -> None:
        past = self.past
        kept = dict(attributes_of(past), mask=past.mask.clone())
        if self.flag_name == "generating" and past.length:
            self.saved_last_position = [t.clone() for t in past.last_position()]
        self.restore_point = kept
        attributes_of(past)[self.flag_name] = True

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # The mark is removed last: a call that is interrupted before that counts as failed.
        attributes_of(self.past).update(
            {self.flag_name: self.restore_point[self.flag_name]} if kind is None else self._restore()
        )

    def _restore(self) -> dict[str, bool]:
        """Restore the cache, which stays marked until that is done, and return the marks that it has then."""
        past, kept = self.past, self.restore_point
        attributes_of(past).update(kept, unfinished=True)
        for now, was in zip(past.last_position(), self.saved_last_position, strict=False):
            now.copy_(was)
        if not past.is_intact and past.length <= past.prefix_length:
            past.reset()  # the cache holds nothing but virtual tokens
        return {"unfinished": kept["unfinished"] or not past.is_intact}
