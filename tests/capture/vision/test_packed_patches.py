"""Indices of packed patches are those that loops over images and over their patches give."""

from __future__ import annotations

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.models.kimi_k25 import modeling_kimi_k25 as kimi

from adaptc.capture.vision.packed_patches import (
    find_blocks,
    find_centres,
    find_neighbours,
    find_real_patches,
    merge_frames,
    number_frames,
    sort_into_blocks,
    true_indices,
)
from tests.capture.vision.test_image_grids import count_of, grids

SIDE = st.integers(1, 7)
SIZES = st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=4).map(torch.tensor)


def of_images(grid: Tensor, values: Tensor) -> list[Tensor]:
    """Return a row of values as those of each image, in the shapes of its grid."""
    return [v.reshape(g) for v, g in zip(values.split(grid.prod(1).tolist()), grid.tolist(), strict=True)]


def in_raster_order(grid: Tensor, merge: int | Tensor) -> list[Tensor]:
    """Return the indices of patches in blocks, each at its place in the image (frames, height, width)."""
    made: list[Tensor] = []
    merges = [merge] * len(grid) if isinstance(merge, int) else merge.tolist()
    start = 0
    for (frames, height, width), m in zip(grid.tolist(), merges, strict=True):
        blocks = torch.arange(frames * height * width).view(frames, height // m, width // m, m, m) + start
        made.append(blocks.permute(0, 1, 3, 2, 4).reshape(frames, height, width))
        start += frames * height * width
    return made


@given(SIZES, st.integers(1, 3))
def test_whole_blocks(sizes: Tensor, merge: int) -> None:
    grid = F.pad(sizes, (1, 0), value=1)
    images = [i for i in of_images(grid, torch.arange(count_of(grid))) if min(i.shape[1:]) >= merge]
    wanted = [F.unfold(index[None].double(), merge, stride=merge)[0].t().long() for index in images]
    if wanted:  # there must be one
        assert torch.equal(find_blocks(sizes, count_of(grid), merge), torch.cat(wanted))


@given(grids())
def test_the_order_of_blocks(drawn: tuple[Tensor, int]) -> None:
    grid, merge = drawn
    in_order = torch.cat([index.flatten() for index in in_raster_order(grid, merge)])
    assert torch.equal(sort_into_blocks(grid, count_of(grid), merge), in_order.argsort())


@given(grids(), st.sampled_from([0, 1, 2]))
def test_neighbours(drawn: tuple[Tensor, int], reach: int) -> None:
    grid, merge = drawn
    found, is_there = find_neighbours(grid, count_of(grid), merge, reach)
    assert int(found.min()) >= 0
    assert int(found.max()) < count_of(grid)
    around = list(product(range(-reach, reach + 1), repeat=2))
    for index in in_raster_order(grid, merge):
        frames, height, width = index.shape
        for frame, row, column in product(range(frames), range(height), range(width)):
            for i, (down, across) in enumerate(around):
                inside = 0 <= row + down < height and 0 <= column + across < width
                patch = index[frame, row, column]
                assert bool(is_there[patch, i]) == inside
                if inside:
                    assert found[patch, i] == index[frame, row + down, column + across]


@given(grids(), st.data())
def test_centres_scale_images_down(drawn: tuple[Tensor, int], data: st.DataObject) -> None:
    grid, merge = drawn
    merges = torch.tensor([data.draw(st.sampled_from([1, merge, 2 * merge])) for _ in grid])
    grid = torch.cat([grid[:, :1], grid[:, 1:] // merge * merges[:, None]], 1)
    values, wanted = torch.randn(count_of(grid), generator=torch.Generator().manual_seed(0)), list[Tensor]()
    for index, m in zip(in_raster_order(grid, merges), merges.tolist(), strict=True):
        size = (index.shape[1] // m, index.shape[2] // m)
        wanted.append(F.interpolate(values[index].unsqueeze(1), size=size, mode="bilinear").flatten())
    found = values[find_centres(grid, count_of(grid), merges)].mean(1)
    torch.testing.assert_close(found, torch.cat(wanted))


@given(grids(), st.integers(1, 3))
def test_frames_are_merged_as_kimi_does(drawn: tuple[Tensor, int], across: int) -> None:
    grid, down = drawn
    grid = grid * torch.tensor([1, 1, across])
    found = merge_frames(grid, count_of(grid), down, across)
    wanted = kimi.get_vision_temporal_merge_index(grid, down, across)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert found[2] == wanted[2]
    assert torch.equal(number_frames(grid, count_of(grid)), kimi.get_vision_frame_index(grid))


@given(SIZES, st.integers(0, 2))
def test_patches_that_are_no_padding(sizes: Tensor, more: int) -> None:
    rows, columns = (sizes.amax(0) + more).tolist()
    index = torch.arange(len(sizes) * rows * columns).view(len(sizes), rows, columns)
    real = find_real_patches(sizes, rows, columns)
    own = [one[:height, :width] for one, (height, width) in zip(index, sizes.tolist(), strict=True)]
    assert torch.equal(real.index, torch.cat([one.flatten() for one in own]))
    places = [(i, r, c) for i, (h, w) in enumerate(sizes.tolist()) for r in range(h) for c in range(w)]
    assert torch.equal(torch.stack([real.image, real.row, real.column], 1), torch.tensor(places))


def test_true_entries() -> None:
    assert true_indices(torch.tensor([[False, True, False], [True, False, True]])).tolist() == [1, 3, 5]
