"""Layers that look back on a window keep no more than it: position p lies at p modulo the size of a ring.

Before: a ring of R places and a step of T tokens, R being at least the window and T - 1, or all positions there are. So
nothing that a token of the step looks back on is written over by another, and the step needs no copy of the ring: which
position lies where follows from the last one.

transformers' models make their masks for positions that lie in order. While a model is captured with rings, the
functions that make masks are told the position of each place instead; all else of a mask is the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import CaptureError

#: of a window, how much more a ring may keep than it must before it is packed anew
_SLACK = 8


@dataclass(frozen=True, eq=False)
class Places:
    """Which position lies at each place of a ring, where ``slots`` are those of the step; less than 0 for none.
    Stands for the offset of positions that lie in order."""

    positions: Tensor

    @classmethod
    def after(cls, slots: Tensor, size: Any) -> Places:
        last = slots[-1]
        return cls(last - torch.remainder(last - torch.arange(size, device=slots.device), size))


@dataclass
class Extent:
    """Of tensors with rings in them: the ``first`` position that they hold, and the ``top`` one, after the last that
    was ever written to them."""

    first: int = 0
    top: int = 0


class Masks:
    """A function of transformers that makes masks, which understands :class:`Places`."""

    def __init__(self, usual: Callable[..., Any], added: bool) -> None:
        self.usual, self.added = usual, added

    def __call__(self, *args: Any, **how: Any) -> Any:
        places = how.get("kv_offset")
        if not isinstance(places, Places):
            return self.usual(*args, **how)
        if args or how.get("use_vmap"):
            # The next way to capture the model is tried then, with all positions kept.
            raise CaptureError("its masks are made of functions that take one position at a time, which rings have not")
        kept, device = places.positions, places.positions.device
        tokens = torch.arange(how["q_length"], device=device) + how["q_offset"]
        rows, heads = torch.arange(how["batch_size"], device=device), torch.arange(1, device=device)
        mask = how["mask_function"](
            rows[:, None, None, None], heads[None, :, None, None], tokens[None, None, :, None], kept[None, None, None]
        )
        seen = kept >= 0
        if how.get("attention_mask") is not None:
            seen = seen & how["attention_mask"][:, kept.clamp(min=0)]
        mask = (mask & seen[..., None, None, :]).expand(how["batch_size"], -1, how["q_length"], how["kv_length"])
        if not self.added:
            return mask
        least = torch.finfo(how["dtype"]).min
        return torch.where(mask, torch.zeros((), dtype=how["dtype"], device=device), least)


@contextlib.contextmanager
def ring_masks() -> Iterator[None]:
    """Captures inside it have :class:`Masks`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as FUNCTIONS

    usual = {name: FUNCTIONS[name] for name in ("sdpa", "eager")}
    for name, function in usual.items():
        FUNCTIONS[name] = Masks(function, added=name == "eager")  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, function in usual.items():
            FUNCTIONS[name] = function


def ring_size(window: int, before: int, tokens: int, room: int, now: int) -> int:
    """How large a ring is to be for a step of so many tokens after those ``before``, where there is room for ``room``
    positions: the window, or what the step needs; ``now`` where it is not much larger."""
    needed = max(min(room, window), min(before + tokens, window + tokens - 1))
    return now if needed <= now <= max(needed, min(room, window + window // _SLACK)) else needed


def repacked(old: Tensor | None, made: Tensor, first: int, length: int) -> Tensor:
    """``made``, a ring of another size, with the positions from ``first`` up to ``length``, which ``old`` holds."""
    if old is not None and first < length:
        positions = torch.arange(first, length, device=made.device)
        made[:, :, positions % made.shape[2]] = old[:, :, positions % old.shape[2]]
    return made
