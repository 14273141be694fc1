"""Replace methods that loop over the images of packed patches, where the replacement is found to be equal.

The patches of all images are in one row. transformers splits the row by image, gives each image the shape of its grid,
and joins the results. A replacement finds the patches that each result is made of by :mod:`packed_patches`. It computes
all results at once with the module's own layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.model_functions import Function, gives_the_same
from adaptc.capture.vision.packed_patches import find_blocks, find_centres, find_neighbours, sort_into_blocks

_TRIALS = 4
_WIDTH = 5


def equal_packed_forward(module: Any, original: Function) -> Function | None:
    """Return a ``forward`` that gives what ``module``'s own does, or None where none is known."""
    make = _FORWARDS.get(_parameters(original))
    return None if make is None else make(module, original)


def equal_unshuffle(module: Any, original: Function) -> Function | None:
    """Return a method that scales down features as ``module.pixel_unshuffle`` does, or None where none is known."""
    if _parameters(original) != ("hidden_states", "grid_thw", "merge_sizes"):
        return None

    def unshuffle(hidden_states: Tensor, grid_thw: Tensor, merge_sizes: Tensor) -> Tensor:
        grid, merges = grid_thw.to(hidden_states.device), merge_sizes.to(hidden_states.device)
        near = hidden_states[find_centres(grid, hidden_states.shape[0], merges)]
        return ((near[:, 0] + near[:, 1]) + (near[:, 2] + near[:, 3])) * 0.25

    def calls() -> Iterator[dict[str, Any]]:
        for draw in map(Random, range(_TRIALS)):
            merges = [draw.randint(1, 4) for _ in range(draw.randint(1, 3))]
            grid = torch.tensor([_draw_grid(draw, merge) for merge in merges])
            states = _random_rows(draw, int(grid.prod(1).sum()), _WIDTH, torch.zeros(()))
            yield {"hidden_states": states, "grid_thw": grid, "merge_sizes": torch.tensor(merges)}

    return unshuffle if gives_the_same(original, unshuffle, calls()) else None


def _merger(module: Any, original: Function) -> Function | None:
    """Return the forward of a merger of blocks, whose images may have patches beside the last whole block."""
    patch, merge = getattr(module, "patch_size", None), getattr(module, "spatial_merge_size", None)
    layer = getattr(module, "merging_layer", None)
    if not isinstance(patch, int) or not isinstance(merge, int) or not isinstance(layer, nn.Linear):
        return None

    def forward(image_features: Tensor, image_sizes: Tensor) -> Tensor:
        sizes = image_sizes.to(image_features.device) // patch
        blocks = image_features[find_blocks(sizes, image_features.shape[0], merge)]
        return module.merging_layer(blocks.transpose(1, 2).flatten(1))

    def calls() -> Iterator[dict[str, Any]]:
        for draw in map(Random, range(_TRIALS)):
            sizes = [[draw.randint(merge, 4 * merge) for _ in range(2)] for _ in range(draw.randint(1, 3))]
            count = sum(height * width for height, width in sizes)
            features = _random_rows(draw, count, layer.in_features // merge**2, layer.weight)
            yield {"image_features": features, "image_sizes": torch.tensor(sizes) * patch + draw.randint(0, patch - 1)}

    return forward if gives_the_same(original, forward, calls()) else None


def _projector(module: Any, original: Function) -> Function | None:
    """Return the forward of a projector that merges the patches of blocks after a norm."""
    merge, norm = getattr(module, "merge_kernel_size", None), getattr(module, "pre_norm", None)
    layers = [getattr(module, n, None) for n in ("linear_1", "act", "linear_2")]
    if not isinstance(norm, nn.LayerNorm) or not all(isinstance(layer, nn.Module) for layer in layers):
        return None
    if not isinstance(merge, tuple) or len({*merge}) != 1:
        return None
    side: int = merge[0]

    def forward(image_features: Tensor, image_grid_thw: Tensor) -> Tensor:
        order = sort_into_blocks(image_grid_thw.to(image_features.device), image_features.shape[0], side)
        states = module.pre_norm(image_features)[order]
        states = states.reshape(-1, side * side * image_features.shape[1])
        return module.linear_2(module.act(module.linear_1(states)))

    def calls() -> Iterator[dict[str, Any]]:
        for draw in map(Random, range(_TRIALS)):
            grid = torch.tensor([_draw_grid(draw, side) for _ in range(draw.randint(1, 3))])
            features = _random_rows(draw, int(grid.prod(1).sum()), norm.normalized_shape[0], norm.weight)
            yield {"image_features": features, "image_grid_thw": grid}

    return forward if gives_the_same(original, forward, calls()) else None


def _grid_convolution(module: Any, original: Function) -> Function | None:
    """Return the forward of a convolution over the patches of each frame, which takes a list of the grid alone."""
    conv, merge = getattr(module, "spatial_conv", None), getattr(module, "spatial_merge_size", None)
    gates, last = getattr(module, "in_proj", None), getattr(module, "out_proj", None)
    if not isinstance(conv, nn.Conv2d) or not isinstance(merge, int) or not isinstance(gates, nn.Linear):
        return None
    side = conv.kernel_size[0]
    if conv.kernel_size != (side, side) or side % 2 == 0 or last is None:
        return None

    def forward(hidden_states: Tensor, grid_thw: list[Tensor], **kwargs: Any) -> Tensor:
        before, after, values = module.in_proj(hidden_states).chunk(3, dim=-1)
        values = before * values
        near, is_there = find_neighbours(grid_thw[0].to(values.device), hidden_states.shape[0], merge, side // 2)
        field = torch.where(is_there.unsqueeze(-1), values[near], 0).transpose(1, 2)
        # The layer itself is called, for what adapts it. Of each field, which it pads, the centre alone is a result.
        made = module.spatial_conv(field.unflatten(2, (side, side)))[:, :, side // 2, side // 2]
        return module.out_proj(after * made)

    def listed(hidden_states: Tensor, grid_thw: list[Tensor]) -> Tensor:
        return original(hidden_states, grid_thw=grid_thw[0].tolist())

    def calls() -> Iterator[dict[str, Any]]:
        for draw in map(Random, range(_TRIALS)):
            grid = torch.tensor([_draw_grid(draw, merge) for _ in range(draw.randint(1, 3))])
            states = _random_rows(draw, int(grid.prod(1).sum()), gates.in_features, gates.weight)
            yield {"hidden_states": states, "grid_thw": [grid]}

    return forward if gives_the_same(listed, forward, calls()) else None


#: the parameters of a module's forward -> (module, forward) -> what takes its place, or None
_FORWARDS = {
    ("image_features", "image_sizes"): _merger,
    ("image_features", "image_grid_thw"): _projector,
    ("hidden_states", "grid_thw", "kwargs"): _grid_convolution,
}


def _parameters(method: Function) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)


def _draw_grid(draw: Random, merge: int) -> list[int]:
    return [draw.randint(1, 2), merge * draw.randint(1, 3), merge * draw.randint(1, 3)]


def _random_rows(draw: Random, count: int, width: int, like: Tensor) -> Tensor:
    """Return normal values (count, width), of the dtype and on the device of ``like``."""
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(draw.randint(0, 99)))
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return values.to(like.device, dtype)
