"""Compute what a vision tower needs to know of its patches, as tensors whose shapes do not depend on values.

Towers such as Qwen2-VL's take the patches of all images in one row, and a grid (images, 3) of frames, height and width
in patches. transformers loops over the images in Python, so a captured program would know one grid alone. Here every
patch finds its image by its index. The number of patches gives all shapes, so one program takes any images.

A tower reads its patches in blocks of ``merge`` x ``merge``, the patches that it merges into one token at its end. Some
towers attend in windows, and some resample a square table of learned positions to each image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Keys' kernel for bicubic interpolation
_CUBIC = -0.75


@dataclass(frozen=True)
class PatchPlaces:
    """The places of patches; all tensors are int64 of shape (patches,).

    Attributes:
        image: the index of its image.
        start: the index of its image's first patch.
        frame: the index of its frame in the image.
        row, column: its place in the frame.
        frames, height, width: the grid of its image.
        segment: a number that patches of one frame have in common, and no others.
    """

    image: Tensor
    start: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor
    frames: Tensor
    height: Tensor
    width: Tensor
    segment: Tensor


def place_patches(grid: Tensor, count: int, merge: int | Tensor) -> PatchPlaces:
    """Return the places of ``count`` patches of images with this ``grid`` (images, 3).

    ``merge`` is an int, or a tensor (images,) where each image has its own.
    """
    sizes = grid.prod(1)
    ends = sizes.cumsum(0)
    index = torch.arange(count, device=grid.device)
    # Patches after the last image belong to it: shapes must hold, and the model itself checks the numbers.
    image = torch.bucketize(index, ends, right=True).clamp(max=grid.shape[0] - 1)
    frames, height, width = grid[image].unbind(1)
    start = (ends - sizes)[image]
    within = index - start
    frame, place = within // (height * width), within % (height * width)
    step = merge[image] if isinstance(merge, Tensor) else merge
    block, inner = place // (step * step), place % (step * step)
    blocks = width // step
    row = block // blocks * step + inner // step
    column = block % blocks * step + inner % step
    first_frame = grid[:, 0].cumsum(0) - grid[:, 0]
    return PatchPlaces(image, start, frame, row, column, frames, height, width, first_frame[image] + frame)


@dataclass(frozen=True)
class Windows:
    """The windows that a tower attends in.

    Attributes:
        order: int64 (tokens,), the tokens of the tower's end in the order of their windows.
        segment: int64 (patches,), a number that patches of one window have in common, in that order.
    """

    order: Tensor
    segment: Tensor


def sort_into_windows(grid: Tensor, count: int, merge: int, side: int) -> Windows:
    """Return the windows of ``side`` x ``side`` tokens, where a token is ``merge`` x ``merge`` of ``count`` patches."""
    tokens = place_patches(
        torch.stack([grid[:, 0], grid[:, 1] // merge, grid[:, 2] // merge], 1), count // (merge * merge), 1
    )
    # One more window than needed in each direction, as transformers pads: empty windows have no tokens.
    across = tokens.width // side + 1
    down = tokens.height // side + 1
    window = (tokens.frame * down + tokens.row // side) * across + tokens.column // side
    own = grid[:, 0] * (grid[:, 1] // merge // side + 1) * (grid[:, 2] // merge // side + 1)
    window = window + (own.cumsum(0) - own)[tokens.image]
    order = torch.argsort(window, stable=True)
    return Windows(order, window[order].repeat_interleave(merge * merge, output_size=count))


def interpolate_positions(
    places: PatchPlaces, side: int, *, mode: str, padding: str, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Return the entries of a table of ``side`` x ``side`` that each patch reads, and their weights.

    Both are (patches, taps): int64 and float32. There are 4 taps in ``mode`` "bilinear", and 16 in "bicubic". With
    ``padding`` "zeros" entries beyond the table weigh nothing, else they are those of its edge. ``align_corners`` is
    that of ``torch.nn.functional.interpolate``.
    """
    rows = _taps(places.row, places.height, side, mode, padding, align_corners)
    columns = _taps(places.column, places.width, side, mode, padding, align_corners)
    entries = rows[0].unsqueeze(2) * side + columns[0].unsqueeze(1)
    weights = rows[1].unsqueeze(2) * columns[1].unsqueeze(1)
    return entries.flatten(1), weights.flatten(1)


def resize_with_antialias(places: PatchPlaces, side: int) -> Tensor:
    """Return the weights (patches, side * side), float32, by which each patch reads a table of ``side`` x ``side``.

    They are those of ``torch.nn.functional.interpolate`` in mode "bilinear" with ``antialias``.
    """
    rows = _antialiased(places.row, places.height, side)
    columns = _antialiased(places.column, places.width, side)
    return (rows.unsqueeze(2) * columns.unsqueeze(1)).flatten(1)


def _antialiased(index: Tensor, size: Tensor, side: int) -> Tensor:
    """Return the weights (patches, side) of the entries of one axis."""
    scale = (side / size).unsqueeze(1)
    center = scale * (index.unsqueeze(1) + 0.5)
    entries = torch.arange(side, device=index.device) + 0.5
    weights = (1 - (entries - center).abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _taps(
    index: Tensor, size: Tensor, side: int, mode: str, padding: str, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Return the entries (patches, taps) of one axis and their weights."""
    at = index.float()
    if align_corners:
        source = at * (side - 1) / (size - 1).clamp(min=1)
    else:
        source = (at + 0.5) * side / size - 0.5
    low = source.floor()
    offsets = torch.arange(*((0, 2) if mode == "bilinear" else (-1, 3)), device=index.device)
    entries = low.long().unsqueeze(1) + offsets
    far = (source.unsqueeze(1) - low.unsqueeze(1) - offsets).abs()
    if mode == "bilinear":
        weights = (1 - far).clamp(min=0)
    else:
        inner = ((_CUBIC + 2) * far - (_CUBIC + 3)) * far * far + 1
        outer = ((_CUBIC * far - 5 * _CUBIC) * far + 8 * _CUBIC) * far - 4 * _CUBIC
        weights = torch.where(far <= 1, inner, outer)
    inside = entries.clamp(0, side - 1)
    return inside, weights * (entries == inside) if padding == "zeros" else weights
