"""Keep the keys and values of every layer, for the rows of a batch and the positions computed so far.

A cache belongs to its caller. The program holds no part of it, so one program serves any number of caches in any
threads. It grows as needed; a sliding-window layer grows no further than its window and the tokens of a step. It is a
``transformers.Cache`` as far as generation needs one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.cache.cache_interface import CacheInterface
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.cache.sliding_window import RingRange, choose_ring_size, copy_ring

#: the multiple of positions to which a cache grows
_GROWTH_MULTIPLE = 64


class StepCache(CacheInterface):
    """A cache of keys and values for ``rows`` rows, with ``length`` positions filled.

    ``mask`` (rows, room), int64, is the attention mask over all positions that there is memory for.
    """

    #: False, since transformers would otherwise build masks for the cache and compile the step
    is_compileable = False
    is_initialized = True

    def __init__(
        self, layout: CacheLayout, owner: Any, max_length: int, device: torch.device, sliding_window: int | None = None
    ) -> None:
        self.layout, self.owner, self.max_length, self.device = layout, owner, max_length, device
        #: the positions that sliding-window layers keep at least; None where every layer keeps all
        self.sliding_window = sliding_window
        #: the positions that the rings in :attr:`tensors` cover; replaced whenever the tensors are
        self.ring_range = RingRange()
        #: whether a step writes to the cache, or was interrupted while it did
        self.unfinished = False
        #: whether a generation uses the cache, whose own steps alone may write to it
        self.generating = False
        #: whether all positions are kept from now on, so that any of them can be cropped
        self.keeps_all_positions = False
        #: how many positions the caller will need, None if unknown; no more memory is taken in advance
        self.expected_length: int | None = None
        #: the virtual tokens that it begins with, or None
        self.prefix: CachePrefix | None = None
        self.length = 0
        self.rows = 0
        #: (rows,) how many positions before each row's virtual tokens are empty; None for none
        self.left_padding: Tensor | None = None
        #: coefficient name -> (rows,) the position from which each row is adapted (see ``token_gates``)
        self.active_from: dict[str, Tensor] = {}
        self.tensors: list[Tensor] = []
        self.mask = torch.ones(0, 0, dtype=torch.int64, device=device)

    @property
    def counts_padding(self) -> bool:
        """Return whether position_ids are cache positions, with padding counted."""
        return self.prefix is not None and self.prefix.counts_padding

    def start_with_prefix(self, prefix: CachePrefix) -> None:
        """Empty the cache and let it begin with ``prefix``.

        Memory is allocated by the first step, which says how many rows there are.
        """
        empty: dict[str, Any] = {**self._empty_attributes(), "tensors": [], "left_padding": None, "active_from": {}}
        empty["position_offset"] = None
        marks = {"unfinished": False, "generating": False}
        self._set_attributes(
            prefix=prefix, length=prefix.count, ring_range=RingRange(0, prefix.count), **marks, **empty
        )

    def _allocate_prefix(self, rows: int) -> None:
        """Allocate the virtual tokens for ``rows`` rows; several rows may belong to one prompt.

        Raises AdaptcError where ``rows`` is no multiple of :attr:`prefix`'s rows.
        """
        assert self.prefix is not None
        tensors, extent = self.prefix.repeated_for(rows), RingRange(0, self.prefix_length)
        self._set_attributes(tensors=tensors, left_padding=self.prefix.left_padding_for(rows), ring_range=extent)
        self.mask = self.prefix_mask(rows)

    def prefix_mask(self, rows: int) -> Tensor:
        """Return the mask (rows, prefix_length) of the virtual tokens, int64: 0 at empty positions."""
        ahead = self._left_padding_for(rows)
        places = torch.arange(self.prefix_length, device=self.device).expand(rows, -1)
        return torch.ones_like(places) if ahead is None else (places >= ahead[:, None]).long()

    def prepend_prefix_mask(self, mask: Tensor) -> Tensor:
        """Prepend the mask of the virtual tokens to ``mask`` (rows, tokens); returns (rows, prefix_length + tokens)."""
        return torch.cat([self.prefix_mask(mask.shape[0]).to(mask), mask], 1)

    def mask_without_prefix_padding(self, mask: Tensor) -> Tensor:
        """Return ``mask`` (rows, positions) with zeros at the empty positions before each row's virtual tokens."""
        if self.prefix_length == 0:
            return mask
        first = mask[:, : self.prefix_length] * self.prefix_mask(mask.shape[0]).to(mask)
        return torch.cat([first, mask[:, self.prefix_length :]], 1)

    def _left_padding_for(self, rows: int) -> Tensor | None:
        """Return :attr:`left_padding` for ``rows`` rows, or what it will be once memory is allocated."""
        if self.tensors or self.prefix is None:
            return None if self.left_padding is None else self._first_row_per_prompt(self.left_padding, rows)
        return self.prefix.left_padding_for(rows)

    def _first_row_per_prompt(self, values: Tensor, rows: int) -> Tensor:
        """Return the entries of ``values`` (cache rows, ...) for ``rows`` prompts.

        The entry of a prompt is that of its first row.
        """
        return values[:: max(len(values) // rows, 1)]

    def full_mask(self, mask: Tensor) -> Tensor:
        """Return the mask (prompts, prefix_length + tokens) of a text whose first tokens are in the cache.

        A position is masked where ``mask`` (prompts, tokens) or the cache's own mask leaves it out.
        """
        whole = self.prepend_prefix_mask(mask) if self.prefix_length else mask.clone()
        if self.tensors:
            whole[:, : self.length] *= self._first_row_per_prompt(self.mask[:, : self.length], mask.shape[0]).to(whole)
        return whole

    def next_position_ids(self, rows: int, tokens: int) -> Tensor:
        """Return the positions of the next ``tokens`` tokens, int64, counted from each row's first virtual token.

        The shape is (1, tokens), or (rows, tokens) where the cache has empty positions at its beginning.
        """
        at, ahead = (
            torch.arange(self.length, self.length + tokens, device=self.device)[None],
            self._left_padding_for(rows),
        )
        return at if ahead is None else at - ahead[:, None]

    def adjust_position_ids(self, position_ids: Tensor | None) -> Tensor | None:
        """Return the position_ids (rows, tokens) of new tokens; None leaves them to :meth:`next_position_ids`.

        ``position_ids`` (rows, tokens) are the position_ids that follow from the attention mask, or None. Unless
        :attr:`counts_padding` they are returned; else only rows without virtual tokens keep them.
        """
        if position_ids is None or not self.counts_padding:
            return position_ids
        ahead = self._left_padding_for(position_ids.shape[0])
        if ahead is None:
            return None
        return torch.where(
            (ahead == self.prefix_length)[:, None],
            position_ids.to(self.device),
            self.next_position_ids(*position_ids.shape),
        )

    # -- memory --------------------------------------------------------------------------------------------------------

    @property
    def allocated_length(self) -> int:
        """Return the number of positions that there is memory for."""
        return self.mask.shape[1] if self.tensors else 0

    @property
    def ring_length(self) -> int | None:
        """Return the number of positions in each ring; None where the cache has no rings or no memory yet."""
        if self.sliding_window is None or not self.tensors:
            return None
        return next(t.shape[2] for t, sliding in zip(self.tensors, self.layout.is_sliding, strict=True) if sliding)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def reserve(self, rows: int, length: int) -> None:
        """Allocate memory for at least ``length`` positions of ``rows`` rows, and keep the filled ones."""
        if self.tensors and length <= self.allocated_length:
            return
        if self.prefix is not None and not self.tensors:
            self._allocate_prefix(rows)
        new_length = -(-(length + length // 8) // _GROWTH_MULTIPLE) * _GROWTH_MULTIPLE
        if self.expected_length is not None and self.expected_length >= length:
            new_length = min(new_length, -(-self.expected_length // 8) * 8)
        new_length = min(max(new_length, length), self.max_length)
        self.rows = rows
        mask = torch.ones(rows, new_length, dtype=torch.int64, device=self.device)
        if self.tensors:
            mask[:, : self.length] = self.mask[:, : self.length]
        ring = (
            None
            if self.sliding_window is None
            else new_length
            if self.keeps_all_positions
            else min(new_length, self.sliding_window)
        )
        self._reallocate(rows, new_length, ring)
        self.mask = mask

    def resize_rings(self, tokens: int) -> None:
        """Resize the rings so that they are large enough for a step of ``tokens`` tokens, and not much larger."""
        now = self.ring_length
        if self.sliding_window is None or now is None:
            return
        size = (
            self.allocated_length
            if self.keeps_all_positions
            else choose_ring_size(self.sliding_window, self.length, tokens, self.allocated_length, now)
        )
        if size != now:
            self._reallocate(self.rows, self.allocated_length, size)

    def _reallocate(self, rows: int, length: int, ring: int | None) -> None:
        """Move the filled positions to tensors for ``length`` positions, with rings of ``ring`` positions (None: no
        rings)."""
        old_tensors, now, ring_range = self.tensors, self.ring_length, RingRange(self.ring_start, self.ring_high_water)
        new_tensors: list[Tensor] = []
        if now is not None and ring is not None:
            ring_range = RingRange(max(self.ring_start, self.length - min(now, ring)), self.length)
        for i, shape in enumerate(self.layout.shapes(rows, length, ring)):
            if old_tensors and old_tensors[i].shape == shape:
                new_tensors.append(old_tensors[i])
                continue
            # Zeros: masked values are multiplied by zero, and must be finite.
            made = torch.zeros(shape, dtype=self.layout.dtype, device=self.device)
            kept = ring_range.start if ring is not None and self.layout.is_sliding[i] else 0
            new_tensors.append(copy_ring(old_tensors[i] if old_tensors else None, made, kept, self.length))
        self._set_attributes(tensors=new_tensors, ring_range=ring_range)

    def write_mask(self, mask: Tensor | None, tokens: int) -> None:
        """Write the attention mask of the next ``tokens`` positions, for which there is memory.

        ``mask`` (rows, positions) covers the filled positions, too; None where no new token is padding.
        """
        end = self.length + tokens
        if mask is None:
            self.mask[:, self.length : end] = 1
        else:
            self.mask[:, :end] = self.mask_without_prefix_padding(mask)

    def begin_write(self, length: int) -> None:
        """Note that a step is about to fill the cache up to ``length`` positions.

        Positions that it overwrites in a ring count as dropped at once.
        """
        ring, top = self.ring_length, max(self.ring_high_water, length)
        self.ring_range.start = self.ring_start if ring is None else max(self.ring_start, top - ring)
        self.ring_range.high_water = top

    def end_write(self, length: int) -> None:
        """Note that a step has filled the cache up to ``length`` positions."""
        self.length = length

    def filled_tensors(self) -> list[Tensor]:
        """Return what is filled of each tensor."""
        return [t[:, :, : self.length].contiguous() for t in self.tensors]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the (keys, values) of each layer, (rows, heads, length, width), in the program's own pass.

        Raises AdaptcError where the cache is empty or unfinished, keeps states, or lacks or masks positions.
        """
        self.check_finished()
        if len(self.layout.with_passes(1).names) != 2 * len(self):
            raise AdaptcError("this cache keeps states, and no keys and values of single tokens")
        if not self.tensors:
            raise AdaptcError("nothing is in this cache yet: gen.prefill(input_ids) gives one of a text")
        if self.ring_start:
            raise AdaptcError(
                f"layers that look back on {self.sliding_window} positions keep those from {self.ring_start} on: "
                "cache.activate_past_recording(), before the first step, keeps all"
            )
        if self.has_padding:
            raise AdaptcError("some positions of this cache are padding: give a text without")
        held = self.filled_tensors()[: 2 * len(self)]
        return iter(list(zip(held[::2], held[1::2], strict=True)))

    def view_up_to(self, length: int) -> list[Tensor]:
        """Return the tensors cut to the first ``length`` positions; a ring stays whole once it has wrapped."""
        ring = self.ring_length
        cut = [
            ring is None or not sliding or max(self.ring_high_water, length) <= ring
            for sliding in self.layout.is_sliding
        ]
        return [t[:, :, :length] if c else t for t, c in zip(self.tensors, cut, strict=True)]

    @property
    def has_padding(self) -> bool:
        """Return whether a filled position is masked."""
        return self.length > 0 and not bool(self.mask[:, : self.length].all())

    def copy(self) -> Self:
        """Return a cache with its own memory, to continue from these positions in another way."""
        new = type(self)(self.layout, self.owner, self.max_length, self.device, self.sliding_window)
        new.length, new.rows, new.prefix = self.length, self.rows, self.prefix
        new.ring_range, new.keeps_all_positions, new.unfinished = (
            RingRange(self.ring_start, self.ring_high_water),
            self.keeps_all_positions,
            self.unfinished,
        )
        new.active_from = {n: t.clone() for n, t in self.active_from.items()}
        new.position_offset, new.offset_from = self.position_offset, self.offset_from
        new.tensors, new.mask, new.left_padding = (
            [t.clone() for t in self.tensors],
            self.mask.clone(),
            self.left_padding,
        )
        return new

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            "a cache cannot be pickled, for it belongs to what it was made with: keep the tokens, and compute them "
            "again with gen.prefill(input_ids)"
        )

    # -- what transformers asks of a cache -----------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all that was computed; the virtual tokens that the cache begins with stay."""
        if self.prefix is not None:
            self.start_with_prefix(self.prefix)
            return
        empty: dict[str, Any] = {"mask": torch.ones_like(self.mask), "length": 0, "ring_range": RingRange()}
        empty |= {"active_from": {}, "position_offset": None}
        self._set_attributes(unfinished=False, generating=False, **empty | self._empty_attributes())

    def _empty_attributes(self) -> dict[str, Any]:
        """Return the further attributes, by name, that a subclass has when nothing is computed."""
        return {}

    # -- calls that fail -----------------------------------------------------------------------------------------------

    @property
    def is_intact(self) -> bool:
        """Return whether the next step can go on from the cache, whatever an interrupted step has overwritten."""
        return self.can_crop(self.length)

    def last_position(self) -> list[Tensor]:
        """Return views of the last position in each tensor.

        A generation whose whole prompt is cached computes this position again, and needs its old values if it fails.
        """
        last = self.length - 1
        return [t[:, :, last % t.shape[2]] for t in self.tensors] if last >= 0 else []

    def check_finished(self, is_own_generation: bool = False) -> None:
        """Raise AdaptcError where a call that writes to the cache was interrupted or is still running.

        ``is_own_generation`` says that the generation that uses the cache is asking.
        """
        if self.unfinished or (self.generating and not is_own_generation):
            raise AdaptcError(
                "a call that writes to this cache was interrupted, or goes on, so what the cache holds is not known: "
                f"compute the text again with gen.prefill({getattr(self.owner, 'main_input_name', 'input_ids')}), or "
                "call cache.reset() and give the whole text"
            )

    def check_rows(self, rows: int) -> None:
        """Raise AdaptcError where a step of ``rows`` rows cannot be computed from the cache."""
        if self.rows and self.rows != rows:
            raise AdaptcError(f"the cache has {self.rows} rows, and the step {rows}")

    def activate_past_recording(self, recurrent_states_to_keep: int | None = None) -> None:
        """Keep all positions that are computed from now on, so that any of them can be cropped.

        A cache with recurrent states cannot be cropped, however many of them are to be kept.
        """
        self.keeps_all_positions = True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise AdaptcError("this cache is written by the step program it is of: give it to gen.generate or gen.forward")

    def __repr__(self) -> str:
        return (
            f"StepCache({self.rows} rows, {self.length} positions, room for {self.allocated_length} of "
            f"{self.max_length})"
        )


@cache
def as_transformers_cache(cls: type[StepCache]) -> Any:
    """Return a class of caches as a subclass of ``transformers.Cache``."""
    from transformers.cache_utils import Cache

    made: Any = type(cls.__name__, (cls, Cache), {"__module__": cls.__module__, "__hash__": object.__hash__})
    return made
