"""Keep sliding-window layers no larger than their window: position p lies at p modulo the size of a ring buffer.

For steps of T tokens, a ring has at least window + T - 1 places, or one for every position. So no token of a step
overwrites a position that another one attends to, and the step needs no copy of the ring. The last position alone
determines which position lies at which place.

transformers makes its masks for positions that lie in order. While a model is captured with rings, the mask functions
are given the position at each place instead. Everything else in a mask is the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import CaptureError

#: the part of the window, 1 / _SLACK, that a ring may keep beyond what it must before it is made smaller
_SLACK = 8


@dataclass(frozen=True, eq=False)
class RingPositions:
    """The position at each place of a ring after a step, int64; negative where the place is empty.

    It is passed where transformers expects the offset of positions that lie in order.
    """

    positions: Tensor

    @classmethod
    def after(cls, slots: Tensor, size: Any) -> RingPositions:
        last = slots[-1]
        return cls(last - torch.remainder(last - torch.arange(size, device=slots.device), size))


@dataclass
class Extent:
    """The range of positions in tensors with rings.

    ``first`` is the first position that they hold. ``top`` is the position after the last one that was ever written.
    """

    first: int = 0
    top: int = 0


class Masks:
    """A replacement of one of transformers' mask functions that accepts :class:`RingPositions` as the offset of keys.

    ``usual`` is transformers' function. ``added`` gives a float mask that is added to the scores instead of a bool
    mask.
    """

    def __init__(self, usual: Callable[..., Any], added: bool) -> None:
        self.usual, self.added = usual, added

    def __call__(self, *args: Any, **how: Any) -> Any:
        places = how.get("kv_offset")
        if not isinstance(places, RingPositions):
            return self.usual(*args, **how)
        if args or how.get("use_vmap"):
            # The model is then captured in the next way, with all positions kept.
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
    """Run the block with :class:`Masks` in the place of transformers' "sdpa" and "eager" mask functions."""
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
    """Return how many places a ring needs for a step of ``tokens`` tokens after ``before`` others.

    There is memory for ``room`` positions, and the ring has ``now`` places. That is the result where it is enough and
    not much larger than the window or the step needs.
    """
    needed = max(min(room, window), min(before + tokens, window + tokens - 1))
    return now if needed <= now <= max(needed, min(room, window + window // _SLACK)) else needed


def repacked(old: Tensor | None, made: Tensor, first: int, length: int) -> Tensor:
    """Copy the positions from ``first`` up to ``length`` out of the ring ``old`` into ``made``, a ring of another size.

    Returns ``made``. With ``old`` None nothing is copied.
    """
    if old is not None and first < length:
        positions = torch.arange(first, length, device=made.device)
        made[:, :, positions % made.shape[2]] = old[:, :, positions % old.shape[2]]
    return made
