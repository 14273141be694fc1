"""What a fresh cache begins with, as tensors, wherever they come from.

Before: an adapter that puts tokens in front of those of a text. After: what the cache holds of them, as if they had
been read: keys and values, or states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adaptc.errors import AdaptcError


@dataclass(frozen=True, eq=False)
class Opening:
    """``tensors``: one for each of the cache's own, (1, ...), or (rows, ...) where each row of a batch has its own;
    ``count``: how many tokens they are of. ``in_places``: the positions of all tokens are their places in the cache,
    padding counted, as in PEFT's prompt methods; else those of a text follow from its mask. ``ahead``: (rows,) how many
    places are empty in front of a row's own tokens, where rows have several numbers of them; None where all have
    ``count``."""

    tensors: Sequence[Tensor]
    count: int
    in_places: bool = False
    ahead: Tensor | None = None

    def for_rows(self, rows: int) -> list[Tensor]:
        """The tensors in memory of their own, row after row as often as there are sequences of it."""
        each = self._each(rows)
        return [t.repeat_interleave(each, 0).contiguous() for t in self.tensors]

    def ahead_of(self, rows: int) -> Tensor | None:
        """``ahead``, in the same way."""
        return None if self.ahead is None else self.ahead.repeat_interleave(self._each(rows), 0)

    def _each(self, rows: int) -> int:
        own = self.tensors[0].shape[0]
        if rows % own:
            raise AdaptcError(
                f"the adapter puts other tokens in front of each of {own} rows, and the cache is for {rows}: give as "
                "many"
            )
        return rows // own
