"""Compute attention over packed texts text by text, where the mask says that each attends to its own keys alone.

A step of continuous batching packs the new tokens of all requests along one axis, and the keys of all requests along
another. The mask keeps the texts apart. One matmul over all keys computes, for many texts, scores that are almost all
masked. Here the rows of the mask are divided into segments that have no key in common. Attention is computed for each
segment with its own keys.

Results are equal up to rounding. Nothing but the mask is asked for, so every program whose attention has such a mask
gains by it. A mask that is one segment, or that has a row without a key, is computed as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from adaptc.torch_modes import has_transform_or_tangent, may_be_traced
from adaptc.torch_typing import to_python

#: the fewest scores, rows times keys, of a mask that is looked at
MIN_SCORES = 1 << 14
#: the largest share of the scores that segments may have: more, and computing them apart gains nothing
MAX_SHARE = 0.6


class MaskSegment(NamedTuple):
    """Rows that share keys with no other row: so many, their stretch of keys, and their part of the mask.

    The mask is (1, 1, rows, keys), and None where it hides nothing: attention is faster without one.
    """

    rows: int
    keys: slice
    mask: Tensor | None


class MaskSegments(NamedTuple):
    """The segments of a mask. ``order`` (rows,) has the rows of one segment after those of another, and ``places``
    (rows,) the place of each row there; both are None where the rows are in this order already."""

    segments: Sequence[MaskSegment]
    order: Tensor | None = None
    places: Tensor | None = None


def attention_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return ``scaled_dot_product_attention`` of the same arguments, computed segment by segment where that is less.

    ``query`` is (1, heads, rows, dim), ``key`` (1, heads, keys, dim) and ``value`` (1, heads, keys, dim_v).
    ``attn_mask`` is (1, 1, rows, keys), bool or float. Other shapes are computed as a whole. So is all that needs
    gradients.
    """
    divided = None
    if attn_mask is not None and dropout_p == 0.0 and _may_divide(query, key, value, attn_mask):
        divided = _segments_of(attn_mask)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if divided is None:
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    parts, first = list[Tensor](), 0
    rows = query if divided.order is None else query.index_select(2, divided.order)
    for count, keys, mask in divided.segments:
        own = rows[:, :, first : first + count]
        parts.append(scaled_dot_product_attention(own, key[:, :, keys], value[:, :, keys], mask, **options))
        first += count
    out = torch.cat(parts, 2)
    return out if divided.places is None else out.index_select(2, divided.places)


def _may_divide(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Return whether the arguments are those of one batch row on a CPU with a mask for all heads."""
    if may_be_traced():  # the trace would hold the segments of this mask
        return False
    if mask.ndim != 4 or mask.device.type != "cpu" or mask.shape[:2] != (1, 1) or query.ndim != 4:
        return False
    rows, keys = mask.shape[2:]
    if rows * keys < MIN_SCORES or query.shape[0] != 1 or (query.shape[2], key.shape[2]) != (rows, keys):
        return False
    tensors = (query, key, value, mask)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return all(type(t) is Tensor for t in tensors) and not has_transform_or_tangent(*tensors)


class _LastMask(threading.local):
    """The segments of the last mask, which is the same tensor at all layers of a call.

    ``version`` is torch's count of writes to it. Tensors of inference mode have none; ``copy`` has what was in it then.
    """

    def __init__(self) -> None:
        self.mask: Any = None
        self.version = -1
        self.copy: Tensor | None = None
        self.segments: MaskSegments | None = None

    def is_of(self, mask: Tensor) -> bool:
        """Return whether the segments are those of ``mask`` as it is now."""
        if self.mask is None or self.mask() is not mask:
            return False
        return self.version == mask._version if self.copy is None else torch.equal(self.copy, mask)

    def read(self, mask: Tensor) -> None:
        self.segments, self.mask = divide_mask(mask), ref(mask)
        self.copy = mask.clone() if mask.is_inference() else None
        self.version = -1 if mask.is_inference() else mask._version


_LAST_MASK = _LastMask()


def _segments_of(mask: Tensor) -> MaskSegments | None:
    """Return the segments of a mask, remembered for the last one; None where it is computed as a whole."""
    if not _LAST_MASK.is_of(mask):
        _LAST_MASK.read(mask)
    return _LAST_MASK.segments


def divide_mask(mask: Tensor) -> MaskSegments | None:
    """Return the segments of ``mask`` (1, 1, rows, keys); None for one that should be computed as a whole."""
    allowed = mask[0, 0] if mask.dtype == torch.bool else ~(mask[0, 0] <= torch.finfo(mask.dtype).min)  # NaN stays in
    as_numbers = allowed.view(torch.uint8)
    first = as_numbers.argmax(1)
    if not bool(allowed.gather(1, first[:, None]).all()):
        return None
    last = allowed.shape[1] - 1 - as_numbers.flip(1).argmax(1)
    stretches = _join_stretches(to_python(first), to_python(last))
    scores = sum(len(rows) * (stop - start) for rows, start, stop in stretches)
    if len(stretches) < 2 or scores > MAX_SHARE * allowed.numel():
        return None
    order = torch.tensor([row for rows, _, _ in stretches for row in sorted(rows)])
    is_sorted = bool((order[1:] > order[:-1]).all())
    own, begin, segments = mask if is_sorted else mask.index_select(2, order), 0, list[MaskSegment]()
    for rows, start, stop in stretches:
        part = own[:, :, begin : begin + len(rows), start:stop].contiguous()
        hides = not bool(part.all()) if part.dtype == torch.bool else bool(part.any())
        segments.append(MaskSegment(len(rows), slice(start, stop), part if hides else None))
        begin += len(rows)
    return MaskSegments(segments) if is_sorted else MaskSegments(segments, order, order.argsort())


def _join_stretches(first: Sequence[int], last: Sequence[int]) -> list[tuple[list[int], int, int]]:
    """Return (rows, first key, key after the last) of the rows whose stretches of keys overlap, given those of each."""
    joined: list[tuple[list[int], int, int]] = []
    for row in sorted(range(len(first)), key=lambda r: first[r]):
        if joined and first[row] < joined[-1][2]:
            rows, start, stop = joined[-1]
            rows.append(row)
            joined[-1] = rows, start, max(stop, last[row] + 1)
        else:
            joined.append(([row], first[row], last[row] + 1))
    return joined
