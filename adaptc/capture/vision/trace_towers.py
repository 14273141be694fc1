"""Let a model with a vision tower be traced for any number of images of any sizes.

While the model is traced,

- its towers are given what they compute from grids, as tensors of :mod:`tower_facts`;
- a tower attends within segments of patches by one call, as :mod:`attend_in_segments` says;
- features of all images stay in one tensor, as :mod:`whole_features` says;
- positions of text and images are those of :mod:`rotary_positions`;
- methods that loop over images are those of the room ``methods``.

Code of the model is replaced only where the replacement gives the same, for images drawn at random. Each replacement is
an attribute of one module for a while; no class and no function of transformers changes.

Private torch use, with the public route that was tried: ``torch._check_tensor_all``, which makes an assertion on values
in the graph. Public: ``torch.ops.aten._assert_async``, which has no place in programs for other runtimes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.model_state import own_attribute
from adaptc.capture.vision.attend_in_segments import attends_in_segments
from adaptc.capture.vision.methods.class_tokens import equal_class_token_forward
from adaptc.capture.vision.methods.equal_methods import equal_deepstack, equal_positions
from adaptc.capture.vision.methods.equal_towers import equal_resizing, equal_slicing
from adaptc.capture.vision.methods.image_codes import find_codes
from adaptc.capture.vision.methods.local_patches import equal_whole_features
from adaptc.capture.vision.methods.packed_methods import equal_packed_forward, equal_unshuffle
from adaptc.capture.vision.methods.padded_towers import equal_padded_forward
from adaptc.capture.vision.methods.positions_by_ids import equal_positions_by_ids
from adaptc.capture.vision.methods.tiled_features import equal_packing, find_tiling, joined_tiles
from adaptc.capture.vision.tower_facts import facts_of_grid, find_towers, has_free_images
from adaptc.capture.vision.whole_features import KeepWhole
from adaptc.errors import CaptureError


@contextlib.contextmanager
def traced_for_any_images(model: nn.Module) -> Iterator[None]:
    """Run the block with ``model`` changed as the module says; a model without free images is left as it is."""
    if not has_free_images(model):
        yield
        return
    splits = KeepWhole()
    with contextlib.ExitStack() as stack:
        towers = find_towers(model)
        for tower, names in towers.items():
            stack.enter_context(own_attribute(tower, "forward", _tower_forward(tower, names)))
            if "cu_seqlens" in names:
                stack.enter_context(attends_in_segments(tower))
        for module in model.modules():
            for name, make in _REPLACEMENTS.items():
                original = getattr(module, name, None)
                if inspect.ismethod(original) and (made := make(module, original, splits)) is not None:
                    stack.enter_context(own_attribute(module, name, made))
            resize = getattr(module, "resize_positional_embeddings", None)
            methods = equal_resizing(module, resize, _check_all) if inspect.isfunction(resize) else None
            for name, made in (methods or {}).items():
                stack.enter_context(own_attribute(module, name, made))
            if (codes := find_codes(module)) is not None:
                splits.codes.add(_code(codes.quantizer.encode))
                stack.enter_context(own_attribute(codes.quantizer, "encode", codes.encode))
                stack.enter_context(own_attribute(codes.mapping, "convert_img2bpe", codes.to_tokens))
        splits.grid_codes |= {_code(type(tower).forward) for tower in towers if splits.readers & {*tower.modules()}}
        yield


def _tower_forward(tower: Any, names: frozenset[str]) -> Callable[..., Any]:
    original = tower.forward
    with_class_tokens = equal_class_token_forward(tower, original)
    signature = inspect.signature(original)
    patches_name = next(iter(signature.parameters))

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        others = given.get("kwargs", {})
        patches, grid = given[patches_name], given["grid_thw"]
        count = patches.shape[1 if patches.ndim in (3, 5) and patches.shape[0] == 1 else 0]
        _check_that_grids_have_all_patches(grid, count)
        if with_class_tokens is not None:
            return with_class_tokens(*args, **kwargs)
        merges = given.get("merge_sizes", others.get("merge_sizes"))
        return original(*args, **{**facts_of_grid(tower, names, count, grid, merges), **kwargs})

    return forward


def _check_that_grids_have_all_patches(grid: Tensor, count: int) -> None:
    _check_all(grid.prod(1).sum() == count)


def _check_all(holds: Tensor) -> None:
    torch._check_tensor_all(holds)  # noqa: SLF001


def _forward_of_image_lengths(module: Any, original: Any) -> Any:
    """Return a forward that computes the lengths of images from their grids, where it takes both."""
    if not {"lengths", "image_shapes"} <= set(inspect.signature(original).parameters):
        return None

    @functools.wraps(original)
    def forward(embeddings: Tensor, lengths: Tensor, image_shapes: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(embeddings, image_shapes.prod(1), image_shapes, *args, **kwargs)

    return forward


def _code(method: Any) -> CodeType:
    return inspect.unwrap(getattr(method, "__func__", method)).__code__


def _forward(module: Any, original: Any, splits: KeepWhole) -> Any:
    """Return a forward of one of the known kinds, or None."""
    if (made := equal_packed_forward(module, original)) is not None:
        splits.readers |= {module} if "grid_thw" in inspect.signature(made).parameters else set()
        return made
    return equal_padded_forward(module, original) or _forward_of_image_lengths(module, original)


def _features(module: Any, original: Any, splits: KeepWhole) -> Any:
    if (made := equal_whole_features(module, original)) is not None:
        return made
    splits.codes.add(_code(original))
    has_masks = "pixel_attention_mask" in inspect.signature(original).parameters
    pack, tiling = getattr(module, "pack_image_features", None), find_tiling(module)
    if tiling is not None and pack is not None and equal_packing(module, pack) is not None:
        original = joined_tiles(original, tiling, splits.keeping_splits)

    @functools.wraps(original)
    def features(*args: Any, **kwargs: Any) -> Any:
        if has_masks:
            _equate_image_sizes(*args, **kwargs)
        with splits:
            return original(*args, **kwargs)

    return features


def _equate_image_sizes(pixel_values: Any = None, pixel_attention_mask: Any = None, *args: Any, **kwargs: Any) -> None:
    """Compare the numbers of texts and images (texts, images, ...), so that torch's tracer learns that they are equal.

    Raises CaptureError where they are not.
    """
    if isinstance(pixel_attention_mask, Tensor) and pixel_values.ndim == 5:
        sizes, others = pixel_values.shape[:2], pixel_attention_mask.shape[:2]
        if any(size != other for size, other in zip(sizes, others, strict=True)):
            raise CaptureError(f"pixel_values has {tuple(sizes)} images, and pixel_attention_mask {tuple(others)}")


def _without_state(module: Any, original: Any, splits: KeepWhole) -> Any:
    """Return a method after which the module has the ``rope_deltas`` of before, which are for generation."""

    @functools.wraps(original)
    def positions(*args: Any, **kwargs: Any) -> Any:
        before = module.rope_deltas
        try:
            return original(*args, **kwargs)
        finally:
            module.rope_deltas = before

    return positions if hasattr(module, "rope_deltas") else None


#: name of a method -> (module, method, ...) -> what takes its place, or None
_REPLACEMENTS: dict[str, Callable[[Any, Any, KeepWhole], Any]] = {
    "forward": _forward,
    "get_image_features": _features,
    "get_video_features": _features,
    "compute_3d_position_ids": _without_state,
    "get_rope_index": lambda module, original, _: (
        equal_positions(module, original) or equal_positions_by_ids(module, original)
    ),
    "_temporal_slicing": lambda module, original, _: equal_slicing(module, original, _check_all),
    "_deepstack_process": lambda module, original, _: equal_deepstack(module, original),
    "pixel_unshuffle": lambda module, original, _: equal_unshuffle(module, original),
    "pack_image_features": lambda module, original, _: equal_packing(module, original),
}
