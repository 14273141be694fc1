"""Replace what LLaVA-NeXT and models after it do with each image's tiles, where the replacement is found to be equal.

``get_image_features`` computes how many tiles each image has, cuts off the tiles that fill up the batch, and splits the
features by image. ``pack_image_features`` makes tokens of them. Here the first is called with tiles that are joined
already, and its features stay in one tensor. The second is replaced.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from random import Random
from typing import Any

import torch
from torch import Tensor

from adaptc.capture.model_functions import Function, all_arguments, gives_the_same
from adaptc.capture.vision.image_tiles import Tiling
from adaptc.capture.vision.packed_patches import true_indices

_TRIALS = 12
_WIDTH = 3
_RATIO = "vision_aspect_ratio"


class _Sizes(list[tuple[int, int]]):
    """One size, which a model loops over in the place of the ``sizes`` (images, 2) of images.

    ``counts`` (images,) are the numbers of the images' tiles.
    """

    def __init__(self, first: tuple[int, int], sizes: Tensor, counts: Tensor) -> None:
        super().__init__([first])
        self.sizes, self.counts = sizes, counts


def find_tiling(module: Any, most: int | None = None) -> Tiling | None:
    """Return how ``module`` cuts its images, from its config; None where that does not say so."""
    config = getattr(module, "config", None)
    vision, resolutions = getattr(config, "vision_config", None), getattr(config, "image_grid_pinpoints", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int) or not isinstance(resolutions, list) or not resolutions:
        return None
    return Tiling(tuple((h, w) for h, w in resolutions), size, size // patch, most)


def equal_packing(module: Any, original: Function) -> Function | None:
    """Return a method that packs features as ``module.pack_image_features`` does, or None where none is known.

    In the place of each image's features it takes those of all images, and :class:`_Sizes` for sizes.
    """
    signature = inspect.signature(original)
    scales_down = _RATIO in signature.parameters
    if not {"image_features", "image_sizes", "image_newline"} <= set(signature.parameters):
        return None

    def tiling_of(ratio: str | None) -> Tiling | None:
        return find_tiling(module, int(ratio.rpartition("_")[2]) if ratio is not None else None)

    def pack(*args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        given = all_arguments(signature, args, kwargs)
        (features,), sizes, tiling = given["image_features"], given["image_sizes"], tiling_of(given.get(_RATIO))
        assert tiling is not None
        tokens = tiling.pack(features, sizes.sizes, sizes.counts, given["image_newline"])
        return (tokens,), sizes.counts

    def joined(image_features: list[Tensor], image_sizes: Tensor, **others: Any) -> Tensor:
        return torch.cat(original(image_features, image_sizes, **others)[0])

    def joined_before(image_features: list[Tensor], image_sizes: Tensor, **others: Any) -> Tensor:
        counts = torch.tensor([len(f) for f in image_features])
        return pack((torch.cat(image_features),), _Sizes((1, 1), image_sizes, counts), **others)[0][0]

    tiling = find_tiling(module, 1)
    if tiling is None or not _counts_as(module, tiling):
        return None
    options: list[dict[str, Any]] = [{}]
    if scales_down:
        options = [{_RATIO: f"anyres_max_{most}"} for most in (1, 9)]
    elif "vision_feature_select_strategy" in signature.parameters:
        options = [{"vision_feature_select_strategy": "default"}]
    calls = (call | more for call in _calls(tiling) for more in options)
    return pack if gives_the_same(joined, joined_before, calls) else None


def _counts_as(module: Any, tiling: Tiling) -> bool:
    """Return whether the function of ``module``'s file that counts the tiles of an image gives what ``tiling`` does."""
    count = getattr(sys.modules[type(module).__module__], "image_size_to_num_patches", None)
    sizes = torch.tensor([_draw_size(Random(i), tiling) for i in range(64)])
    try:
        wanted = [count(s, module.config.image_grid_pinpoints, tiling.size) for s in sizes] if callable(count) else []
    except Exception:  # a function of another kind may raise anything
        return False
    return wanted == tiling.count_tiles(sizes).tolist()


def _calls(tiling: Tiling) -> Iterator[dict[str, Any]]:
    for draw in map(Random, range(_TRIALS)):
        sizes = torch.tensor([_draw_size(draw, tiling) for _ in range(draw.randint(1, 3))])
        counts = [int(n) if draw.random() < 0.8 else 1 for n in tiling.count_tiles(sizes)]
        seed = torch.Generator().manual_seed(draw.randint(0, 99))
        features = [torch.randn(n, tiling.side**2, _WIDTH, generator=seed) for n in counts]
        yield {"image_features": features, "image_sizes": sizes, "image_newline": torch.randn(_WIDTH, generator=seed)}


def _draw_size(draw: Random, tiling: Tiling) -> list[int]:
    most = 2 * max(map(max, tiling.resolutions))
    return [draw.randint(most // 16 + 1, most) for _ in range(2)]


def joined_tiles(
    original: Function, tiling: Tiling, keeping_splits: Callable[[], AbstractContextManager[None]]
) -> Function:
    """Return a ``get_image_features`` that gives ``original`` the tiles of all images, joined, and :class:`_Sizes`.

    ``keeping_splits()`` is a context in which ``original`` splits no features.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def features(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        pixels, sizes = given["pixel_values"], given["image_sizes"]
        if isinstance(sizes, _Sizes):  # a model that calls the method of one of its modules
            return original(*args, **kwargs)
        counts = tiling.count_tiles(sizes)
        if (images := given.pop("batch_num_images", None)) is not None:
            number = torch.arange(sizes.shape[0], device=sizes.device)
            text = torch.bucketize(number, images.cumsum(0), right=True)
            counts = torch.where(images[text] == 1, counts, 1)
        if pixels.ndim == 5:
            is_tile = torch.arange(pixels.shape[1], device=sizes.device) < counts.unsqueeze(1)
            pixels = pixels.flatten(0, 1)[true_indices(is_tile)]
        given |= {"pixel_values": pixels, "image_sizes": _Sizes(tiling.resolutions[0], sizes, counts)}
        with keeping_splits():
            return original(**given)

    return features
