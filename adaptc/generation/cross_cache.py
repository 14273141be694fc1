"""The cache of an encoder-decoder: what was made of the encoder's states, once, beside the decoder's own positions.

Before: a cache with nothing in it but what an adapter begins the decoder's positions with, or one that ``gen.prefill``
gave. After :meth:`CrossCache.see`: it knows the states, which of them may be seen, and their keys and values, for rows
that are decoded from then on. All rows move together: beams that are put in order, repeated or chosen take their states
with them. Who asks for its length is told of decoded tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, Self

from torch import Tensor

from adaptc.generation.cache import StepCache


class CrossCache(StepCache):
    """``states`` (rows, positions, hidden), ``states_mask`` (rows, positions), and ``cross``, the keys and values of
    the states, layer by layer; None and nothing before there are states."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.states: Tensor | None = None
        self.states_mask: Tensor | None = None
        self.cross: Sequence[Tensor] = ()

    @property
    def decoded(self) -> int:
        """How many tokens were decoded."""
        return self.length - self.begun

    def see(self, states: Tensor, mask: Tensor, cross: Sequence[Tensor]) -> None:
        """All that is decoded with it reads these states."""
        self._set(rows=states.shape[0], states=states, states_mask=mask, cross=tuple(cross))

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(t.nbytes for t in self.cross)

    def copy(self) -> Self:
        """One of its own memory, to go on from here in another way. States are never written to, and shared."""
        new = super().copy()
        new.states, new.states_mask, new.cross = self.states, self.states_mask, self.cross
        return new

    def _emptied(self) -> dict[str, Any]:
        gone = {"rows": 0, "states": None, "states_mask": None, "cross": ()}
        return {**gone, "tensors": [], "mask": self.mask.new_ones(0, 0)}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.decoded

    get_query_offset = get_seq_length

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove + self.begun if tokens_to_remove > 0 else tokens_to_remove)

    def _each(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        seen = {"states": self.states, "states_mask": self.states_mask}
        made = {name: None if t is None else change(t) for name, t in seen.items()}
        return {**super()._each(change), **made, "cross": tuple(change(t) for t in self.cross)}

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
