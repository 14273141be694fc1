"""Replace methods of vision towers that loop over grids of images, where the replacement is found to be equal.

This is to towers what :mod:`equal_methods` is to texts. A method may get a grid, and not the number of patches, which
gives all shapes. Then the forward of its module is watched, which gets them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

from adaptc.capture.model_functions import Function, gives_the_same
from adaptc.capture.vision.image_grids import place_patches, resize_with_antialias

_TRIALS, _WIDTH = 8, 3


def equal_resizing(module: Any, original: Function, check_all: Callable[[Tensor], None]) -> dict[str, Function] | None:
    """Return methods of a module whose ``resize_positional_embeddings`` resizes a table of positions to each image,
    with antialias and in blocks; None for another one.

    ``check_all`` lets a program refuse images of one column. For these torch resizes all rows to the first.
    """
    forward, table = module.forward, ["positional_embeddings", "grid_thw", "spatial_merge_size"]
    names = list(inspect.signature(forward).parameters)
    if list(inspect.signature(original).parameters) != table or names != ["pixel_values", "grid_thw"]:
        return None
    counts: list[int] = []

    def resize(positional_embeddings: Tensor, grid_thw: Tensor, spatial_merge_size: int) -> Tensor:
        check_all(grid_thw[:, 2] > 1)
        places = place_patches(grid_thw, counts[-1], spatial_merge_size)
        weights = resize_with_antialias(places, positional_embeddings.shape[0])
        made = weights @ positional_embeddings.flatten(0, 1).float()
        return made.to(positional_embeddings.dtype)

    def watched(pixel_values: Tensor, grid_thw: Tensor) -> Any:
        counts.append(pixel_values.shape[0])
        try:
            return forward(pixel_values, grid_thw)
        finally:
            counts.pop()

    def resize_alone(**call: Any) -> Tensor:
        counts.append(int(call["grid_thw"].prod(1).sum()))
        try:
            return resize(**call)
        finally:
            counts.pop()

    found = gives_the_same(original, resize_alone, _resizing_calls(), _is_close)
    return {"resize_positional_embeddings": resize, "forward": watched} if found else None


def _is_close(want: Tensor, got: Tensor) -> bool:
    return torch.allclose(want, got, rtol=0, atol=1e-5)


def _resizing_calls() -> Iterator[dict[str, Any]]:
    draw = Random(0)
    for trial in range(_TRIALS):
        side, merge = draw.choice([2, 3, 5]), draw.choice([1, 2])
        made = torch.Generator().manual_seed(trial)
        grid = [[draw.randint(1, 2), merge * draw.randint(1, 4), merge * draw.randint(2, 4)] for _ in range(3)]
        yield {
            "positional_embeddings": torch.rand(side, side, _WIDTH, generator=made),
            "grid_thw": torch.tensor(grid), "spatial_merge_size": merge,
        }  # fmt: skip


def equal_slicing(module: Any, original: Function, check_all: Callable[[Tensor], None]) -> Function | None:
    """Return a method that pairs images with themselves, where ``original`` does that; None for another one.

    ``original`` pairs the frames of videos with the next ones, too. ``check_all`` lets a program refuse them.
    """
    merge = getattr(module, "spatial_merge_size", None)
    if list(inspect.signature(original).parameters) != ["hidden_states", "grid_thw"] or merge is None:
        return None

    def pair(hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        check_all(grid_thw[:, 0] == 1)
        return torch.cat([hidden_states, hidden_states], -1)

    def calls() -> Iterator[dict[str, Any]]:
        draw = Random(0)
        for trial in range(_TRIALS):
            grid = torch.tensor([[1, merge * draw.randint(1, 4), merge * draw.randint(1, 4)] for _ in range(3)])
            count = int(grid.prod(1).sum()) // merge**2
            states = torch.rand(count, _WIDTH, generator=torch.Generator().manual_seed(trial))
            yield {"hidden_states": states, "grid_thw": grid}

    return pair if gives_the_same(original, pair, calls()) else None
