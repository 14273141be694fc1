"""The cache of an encoder-decoder: what was made of the encoder's states, once, beside the decoder's own positions.

Before: a cache with nothing in it but what an adapter begins the decoder's positions with, or one that ``gen.prefill``
gave. After :meth:`CrossCache.see`: it knows the states, which of them may be seen, and their keys and values, for rows
that are decoded from then on. All rows move together: beams that are put in order, repeated or chosen take their states
with them. Who asks for its length is told of decoded tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, Self

from torch import Tensor

from adaptc.generation.cache import StepCache


class CrossCache(StepCache):
    """``states`` (rows, positions, hidden), ``states_mask`` (rows, positions), and ``cross``, the keys and values of
    the states, layer by layer; None and nothing before there are states."""

    states: Tensor | None = None
    states_mask: Tensor | None = None
    cross: Sequence[Tensor] = ()

    @property
    def decoded(self) -> int:
        """How many tokens were decoded."""
        return self.length - self.begun

    def see(self, states: Tensor, mask: Tensor, cross: Sequence[Tensor]) -> None:
        """All that is decoded with it reads these states."""
        self.rows, self.states, self.states_mask, self.cross = states.shape[0], states, mask, tuple(cross)

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(t.nbytes for t in self.cross)

    def copy(self) -> Self:
        """One of its own memory, to go on from here in another way. States are never written to, and shared."""
        new = super().copy()
        new.states, new.states_mask, new.cross = self.states, self.states_mask, self.cross
        return new

    def reset(self) -> None:
        super().reset()
        self.rows, self.states, self.states_mask, self.cross = 0, None, None, ()
        self.tensors, self.mask = [], self.mask.new_ones(0, 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.decoded

    get_query_offset = get_seq_length

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove + self.begun if tokens_to_remove > 0 else tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        index = indices.to(self.device)
        self._each(lambda t: t.index_select(0, index))
        self.rows = index.shape[0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, 0))
        self.rows *= repeats

    def _each(self, change: Any) -> None:
        self.tensors = [change(t) for t in self.tensors]
        self.mask = change(self.mask) if self.tensors else self.mask
        self.ahead = None if self.ahead is None else change(self.ahead)
        self.cross = tuple(change(t) for t in self.cross)
        if self.states is not None and self.states_mask is not None:
            self.states, self.states_mask = change(self.states), change(self.states_mask)

    # -- as transformers' own whisper reads one ------------------------------------------------------------------------

    @property
    def self_attention_cache(self) -> Any:
        return _layers([t[:, :, : self.length] for t in self.tensors])

    @property
    def cross_attention_cache(self) -> Any:
        return _layers(self.cross)

    def __repr__(self) -> str:
        of = 0 if self.states is None else self.states.shape[1]
        return f"CrossCache({self.rows} rows of {of} states, {self.length} positions of {self.max_length})"


def _layers(tensors: Sequence[Tensor]) -> Any:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=values) for keys, values in pairs])


@cache
def cross_cache_class() -> type:
    """:class:`CrossCache` that is a ``transformers.Cache``."""
    from transformers.cache_utils import Cache

    return type("CrossCache", (CrossCache, Cache), {"__module__": __name__, "__hash__": object.__hash__})
