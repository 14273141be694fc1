"""Lay texts of different lengths out as the rows of one batch, padded or packed.

Packed, the texts of one client share rows that are as long as the longest text. ``position_ids`` begin anew with each
text, from which transformers' models tell that tokens attend to their own text alone. Texts of two clients never share
a row, since a row has one adapter.

All texts in one row would need no padding at all. But attention computes each token of a row with each other one. So
one long row costs more than the padding of several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: lengths of the texts that are packed to see whether a model keeps them apart: none of them equal, or one
_PROBED_LENGTHS = (5, 3, 4)


@dataclass(frozen=True)
class TextPlace:
    """The place of a text: its row, and the position in the row where it begins."""

    row: int
    start: int


@dataclass(frozen=True)
class TextLayout:
    """The places of texts in ``rows`` rows of ``length`` positions. ``packs``: whether texts may share a row."""

    places: Sequence[TextPlace]
    rows: int
    length: int
    packs: bool

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], length: int, packs: bool) -> TextLayout:
        """Return the layout of texts of these lengths, of which none is longer than ``length``.

        Packed, each text goes to the first row with room for it, the longest first.
        """
        if not packs:
            return cls([TextPlace(i, 0) for i in range(len(lengths))], len(lengths), length, packs)
        places, filled = dict[int, TextPlace](), list[int]()
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = next((r for r, n in enumerate(filled) if n + lengths[i] <= length), len(filled))
            filled += [0] * (row == len(filled))
            places[i] = TextPlace(row, filled[row])
            filled[row] += lengths[i]
        return cls([places[i] for i in range(len(lengths))], len(filled), length, packs)

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the rows, padding counted."""
        return self.rows * self.length

    def lay_out(self, values: Sequence[Tensor], fill: float) -> Tensor:
        """Return values (length of the text,), one for each text, as rows (rows, length), and ``fill`` elsewhere."""
        out = torch.full((self.rows, self.length), fill, dtype=values[0].dtype)
        for place, value in zip(self.places, values, strict=True):
            out[place.row, place.start : place.start + len(value)] = value
        return out

    def take(self, rows: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Return what rows (rows, at least length) have at each text, views (length of the text,)."""
        return [rows[p.row, p.start : p.start + n] for p, n in zip(self.places, lengths, strict=True)]

    def inputs(self, ids: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the inputs of texts (length of the text,) as rows, int64 (rows, length).

        They are ``input_ids``, and ``position_ids`` where texts are packed, else ``attention_mask``.
        """
        found = {"input_ids": self.lay_out(ids, 0)}
        if self.packs:
            return found | {"position_ids": self.lay_out([torch.arange(len(t)) for t in ids], 0)}
        return found | {"attention_mask": self.lay_out([torch.ones_like(t) for t in ids], 0)}


def join_inputs(parts: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Return the inputs of several layouts of one length as rows of one batch, on ``device``."""
    return {n: torch.cat([p[n] for p in parts]).to(device) for n in parts[0]}


def example_packed_inputs(vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """Return inputs of packed rows, with sizes that a capture leaves free."""
    layout = TextLayout.of_lengths([7, 4, 3, 5, 2], 7, True)
    ids = [torch.arange(n) % vocab_size for n in (7, 4, 3, 5, 2)]
    return {n: t.to(device) for n, t in layout.inputs(ids).items()}


@torch.no_grad()
def keeps_texts_apart(program: Any, vocab_size: int, device: torch.device) -> bool:
    """Return whether ``program`` computes each text of a packed row as it computes the text alone.

    Other tokens in the first text must not change the others at all, and each must have its own positions.
    """
    draw = torch.Generator().manual_seed(0)
    layout = TextLayout.of_lengths(_PROBED_LENGTHS, sum(_PROBED_LENGTHS), True)
    texts = [torch.randint(0, vocab_size, (n,), generator=draw) for n in _PROBED_LENGTHS]
    other = [(texts[0] + 1) % vocab_size, *texts[1:]]

    def logits_of(ids: Sequence[Tensor], places: TextLayout) -> list[Tensor]:
        # Twice, for some programs take no batch of one row.
        inputs = {n: t.repeat(2, 1).to(device) for n, t in places.inputs(ids).items()}
        return places.take(program(**inputs).logits, [len(t) for t in ids])

    one, two = logits_of(texts, layout), logits_of(other, layout)
    alone = [logits_of([t], TextLayout.of_lengths([len(t)], len(t), True))[0] for t in texts]
    scale = max(float(t.abs().max()) for t in alone)
    return all(torch.equal(a, b) for a, b in zip(one[1:], two[1:], strict=True)) and all(
        float((a - b).abs().max()) <= 0.02 * scale for a, b in zip(one, alone, strict=True)
    )
