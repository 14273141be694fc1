"""The cache that a caller holds: keys and values of every layer, for some rows and the positions seen so far.

It belongs to whoever made it: nothing of it is in a program, so one program serves any number of them in any threads,
and the memory goes with the object. It grows as it is needed. It is a ``transformers.Cache`` as far as generation asks:
beams reorder it, assisted decoding cuts it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.layout import CacheLayout

#: positions by which caches grow, at least
_STEP = 64


class StepCache:
    """``length`` positions of ``rows`` rows are filled; ``mask`` says which of them may be seen (batch, length)."""

    #: transformers would otherwise build masks for it, and compile
    is_compileable = False
    is_croppable = True
    is_initialized = True

    def __init__(self, layout: CacheLayout, owner: Any, max_length: int, device: torch.device) -> None:
        self.layout, self.owner, self.max_length, self.device = layout, owner, max_length, device
        #: positions that a caller knows will be needed; no more memory than for these is taken at once
        self.expected: int | None = None
        self.length = 0
        self.rows = 0
        self.tensors: list[Tensor] = []
        self.mask = torch.ones(0, 0, dtype=torch.int64, device=device)

    # -- memory --------------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Positions that there is memory for."""
        return self.tensors[0].shape[2] if self.tensors else 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def reserve(self, rows: int, length: int) -> None:
        """Room for so many positions in all; what is there stays."""
        if self.tensors and length <= self.room:
            return
        wanted = -(-(length + length // 8) // _STEP) * _STEP
        if self.expected is not None and self.expected >= length:
            wanted = min(wanted, -(-self.expected // 8) * 8)
        wanted = min(max(wanted, length), self.max_length)
        old, self.rows = self.tensors, rows
        new = []
        for i, shape in enumerate(self.layout.shapes(rows, wanted)):
            # Zeros: what is masked is multiplied by zero, and must be finite.
            made = torch.zeros(shape, dtype=self.layout.dtype, device=self.device)
            if old:
                made[:, :, : self.length] = old[i][:, :, : self.length]
            new.append(made)
        mask = torch.ones(rows, wanted, dtype=torch.int64, device=self.device)
        if old:
            mask[:, : self.length] = self.mask[:, : self.length]
        self.tensors, self.mask = new, mask

    @property
    def padded(self) -> bool:
        """Whether positions that were filled may not be seen."""
        return self.length > 0 and not bool(self.mask[:, : self.length].all())

    def copy(self) -> Self:
        """One of its own memory, to go on from here in another way."""
        new = type(self)(self.layout, self.owner, self.max_length, self.device)
        new.length, new.rows = self.length, self.rows
        new.tensors, new.mask = [t.clone() for t in self.tensors], self.mask.clone()
        return new

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copy()

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
        self.length = 0
        self.mask.fill_(1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions; a positive number is how many stay, as transformers once
        had it."""
        if tokens_to_remove > 0:
            self.length = min(self.length, tokens_to_remove)
        else:
            self.length = max(0, self.length + tokens_to_remove)
        if self.tensors:
            self.mask[:, self.length :] = 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same, of any number of rows."""
        index = indices.to(self.device)
        self.tensors = [t.index_select(0, index) for t in self.tensors]
        self.mask, self.rows = self.mask.index_select(0, index), index.shape[0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one behind the other."""
        self.tensors = [t.repeat_interleave(repeats, 0) for t in self.tensors]
        self.mask, self.rows = self.mask.repeat_interleave(repeats, 0), self.rows * repeats

    def activate_past_recording(self) -> None:
        """Nothing is ever dropped, so cutting works anyhow."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise AdaptcError("this cache is written by the step program it is of: give it to gen.generate or gen.forward")

    def __repr__(self) -> str:
        return f"StepCache({self.rows} rows, {self.length} positions, room for {self.room} of {self.max_length})"


@cache
def cache_class() -> type:
    """:class:`StepCache` that is a ``transformers.Cache``."""
    from transformers.cache_utils import Cache

    return type("StepCache", (StepCache, Cache), {"__module__": __name__, "__hash__": object.__hash__})
