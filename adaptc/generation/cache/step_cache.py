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
from adaptc.generation.cache.sliding_window import Extent, repacked, ring_size

#: the multiple of positions to which a cache grows
_STEP = 64


class StepCache(CacheInterface):
    """A cache of keys and values for ``rows`` rows, with ``length`` positions filled.

    ``mask`` (rows, room), int64, is the attention mask over all positions that there is memory for.
    """

    #: False, since transformers would otherwise build masks for the cache and compile the step
    is_compileable = False
    is_initialized = True

    def __init__(
        self, layout: CacheLayout, owner: Any, max_length: int, device: torch.device, window: int | None = None
    ) -> None:
        self.layout, self.owner, self.max_length, self.device = layout, owner, max_length, device
        #: the positions that sliding-window layers keep at least; None where every layer keeps all
        self.window = window
        #: the positions that the rings in :attr:`tensors` cover; replaced whenever the tensors are
        self.extent = Extent()
        #: whether a step writes to the cache, or was interrupted while it did
        self.unfinished = False
        #: whether a generation uses the cache, whose own steps alone may write to it
        self.generating = False
        #: whether all positions are kept from now on, so that any of them can be cropped
        self.recording = False
        #: how many positions the caller will need, None if unknown; no more memory is taken in advance
        self.expected: int | None = None
        #: the virtual tokens that it begins with, or None
        self.front: CachePrefix | None = None
        self.length = 0
        self.rows = 0
        #: (rows,) how many positions before each row's virtual tokens are empty; None for none
        self.ahead: Tensor | None = None
        #: coefficient name -> (rows,) the position from which each row is adapted (see ``token_gates``)
        self.since: dict[str, Tensor] = {}
        self.tensors: list[Tensor] = []
        self.mask = torch.ones(0, 0, dtype=torch.int64, device=device)

    @property
    def in_places(self) -> bool:
        """Return whether position_ids are cache positions, with padding counted."""
        return self.front is not None and self.front.in_places

    def begin(self, front: CachePrefix) -> None:
        """Empty the cache and let it begin with ``front``.

        Memory is allocated by the first step, which says how many rows there are.
        """
        empty = {**self._emptied(), "tensors": [], "ahead": None, "since": {}}
        marks = {"unfinished": False, "generating": False}
        self._set(front=front, length=front.count, extent=Extent(0, front.count), **marks, **empty)

    def _begin(self, rows: int) -> None:
        """Allocate the virtual tokens for ``rows`` rows; several rows may belong to one prompt.

        Raises AdaptcError where ``rows`` is no multiple of :attr:`front`'s rows.
        """
        assert self.front is not None
        tensors, extent = self.front.for_rows(rows), Extent(0, self.begun)
        self._set(tensors=tensors, ahead=self.front.ahead_of(rows), extent=extent)
        self.mask = self.opened(rows)

    def opened(self, rows: int) -> Tensor:
        """Return the mask (rows, begun) of the virtual tokens, int64: 0 at empty positions."""
        ahead = self._ahead(rows)
        places = torch.arange(self.begun, device=self.device).expand(rows, -1)
        return torch.ones_like(places) if ahead is None else (places >= ahead[:, None]).long()

    def behind(self, mask: Tensor) -> Tensor:
        """Prepend the mask of the virtual tokens to ``mask`` (rows, tokens); returns (rows, begun + tokens)."""
        return torch.cat([self.opened(mask.shape[0]).to(mask), mask], 1)

    def shown(self, mask: Tensor) -> Tensor:
        """Return ``mask`` (rows, positions) with zeros at the empty positions before each row's virtual tokens."""
        if self.begun == 0:
            return mask
        first = mask[:, : self.begun] * self.opened(mask.shape[0]).to(mask)
        return torch.cat([first, mask[:, self.begun :]], 1)

    def _ahead(self, rows: int) -> Tensor | None:
        """Return :attr:`ahead` for ``rows`` rows, or what it will be once memory is allocated."""
        if self.tensors or self.front is None:
            return None if self.ahead is None else self._of_prompts(self.ahead, rows)
        return self.front.ahead_of(rows)

    def _of_prompts(self, values: Tensor, rows: int) -> Tensor:
        """Return the entries of ``values`` (cache rows, ...) for ``rows`` prompts.

        The entry of a prompt is that of its first row.
        """
        return values[:: max(len(values) // rows, 1)]

    def whole(self, mask: Tensor) -> Tensor:
        """Return the mask (prompts, begun + tokens) of a text whose first tokens are in the cache.

        A position is masked where ``mask`` (prompts, tokens) or the cache's own mask leaves it out.
        """
        whole = self.behind(mask) if self.begun else mask.clone()
        if self.tensors:
            whole[:, : self.length] *= self._of_prompts(self.mask[:, : self.length], mask.shape[0]).to(whole)
        return whole

    def places(self, rows: int, tokens: int) -> Tensor:
        """Return the positions of the next ``tokens`` tokens, int64, counted from each row's first virtual token.

        The shape is (1, tokens), or (rows, tokens) where the cache has empty positions at its beginning.
        """
        at, ahead = torch.arange(self.length, self.length + tokens, device=self.device)[None], self._ahead(rows)
        return at if ahead is None else at - ahead[:, None]

    def positions(self, counted: Tensor | None) -> Tensor | None:
        """Return the position_ids (rows, tokens) of new tokens; None leaves them to :meth:`places`.

        ``counted`` (rows, tokens) are the position_ids that follow from the attention mask, or None. Unless
        :attr:`in_places` they are returned; else only rows without virtual tokens keep them.
        """
        if counted is None or not self.in_places:
            return counted
        ahead = self._ahead(counted.shape[0])
        if ahead is None:
            return None
        return torch.where((ahead == self.begun)[:, None], counted.to(self.device), self.places(*counted.shape))

    # -- memory --------------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Return the number of positions that there is memory for."""
        return self.mask.shape[1] if self.tensors else 0

    @property
    def ring(self) -> int | None:
        """Return the number of positions in each ring; None where the cache has no rings or no memory yet."""
        if self.window is None or not self.tensors:
            return None
        return next(t.shape[2] for t, sliding in zip(self.tensors, self.layout.sliding, strict=True) if sliding)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def reserve(self, rows: int, length: int) -> None:
        """Allocate memory for at least ``length`` positions of ``rows`` rows, and keep the filled ones."""
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
        """Resize the rings so that they are large enough for a step of ``tokens`` tokens, and not much larger."""
        now = self.ring
        if self.window is None or now is None:
            return
        size = self.room if self.recording else ring_size(self.window, self.length, tokens, self.room, now)
        if size != now:
            self._move(self.rows, self.room, size)

    def _move(self, rows: int, room: int, ring: int | None) -> None:
        """Move the filled positions to tensors for ``room`` positions, with rings of ``ring`` positions (None: no
        rings)."""
        old, now, extent = self.tensors, self.ring, Extent(self.first, self.top)
        new: list[Tensor] = []
        if now is not None and ring is not None:
            extent = Extent(max(self.first, self.length - min(now, ring)), self.length)
        for i, shape in enumerate(self.layout.shapes(rows, room, ring)):
            if old and old[i].shape == shape:
                new.append(old[i])
                continue
            # Zeros: masked values are multiplied by zero, and must be finite.
            made = torch.zeros(shape, dtype=self.layout.dtype, device=self.device)
            kept = extent.first if ring is not None and self.layout.sliding[i] else 0
            new.append(repacked(old[i] if old else None, made, kept, self.length))
        self._set(tensors=new, extent=extent)

    def writes(self, length: int) -> None:
        """Note that a step is about to fill the cache up to ``length`` positions.

        Positions that it overwrites in a ring count as dropped at once.
        """
        ring, top = self.ring, max(self.top, length)
        self.extent.first = self.first if ring is None else max(self.first, top - ring)
        self.extent.top = top

    def wrote(self, length: int) -> None:
        """Note that a step has filled the cache up to ``length`` positions."""
        self.length = length

    def held(self) -> list[Tensor]:
        """Return what is filled of each tensor."""
        return [t[:, :, : self.length].contiguous() for t in self.tensors]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the (keys, values) of each layer, (rows, heads, length, width), in the program's own pass.

        Raises AdaptcError where the cache is empty or unfinished, keeps states, or lacks or masks positions.
        """
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
        """Return the tensors cut to the first ``length`` positions; a ring stays whole once it has wrapped."""
        ring = self.ring
        cut = [ring is None or not sliding or max(self.top, length) <= ring for sliding in self.layout.sliding]
        return [t[:, :, :length] if c else t for t, c in zip(self.tensors, cut, strict=True)]

    @property
    def padded(self) -> bool:
        """Return whether a filled position is masked."""
        return self.length > 0 and not bool(self.mask[:, : self.length].all())

    def copy(self) -> Self:
        """Return a cache with its own memory, to continue from these positions in another way."""
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

    def reset(self) -> None:
        """Forget all that was computed; the virtual tokens that the cache begins with stay."""
        if self.front is not None:
            self.begin(self.front)
            return
        empty = {"mask": torch.ones_like(self.mask), "length": 0, "extent": Extent(), "since": {}}
        self._set(unfinished=False, generating=False, **empty | self._emptied())

    def _emptied(self) -> dict[str, Any]:
        """Return the further attributes, by name, that a subclass has when nothing is computed."""
        return {}

    # -- calls that fail -----------------------------------------------------------------------------------------------

    @property
    def intact(self) -> bool:
        """Return whether the next step can go on from the cache, whatever an interrupted step has overwritten."""
        return self.can_crop(self.length)

    def last_position(self) -> list[Tensor]:
        """Return views of the last position in each tensor.

        A generation whose whole prompt is cached computes this position again, and needs its old values if it fails.
        """
        last = self.length - 1
        return [t[:, :, last % t.shape[2]] for t in self.tensors] if last >= 0 else []

    def check_finished(self, inside: bool = False) -> None:
        """Raise AdaptcError where a call that writes to the cache was interrupted or is still running.

        ``inside`` says that the generation that uses the cache is asking.
        """
        if self.unfinished or (self.generating and not inside):
            raise AdaptcError(
                "a call that writes to this cache was interrupted, or goes on, so what the cache holds is not known: "
                "compute the text again with gen.prefill(input_ids), or call cache.reset() and give the whole text"
            )

    def activate_past_recording(self) -> None:
        """Keep all positions that are computed from now on, so that any of them can be cropped."""
        self.recording = True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise AdaptcError("this cache is written by the step program it is of: give it to gen.generate or gen.forward")

    def __repr__(self) -> str:
        return f"StepCache({self.rows} rows, {self.length} positions, room for {self.room} of {self.max_length})"


@cache
def cache_class() -> type:
    """Return :class:`StepCache` as a subclass of ``transformers.Cache``."""
    from transformers.cache_utils import Cache

    return type("StepCache", (StepCache, Cache), {"__module__": __name__, "__hash__": object.__hash__})
