"""What is computed of grids equals what transformers computes with loops over images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import vision_utils

from adaptc.capture.vision.image_grids import interpolate_positions, place_patches, sort_into_windows


@st.composite
def grids(draw: st.DrawFn) -> tuple[Tensor, int]:
    merge = draw(st.integers(1, 3))
    side = st.integers(1, 5).map(lambda n: n * merge)
    return torch.tensor(draw(st.lists(st.tuples(st.integers(1, 3), side, side), min_size=1, max_size=4))), merge


def count_of(grid: Tensor) -> int:
    return int(grid.prod(1).sum())


def numbered(boundaries: Tensor) -> Tensor:
    """Return a number for each patch, from the boundaries of segments."""
    lengths = (boundaries[1:] - boundaries[:-1]).long()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


@given(grids())
def test_places(drawn: tuple[Tensor, int]) -> None:
    grid, merge = drawn
    places = place_patches(grid, count_of(grid), merge)
    wanted = vision_utils.get_vision_position_ids(grid, merge, include_temporal=True)
    assert torch.equal(torch.stack([places.frame, places.row, places.column], 1), wanted)
    assert torch.equal(places.segment, numbered(vision_utils.get_vision_cu_seqlens(grid)))
    assert torch.equal(places.image, numbered(vision_utils.get_vision_cu_seqlens(grid, merge_temporal=True)))


@given(grids(), st.data())
def test_each_image_may_have_a_merge_of_its_own(drawn: tuple[Tensor, int], data: st.DataObject) -> None:
    grid, merge = drawn
    merges = torch.tensor([data.draw(st.sampled_from([1, merge])) for _ in grid])
    places = place_patches(grid, count_of(grid), merges)
    wanted = vision_utils.get_vision_position_ids(grid, merges)
    assert torch.equal(torch.stack([places.row, places.column], 1), wanted)


@given(grids(), st.integers(1, 4))
def test_windows(drawn: tuple[Tensor, int], side: int) -> None:
    grid, merge = drawn
    windows = sort_into_windows(grid, count_of(grid), merge, side)
    order, boundaries = vision_utils.get_vision_window_index(grid, merge, side * merge * 14, 14)
    assert torch.equal(windows.order, order)
    wanted = numbered(boundaries)
    assert torch.equal(windows.segment[1:] == windows.segment[:-1], wanted[1:] == wanted[:-1])
    assert len(set(windows.segment.tolist())) == len(set(wanted.tolist()))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("align_corners", [False, True])
@given(grids(), st.integers(1, 6))
def test_tables(mode: str, padding: str, align_corners: bool, drawn: tuple[Tensor, int], side: int) -> None:
    grid, merge = drawn
    places = place_patches(grid, count_of(grid), merge)
    found = interpolate_positions(places, side, mode=mode, padding=padding, align_corners=align_corners)
    wanted = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, side, mode, align_corners, spatial_merge_size=merge, padding=padding
    )
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=0)
