"""Compute how images of any resolution are cut into tiles, and how the features of their tiles become tokens.

LLaVA-NeXT and models after it scale an image down to a whole. They also scale it to the best of some resolutions, and
cut that into tiles of one size. Tokens are the features of the whole, then those of the tiles as one field, without the
rows or columns that padded the image. A token for a new line follows each row.

transformers computes this in Python for each image. Here it is done with tensors, whose numbers are the same: Python's
floats are torch's float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: by how much a field may exceed the most tokens before it is scaled down
_SLACK = 1.1


@dataclass(frozen=True)
class Tiling:
    """The way a model cuts its images.

    Attributes:
        resolutions: the heights and widths of fields of tiles, in pixels.
        size: the height and width of a tile, in pixels.
        side: the height and width of a tile, in features.
        most: a field is scaled down to about the features of so many tiles; None for models that scale none down.
    """

    resolutions: tuple[tuple[int, int], ...]
    size: int
    side: int
    most: int | None = None

    def count_tiles(self, sizes: Tensor) -> Tensor:
        """Return how many tiles images of these ``sizes`` (images, 2) have, the whole among them; int64 (images,)."""
        return self._fields(sizes).prod(1) + 1

    def _fields(self, sizes: Tensor) -> Tensor:
        """Return the height and width of each image's field in tiles, int64 (images, 2)."""
        height, width = sizes.double().unsqueeze(2).unbind(1)
        table = torch.tensor(self.resolutions, device=sizes.device)
        scale = torch.minimum(table[:, 1] / width, table[:, 0] / height)
        effective = torch.minimum((width * scale).trunc() * (height * scale).trunc(), width * height)
        wasted = table.prod(1) - effective
        is_best = effective == effective.amax(1, keepdim=True)
        return table[torch.where(is_best, wasted, torch.inf).argmin(1)] // self.size

    def pack(self, features: Tensor, sizes: Tensor, counts: Tensor, newline: Tensor | None) -> Tensor:
        """Return the tokens (tokens, width) of images with these ``sizes`` (images, 2), one image after another.

        ``features`` (tiles, side * side, width) are those of all tiles, and ``counts`` (images,) of which so many
        belong to each image. An image with one tile is a whole alone, with one new line behind it. ``newline``
        (width,) is None for no new lines.
        """
        per_tile = features.shape[1]
        fields = self._fields(sizes)
        area = unpadded_areas(sizes, fields * self.side)
        height, width = self._scaled_down(area)
        breaks = int(newline is not None)
        is_tiled = counts > 1
        more = torch.where(is_tiled, height * (width + breaks), breaks)
        longest = max((h // self.size * self.side) * (w // self.size * self.side + 1) for h, w in self.resolutions)
        number = torch.arange(per_tile + longest, device=features.device)
        image, number = (number < per_tile + more.unsqueeze(1)).nonzero().unbind(1)
        first = (counts.cumsum(0) - counts)[image] * per_tile
        behind = (number - per_tile).clamp(min=0)
        across = (width[image] + breaks).clamp(min=1)
        row, column = behind // across, behind % across
        is_break = (number >= per_tile) & ((column == width[image]) | ~is_tiled[image])
        column = torch.minimum(column, width[image] - 1).clamp(min=0)

        def read(row: Tensor, column: Tensor) -> Tensor:
            down, right = row + area.top[image], column + area.left[image]
            tile = 1 + down // self.side * fields[image, 1] + right // self.side
            inner = down % self.side * self.side + right % self.side
            at = torch.where(number < per_tile, number, tile * per_tile + inner)
            return features.flatten(0, 1)[torch.where(is_break, 0, first + at)]

        if self.most is None:
            tokens = read(row, column)
        else:
            upper, lower, down = _sources(row, height[image], area.height[image])
            left, right, over = _sources(column, width[image], area.width[image])
            down, over = (t.unsqueeze(1).to(features.dtype) for t in (down, over))
            top = read(upper, left) * (1 - over) + read(upper, right) * over
            tokens = top * (1 - down) + (read(lower, left) * (1 - over) + read(lower, right) * over) * down
        return tokens if newline is None else torch.where(is_break.unsqueeze(1), newline.to(tokens), tokens)

    def _scaled_down(self, area: Areas) -> tuple[Tensor, Tensor]:
        """Return the heights and widths of fields in tokens, int64 (images,)."""
        if self.most is None:
            return area.height, area.width
        ratio = ((area.height * area.width).double() / (self.most * self.side**2)).sqrt()
        is_large, ratio = ratio > _SLACK, ratio.unsqueeze(0)
        sides = torch.stack([area.height, area.width])
        smaller = torch.div(sides.double(), ratio, rounding_mode="floor").long()
        height, width = torch.where(is_large, smaller, sides).unbind(0)
        return height, width


@dataclass(frozen=True)
class Areas:
    """The parts of fields that are no padding, in features; int64 (images,)."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def unpadded_areas(sizes: Tensor, fields: Tensor) -> Areas:
    """Return the parts of ``fields`` (images, 2), in features, that images of these ``sizes`` (images, 2) fill."""
    own_height, own_width = sizes.double().unbind(1)
    height, width = fields.unbind(1)
    is_wide = own_width / own_height > width / height.double()
    new_height = _rounded(own_height * (width / own_width))
    new_width = _rounded(own_width * (height / own_height))
    top = torch.where(is_wide, (height - new_height) // 2, 0)
    left = torch.where(is_wide, 0, (width - new_width) // 2)
    return Areas(top, left, height - 2 * top, width - 2 * left)


def _rounded(value: Tensor) -> Tensor:
    """Return ``int(round(value, 7))``."""
    return ((value * 1e7).round() / 1e7).long()


def _sources(index: Tensor, size: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for entries of an axis of ``size`` the two entries of its ``source`` that each is between, and the second
    one's weight.

    That is as ``torch.nn.functional.interpolate`` does in mode "bilinear". A ``source`` is not smaller than its axis.
    """
    at = (index.float() + 0.5) * (source / size.clamp(min=1)) - 0.5
    lower = torch.minimum(at.long(), source - 1)
    return lower, torch.minimum(lower + 1, source - 1), at - lower
