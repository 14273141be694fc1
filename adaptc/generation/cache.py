"""The cache that a caller holds: keys and values of every layer, for some rows and the positions seen so far.

It belongs to whoever made it: nothing of it is in a program, so one program serves any number of them in any threads,
and the memory goes with the object. It grows as it is needed, in layers that look back on a window up to that. It is a
``transformers.Cache`` as far as generation asks: beams reorder it, assisted decoding cuts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, shown
from adaptc.generation.layout import CacheLayout
from adaptc.generation.opening import Opening
from adaptc.generation.ring import Extent, repacked, ring_size

#: positions by which caches grow, at least
_STEP = 64


class StepCache:
    """``length`` positions of ``rows`` rows are filled; ``mask`` says which of them may be seen (batch, length)."""

    #: transformers would otherwise build masks for it, and compile
    is_compileable = False
    is_initialized = True

    def __init__(
        self, layout: CacheLayout, owner: Any, max_length: int, device: torch.device, window: int | None = None
    ) -> None:
        self.layout, self.owner, self.max_length, self.device = layout, owner, max_length, device
        #: positions that sliding layers keep at least, in rings; None where they keep all
        self.window = window
        #: of :attr:`tensors`, which get a new one whenever there are new ones
        self.extent = Extent()
        #: whether a step writes to it, or was interrupted while it did, so that nobody knows what it holds
        self.unfinished = False
        #: whether a generation goes on with it, whose steps alone may write to it
        self.generating = False
        #: whether all positions are kept from now on, to be taken back
        self.recording = False
        #: positions that a caller knows will be needed; no more memory than for these is taken at once
        self.expected: int | None = None
        #: what it begins with; None for nothing
        self.front: Opening | None = None
        self.length = 0
        self.rows = 0
        #: empty places in front of what each row begins with; None where there are none
        self.ahead: Tensor | None = None
        #: coefficient -> the position from which each row is adapted (see ``acting``)
        self.since: dict[str, Tensor] = {}
        self.tensors: list[Tensor] = []
        self.mask = torch.ones(0, 0, dtype=torch.int64, device=device)

    @property
    def first(self) -> int:
        """The first position that the rings hold."""
        return self.extent.first

    @property
    def top(self) -> int:
        """The position after the last that was ever written to the rings."""
        return self.extent.top

    @property
    def begun(self) -> int:
        """Positions that were in it before any text."""
        return 0 if self.front is None else self.front.count

    @property
    def in_places(self) -> bool:
        """Whether the positions of its tokens are their places, padding counted."""
        return self.front is not None and self.front.in_places

    def begin(self, front: Opening) -> None:
        """Nothing is in it but ``front``, from now on. It gets memory with the first step, which says for how many
        rows."""
        empty = {**self._emptied(), "tensors": [], "ahead": None, "since": {}}
        marks = {"unfinished": False, "generating": False}
        self._set(front=front, length=front.count, extent=Extent(0, front.count), **marks, **empty)

    def _begin(self, rows: int) -> None:
        """For so many rows, some of which may have the same text. Raises AdaptcError where it is for others."""
        assert self.front is not None
        tensors, extent = self.front.for_rows(rows), Extent(0, self.begun)
        self._set(tensors=tensors, ahead=self.front.ahead_of(rows), extent=extent)
        self.mask = self.opened(rows)

    def opened(self, rows: int) -> Tensor:
        """The mask of what it begins with, for so many rows."""
        ahead = self._ahead(rows)
        places = torch.arange(self.begun, device=self.device).expand(rows, -1)
        return torch.ones_like(places) if ahead is None else (places >= ahead[:, None]).long()

    def behind(self, mask: Tensor) -> Tensor:
        """The mask of a text, with that of what the cache begins with in front."""
        return torch.cat([self.opened(mask.shape[0]).to(mask), mask], 1)

    def shown(self, mask: Tensor) -> Tensor:
        """A mask of all positions, less the places in front that are empty."""
        if self.begun == 0:
            return mask
        first = mask[:, : self.begun] * self.opened(mask.shape[0]).to(mask)
        return torch.cat([first, mask[:, self.begun :]], 1)

    def _ahead(self, rows: int) -> Tensor | None:
        """:attr:`ahead`, or what it will be for so many rows."""
        if self.tensors or self.front is None:
            return None if self.ahead is None else self._of_prompts(self.ahead, rows)
        return self.front.ahead_of(rows)

    def _of_prompts(self, values: Tensor, rows: int) -> Tensor:
        """Of what is known of each row, that of so many prompts, of which each may have several rows."""
        return values[:: max(len(values) // rows, 1)]

    def whole(self, mask: Tensor) -> Tensor:
        """The mask of a text that begins with what is in the cache: what may not be seen there, and what ``mask``
        (prompts, tokens) leaves out. Positions that it began with are in front."""
        whole = self.behind(mask) if self.begun else mask.clone()
        if self.tensors:
            whole[:, : self.length] *= self._of_prompts(self.mask[:, : self.length], mask.shape[0]).to(whole)
        return whole

    def places(self, rows: int, tokens: int) -> Tensor:
        """The places of so many new tokens, as a row has them alone: (1, tokens), or (rows, tokens)."""
        at, ahead = torch.arange(self.length, self.length + tokens, device=self.device)[None], self._ahead(rows)
        return at if ahead is None else at - ahead[:, None]

    def positions(self, counted: Tensor | None) -> Tensor | None:
        """Of new tokens (rows, tokens) in a text, ``counted`` by what is seen; None for their places. Where they are
        their places, rows with nothing in front have them as they were counted."""
        if counted is None or not self.in_places:
            return counted
        ahead = self._ahead(counted.shape[0])
        if ahead is None:
            return None
        return torch.where((ahead == self.begun)[:, None], counted.to(self.device), self.places(*counted.shape))

    # -- memory --------------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Positions that there is memory for."""
        return self.mask.shape[1] if self.tensors else 0

    @property
    def ring(self) -> int | None:
        """Places of the rings."""
        if self.window is None or not self.tensors:
            return None
        return next(t.shape[2] for t, sliding in zip(self.tensors, self.layout.sliding, strict=True) if sliding)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def reserve(self, rows: int, length: int) -> None:
        """Room for so many positions in all; what is there stays."""
        if self.tensors and length <= self.room:
            return
        if self.front is not None and not self.tensors:
            self._begin(rows)
        wanted = -(-(length + length // 8) // _STEP) * _STEP
        if self.expected is not None and self.expected >= length:
            wanted = min(wanted, -(-self.expected // 8) * 8)
        wanted = min(max(wanted, length), self.max_length)
        self.rows = rows
        mask = torch.ones(rows, wanted, dtype=torch.int64, device=self.device)
        if self.tensors:
            mask[:, : self.length] = self.mask[:, : self.length]
        ring = None if self.window is None else wanted if self.recording else min(wanted, self.window)
        self._move(rows, wanted, ring)
        self.mask = mask

    def fit(self, tokens: int) -> None:
        """Rings are large enough for a step of so many tokens, and not much larger."""
        now = self.ring
        if self.window is None or now is None:
            return
        size = self.room if self.recording else ring_size(self.window, self.length, tokens, self.room, now)
        if size != now:
            self._move(self.rows, self.room, size)

    def _move(self, rows: int, room: int, ring: int | None) -> None:
        """What is there to tensors of other sizes."""
        old, now, extent = self.tensors, self.ring, Extent(self.first, self.top)
        new: list[Tensor] = []
        if now is not None and ring is not None:
            extent = Extent(max(self.first, self.length - min(now, ring)), self.length)
        for i, shape in enumerate(self.layout.shapes(rows, room, ring)):
            if old and old[i].shape == shape:
                new.append(old[i])
                continue
            # Zeros: what is masked is multiplied by zero, and must be finite.
            made = torch.zeros(shape, dtype=self.layout.dtype, device=self.device)
            kept = extent.first if ring is not None and self.layout.sliding[i] else 0
            new.append(repacked(old[i] if old else None, made, kept, self.length))
        self._set(tensors=new, extent=extent)

    def writes(self, length: int) -> None:
        """A step is about to fill so many positions: what it writes over is held no more, whether it ends or not."""
        ring, top = self.ring, max(self.top, length)
        self.extent.first = self.first if ring is None else max(self.first, top - ring)
        self.extent.top = top

    def wrote(self, length: int) -> None:
        """So many positions are filled now, by a step."""
        self.length = length

    def held(self) -> list[Tensor]:
        """The tensors of all positions so far, of a cache that keeps them."""
        return [t[:, :, : self.length].contiguous() for t in self.tensors]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer (rows, heads, length, width), those of the program's own pass. Raises
        AdaptcError where not all positions are kept or may be seen, and for states."""
        self.check_finished()
        if len(self.layout.of_passes(1).names) != 2 * len(self):
            raise AdaptcError("this cache keeps states, and no keys and values of single tokens")
        if not self.tensors:
            raise AdaptcError("nothing is in this cache yet: gen.prefill(input_ids) gives one of a text")
        if self.first:
            raise AdaptcError(
                f"layers that look back on {self.window} positions keep those from {self.first} on: "
                "cache.activate_past_recording(), before the first step, keeps all"
            )
        if self.padded:
            raise AdaptcError("some positions of this cache are padding: give a text without")
        held = self.held()[: 2 * len(self)]
        return iter(list(zip(held[::2], held[1::2], strict=True)))

    def seen(self, length: int) -> list[Tensor]:
        """The tensors as far as so many positions go."""
        ring = self.ring
        cut = [ring is None or not sliding or max(self.top, length) <= ring for sliding in self.layout.sliding]
        return [t[:, :, :length] if c else t for t, c in zip(self.tensors, cut, strict=True)]

    @property
    def padded(self) -> bool:
        """Whether positions that were filled may not be seen."""
        return self.length > 0 and not bool(self.mask[:, : self.length].all())

    def copy(self) -> Self:
        """One of its own memory, to go on from here in another way."""
        new = type(self)(self.layout, self.owner, self.max_length, self.device, self.window)
        new.length, new.rows, new.front = self.length, self.rows, self.front
        new.extent, new.recording, new.unfinished = Extent(self.first, self.top), self.recording, self.unfinished
        new.since = {n: t.clone() for n, t in self.since.items()}
        new.tensors, new.mask, new.ahead = [t.clone() for t in self.tensors], self.mask.clone(), self.ahead
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

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.max_length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def __len__(self) -> int:
        return len(self.layout.layers)

    @property
    def batch_size(self) -> int:
        return self.rows

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    is_linear = is_dummy = is_sliding

    def reset(self) -> None:
        """As if nothing had been computed."""
        if self.front is not None:
            self.begin(self.front)
            return
        empty = {"mask": torch.ones_like(self.mask), "length": 0, "extent": Extent(), "since": {}}
        self._set(unfinished=False, generating=False, **empty | self._emptied())

    def _emptied(self) -> dict[str, Any]:
        """What else is another one where nothing has been computed."""
        return {}

    def can_crop(self, length: int) -> bool:
        """Whether what comes after so many positions can be computed from what is kept."""
        return self.window is None or length == 0 or max(0, length - self.window + 1) >= self.first

    def check_crop(self, left: int) -> None:
        """Raises AdaptcError where so many positions cannot be gone on from."""
        if not self.can_crop(left):
            raise AdaptcError(
                f"{left} positions would be left of {self.length}, and layers that look back on {self.window} keep "
                f"those from {self.first} on: compute the text again with gen.prefill(input_ids)"
            )

    @property
    def is_croppable(self) -> bool:
        return self.recording or self.first == 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions; a positive number is how many stay, as transformers once
        had it. What it began with stays. Raises AdaptcError where sliding layers have forgotten what comes before."""
        left = min(self.length, tokens_to_remove) if tokens_to_remove > 0 else max(0, self.length + tokens_to_remove)
        left = max(left, min(self.begun, self.length))
        self.check_crop(left)
        self.length = left
        if left == 0:
            self.extent.first = self.extent.top = 0
        if self.tensors:
            self.mask[:, left:] = 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same, of any number of rows."""
        index = self._checked(indices)
        self._set(rows=index.shape[0], **self._each(lambda t: t.index_select(0, index)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one behind the other."""
        if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
            raise AdaptcError(f"repeats={shown(repeats)} must be a number of one or more: how often each row is there")
        self._set(rows=self.rows * repeats, **self._each(lambda t: t.repeat_interleave(repeats, 0)))

    def _checked(self, indices: Any) -> Tensor:
        """``indices`` on the cache's device. Raises AdaptcError for what are no rows of it."""
        if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.dtype not in (torch.int64, torch.int32):
            found = f"{tuple(indices.shape)} of {indices.dtype}" if isinstance(indices, Tensor) else shown(indices)
            raise AdaptcError(f"rows of a cache are chosen by a tensor (rows,) of int64, got {found}")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.rows:
            raise AdaptcError(f"the cache has {self.rows} rows, and rows {shown(indices.tolist())} are asked for")
        return indices.to(self.device)

    def _each(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What has rows, with them changed."""
        return {
            "tensors": [change(t) for t in self.tensors],
            "since": {n: change(t) for n, t in self.since.items()},
            "ahead": None if self.ahead is None else change(self.ahead),
            "mask": change(self.mask) if self.tensors else self.mask,
        }

    def _set(self, **attributes: Any) -> None:
        """All of these at once: an interrupt comes before it, or after."""
        vars(self).update(attributes)

    # -- calls that fail -----------------------------------------------------------------------------------------------

    @property
    def intact(self) -> bool:
        """Whether the text can be gone on from, whatever a step that did not end has written."""
        return self.can_crop(self.length)

    def last_position(self) -> list[Tensor]:
        """Views of what is held of the last position, which a generation of a prompt that is all there computes once
        more."""
        last = self.length - 1
        return [t[:, :, last % t.shape[2]] for t in self.tensors] if last >= 0 else []

    def check_finished(self, inside: bool = False) -> None:
        """Raises AdaptcError where a call that wrote to it did not end. ``inside``: who asks is the generation."""
        if self.unfinished or (self.generating and not inside):
            raise AdaptcError(
                "a call that writes to this cache was interrupted, or goes on, so what the cache holds is not known: "
                "compute the text again with gen.prefill(input_ids), or call cache.reset() and give the whole text"
            )

    def activate_past_recording(self) -> None:
        """All positions are kept from now on, so that any that are computed can be taken back."""
        self.recording = True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise AdaptcError("this cache is written by the step program it is of: give it to gen.generate or gen.forward")

    def __repr__(self) -> str:
        return f"StepCache({self.rows} rows, {self.length} positions, room for {self.room} of {self.max_length})"


@cache
def cache_class() -> type:
    """:class:`StepCache` that is a ``transformers.Cache``."""
    from transformers.cache_utils import Cache

    return type("StepCache", (StepCache, Cache), {"__module__": __name__, "__hash__": object.__hash__})
