"""Keep sliding-window layers no larger than their window: position p lies at p modulo the size of a ring buffer.

For steps of T tokens, a ring has at least window + T - 1 entries, or one for every position. So no token of a step
overwrites a position that another one attends to, and the step needs no copy of the ring. The last position alone
determines which position lies at which entry.

transformers makes its masks for positions that lie in order. While a model is captured with rings, the mask functions
are given the position at each entry instead. Everything else in a mask is the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import CaptureError

#: the part of the window, 1 / _SLACK, that a ring may keep beyond what it must before it is made smaller
_SLACK_DIVISOR = 8


@dataclass(frozen=True, eq=False)
class RingPositions:
    """The position at each entry of a ring after a step, int64; negative where the entry is empty.

    It is passed where transformers expects the offset of positions that lie in order.
    """

    positions: Tensor

    @classmethod
    def after_step(cls, slots: Tensor, size: Any) -> RingPositions:
        last = slots[-1]
        return cls(last - torch.remainder(last - torch.arange(size, device=slots.device), size))


@dataclass
class RingRange:
    """The range of positions in tensors with rings.

    ``start`` is the first position that they hold. ``high_water`` is the position after the last one that was ever
    written.
    """

    start: int = 0
    high_water: int = 0


class RingMasks:
    """A replacement of one of transformers' mask functions that accepts :class:`RingPositions` as the offset of keys.

    ``original`` is transformers' function. ``is_additive`` gives a float mask that is added to the scores instead of a
    bool mask.
    """

    def __init__(self, original: Callable[..., Any], is_additive: bool) -> None:
        self.original, self.is_additive = original, is_additive

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        places = kwargs.get("kv_offset")
        if not isinstance(places, RingPositions):
            return self.original(*args, **kwargs)
        if args or kwargs.get("use_vmap"):
            # The model is then captured in the next way, with all positions kept.
            raise CaptureError("its masks are made of functions that take one position at a time, which rings have not")
        positions, device = places.positions, places.positions.device
        tokens = torch.arange(kwargs["q_length"], device=device) + kwargs["q_offset"]
        rows, heads = torch.arange(kwargs["batch_size"], device=device), torch.arange(1, device=device)
        mask = kwargs["mask_function"](
            rows[:, None, None, None],
            heads[None, :, None, None],
            tokens[None, None, :, None],
            positions[None, None, None],
        )
        seen = positions >= 0
        if kwargs.get("attention_mask") is not None:
            seen = seen & kwargs["attention_mask"][:, positions.clamp(min=0)]
        mask = (mask & seen[..., None, None, :]).expand(
            kwargs["batch_size"], -1, kwargs["q_length"], kwargs["kv_length"]
        )
        if not self.is_additive:
            return mask
        least = torch.finfo(kwargs["dtype"]).min
        return torch.where(mask, torch.zeros((), dtype=kwargs["dtype"], device=device), least)


@contextlib.contextmanager
def ring_masks() -> Generator[None]:
    """Run the block with :class:`RingMasks` in the place of transformers' "sdpa" and "eager" mask functions."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as FUNCTIONS

    functions: Any = FUNCTIONS  # of a class without types
    usual = {name: functions[name] for name in ("sdpa", "eager")}
    for name, function in usual.items():
        functions[name] = RingMasks(function, is_additive=name == "eager")
    try:
        yield
    finally:
        for name, function in usual.items():
            functions[name] = function


def choose_ring_size(window: int, filled: int, tokens: int, allocated: int, current: int) -> int:
    """Return how many entries a ring needs for a step of ``tokens`` tokens after ``filled`` others.

    There is memory for ``allocated`` positions, and the ring has ``current`` entries. That is the result where it is
    enough and not much larger than the window or the step needs.
    """
    needed = max(min(allocated, window), min(filled + tokens, window + tokens - 1))
    return current if needed <= current <= max(needed, min(allocated, window + window // _SLACK_DIVISOR)) else needed


def copy_ring(source: Tensor | None, target: Tensor, first: int, length: int) -> Tensor:
    """Copy the positions from ``first`` up to ``length`` out of the ring ``source`` into ``target``, a ring of another
    size.

    Returns ``target``. With ``source`` None nothing is copied.
    """
    if source is not None and first < length:
        positions = torch.arange(first, length, device=target.device)
        target[:, :, positions % target.shape[2]] = source[:, :, positions % source.shape[2]]
    return target
