"""Hold the tensors that a fresh cache begins with: what a model keeps of an adapter's virtual tokens.

They are keys and values, or states, as if the virtual tokens had been read. Their source does not matter here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adaptc.errors import AdaptcError


@dataclass(frozen=True, eq=False)
class CachePrefix:
    """The cache's contents for ``count`` virtual tokens, in ``tensors``: one for each tensor of the cache.

    Each tensor is (1, ...), or (rows, ...) where rows have virtual tokens of their own. ``counts_padding`` says how
    position_ids count. With True they are cache positions with padding counted, as in PEFT's prompt methods. With False
    those of a text follow from its attention_mask. ``left_padding`` (rows,) is the number of empty positions before a
    row's own virtual tokens; None where every row has ``count`` of them.
    """

    tensors: Sequence[Tensor]
    count: int
    counts_padding: bool = False
    left_padding: Tensor | None = None

    def repeated_for(self, rows: int) -> list[Tensor]:
        """Return copies of the tensors for ``rows`` rows; each row is repeated for the sequences of its prompt.

        Raises AdaptcError where ``rows`` is not a multiple of the tensors' rows.
        """
        each = self._repeats(rows)
        return [t.repeat_interleave(each, 0).contiguous() for t in self.tensors]

    def left_padding_for(self, rows: int) -> Tensor | None:
        """Return ``left_padding`` for ``rows`` rows, repeated as in :meth:`repeated_for`."""
        return None if self.left_padding is None else self.left_padding.repeat_interleave(self._repeats(rows), 0)

    def _repeats(self, rows: int) -> int:
        own = self.tensors[0].shape[0]
        if rows % own:
            raise AdaptcError(
                f"the adapter puts other tokens in front of each of {own} rows, and the cache is for {rows}: give as "
                "many"
            )
        return rows // own
