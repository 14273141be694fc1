"""Compute three-dimensional positions of texts with images, as tensors whose shapes do not depend on values.

Qwen2-VL and models after it give each token a position in time, height and width (M-RoPE). A token of text has the same
in all three. An image's tokens count along its axes, from the position after the text before it. The text behind goes
on after the longest side. transformers counts in a Python loop over rows and images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.capture.vision.image_grids import place_patches

IMAGE, VIDEO = 1, 2


@dataclass(frozen=True)
class Grids:
    """The images or videos of one kind of token.

    Attributes:
        kind: the number of their tokens in ``mm_token_type_ids``.
        grid: int64 (images, 3): frames, height and width in patches.
        step: the distance of frames in time, one number or one for each image.
        has_texts_between: whether a text stands between two frames of a video.
        merge_frames: how many frames of the grid are one frame of tokens.
    """

    kind: int
    grid: Tensor
    step: Tensor | float = 1.0
    has_texts_between: bool = False
    merge_frames: int = 1


def rotary_positions(kinds: Tensor, mask: Tensor | None, grids: list[Grids], merge: int) -> tuple[Tensor, Tensor]:
    """Return the positions (3, rows, length) of all tokens, and by how much each row's next position differs from its
    number of tokens (rows, 1).

    ``kinds`` (rows, length) is 0 for text, 1 for images and 2 for videos. ``mask`` (rows, length) is 0 for padding,
    whose positions are 0. Images are in the order of their tokens, row after row. A text stands between two of them.
    """
    seen = torch.ones_like(kinds, dtype=torch.bool) if mask is None else mask.bool()
    is_text = (kinds == 0) & seen
    advance = is_text.long()
    offsets = torch.zeros((3, *kinds.shape), dtype=torch.long, device=kinds.device)
    for one in grids:
        mine = (kinds == one.kind) & seen
        tokens = torch.stack([one.grid[:, 0] // one.merge_frames, one.grid[:, 1] // merge, one.grid[:, 2] // merge], 1)
        number = (mine.flatten().cumsum(0) - 1).clamp(min=0)
        places = place_patches(tokens, kinds.numel(), 1)
        step = one.step[places.image] if isinstance(one.step, Tensor) else one.step
        frame = places.frame * 0 if one.has_texts_between else (places.frame * step).long()
        own = torch.stack([frame, places.row, places.column])[:, number]
        offsets = torch.where(mine, own.reshape(3, *kinds.shape), offsets)
        # The last token of a frame, or of an image, takes the text after it past the longest side.
        ends = (places.row == places.height - 1) & (places.column == places.width - 1)
        if not one.has_texts_between:
            ends = ends & (places.frame == places.frames - 1)
        side = torch.where(ends, torch.maximum(places.height, places.width), 0)[number].reshape(kinds.shape)
        advance = torch.where(mine, side, advance)
    start = advance.cumsum(1) - advance
    positions = torch.where(seen, start + offsets, 0)
    delta = positions.amax((0, 2)) + 1 - seen.sum(1)
    return positions, delta.unsqueeze(1)
