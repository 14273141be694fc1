"""Find patches among those of images of any sizes, as indices.

The patches of all images are in one row. Those of a frame are in raster order, or in blocks of ``merge`` x ``merge``,
as :mod:`image_grids` says. transformers cuts the row into images, and gives each the shape of its grid. Here each patch
that is looked for gets an index into the row.

How many there are may follow from the sizes of images alone. A trace then has a size that it knows nothing of.

Private torch use, with the public route that was tried: ``torch._check``, by which a trace knows that such a size is
not zero. Attention branches on that. Public: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.capture.vision.image_grids import PatchPlaces, place_patches


def true_indices(mask: Tensor) -> Tensor:
    """Return the indices (found,) of the true entries of ``mask``, whose axes count as one. There must be one."""
    found = mask.flatten().nonzero()[:, 0]
    torch._check(found.shape[0] != 0)  # noqa: SLF001
    return found


def index_patches(places: PatchPlaces, row: Tensor, column: Tensor, merge: int) -> Tensor:
    """Return the indices of the patches at ``row`` and ``column`` of the frames of ``places``, in blocks of ``merge``.

    All have the shape of the tensors in ``places``.
    """
    block = row // merge * (places.width // merge) + column // merge
    inner = row % merge * merge + column % merge
    return places.start + places.frame * places.height * places.width + block * merge * merge + inner


def sort_into_blocks(grid: Tensor, count: int, merge: int) -> Tensor:
    """Return for ``count`` patches in the order of blocks their indices in raster order, int64 (count,)."""
    places = place_patches(grid, count, merge)
    return index_patches(places, places.row, places.column, 1)


def find_blocks(sizes: Tensor, count: int, merge: int) -> Tensor:
    """Return the indices of the patches of each whole block, int64 (blocks, merge * merge).

    ``sizes`` (images, 2) are heights and widths in patches, of ``count`` patches in raster order. Rows and columns
    beyond the last whole block are in none.
    """
    places = place_patches(F.pad(sizes, (1, 0), value=1), count, 1)
    at_start = (places.row % merge == 0) & (places.column % merge == 0)
    is_whole = (places.row + merge <= places.height) & (places.column + merge <= places.width)
    first = true_indices(at_start & is_whole).unsqueeze(1)
    inner = torch.arange(merge * merge, device=sizes.device)
    return first + inner // merge * places.width[first] + inner % merge


def find_centres(grid: Tensor, count: int, merges: Tensor) -> Tensor:
    """Return the indices of the four patches around the middle of each block, int64 (blocks, 4).

    ``merges`` (images,) is the side of the blocks of each image. The four are one patch where that side is odd.
    """
    places = place_patches(grid, count, merges)
    side = merges[places.image]
    first = true_indices((places.row % side == 0) & (places.column % side == 0))
    side = side[first].unsqueeze(1)
    near = torch.arange(4, device=grid.device)
    return first.unsqueeze(1) + (side - 1 + near // 2) // 2 * side + (side - 1 + near % 2) // 2


def find_neighbours(grid: Tensor, count: int, merge: int, reach: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the patches around each patch, in blocks of ``merge``, and which of them there are.

    Both are (count, side * side), with a side of ``2 * reach + 1`` patches, in raster order. The index of a patch
    beyond the edge is that of another.
    """
    places = place_patches(grid, count, merge)
    found, is_there = list[Tensor](), list[Tensor]()
    for down in range(-reach, reach + 1):
        for across in range(-reach, reach + 1):
            row, column = places.row + down, places.column + across
            inside = (row >= 0) & (row < places.height) & (column >= 0) & (column < places.width)
            found.append(torch.where(inside, index_patches(places, row, column, merge), 0))
            is_there.append(inside)
    return torch.stack(found, 1), torch.stack(is_there, 1)


def number_frames(grid: Tensor, count: int) -> Tensor:
    """Return the number of each patch's frame from 1 on, and 0 for patches of images with one frame; int64 (count,)."""
    places = place_patches(grid, count, 1)
    return torch.where(places.frames > 1, places.frame + 1, 0)


def merge_frames(grid: Tensor, count: int, height: int, width: int) -> tuple[Tensor, Tensor, int]:
    """Return where each patch goes as blocks of ``height`` x ``width`` are made of the mean over a video's frames.

    These are int64 indices (count,) among the patches of all blocks, the weights (count,) of the patches, float32, and
    the number of blocks.
    """
    places = place_patches(grid, count, 1)
    blocks = (grid[:, 1] // height) * (grid[:, 2] // width)
    first = (blocks.cumsum(0) - blocks)[places.image]
    block = first + places.row // height * (places.width // width) + places.column // width
    inner = places.row % height * width + places.column % width
    starts = (places.frame == 0) & (inner == 0)
    return block * (height * width) + inner, 1.0 / places.frames.float(), true_indices(starts).shape[0]


@dataclass(frozen=True)
class RealPatches:
    """The patches of images that are padded to one size; all tensors are int64 (patches,).

    Attributes:
        index: its index among those of all padded images, in raster order.
        image: the index of its image.
        row, column: its place in the image.
    """

    index: Tensor
    image: Tensor
    row: Tensor
    column: Tensor


def find_real_patches(sizes: Tensor, rows: int, columns: int) -> RealPatches:
    """Return the patches that are no padding, of images (images, rows, columns) whose own ``sizes`` are (images, 2)."""
    number = torch.arange(rows * columns, device=sizes.device)
    row, column = number // columns, number % columns
    index = true_indices((row < sizes[:, :1]) & (column < sizes[:, 1:]))
    number = index % (rows * columns)
    return RealPatches(index, index // (rows * columns), number // columns, number % columns)
