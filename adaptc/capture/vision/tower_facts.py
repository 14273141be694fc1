"""Find vision towers that compute from grids of images, and compute it for them.

A tower of transformers reads what it computes of a grid from keyword arguments, where these are given
(``transformers.vision_utils``). The towers are known by the helpers that their ``forward`` calls. Helpers of a model's
own file count where they are found to give what is known of helpers with their name. No file of transformers is
imported here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.vision.image_grids import interpolate_positions, place_patches, sort_into_windows
from adaptc.capture.vision.packed_patches import merge_frames, number_frames

#: an input -> the names of its free dimensions, or None for one that torch is to relate
FreeDims = Callable[[Tensor], dict[int, str | None]]


#: whether models are captured for the grids and sizes of their example inputs alone
GRIDS_ARE_FIXED: ContextVar[bool] = ContextVar("GRIDS_ARE_FIXED", default=False)
#: how the names of inputs of images begin
_OF_IMAGES = ("pixel_", "image_", "video_", "spatial_shapes")
#: helpers of transformers that compute from a grid -> the names of what they compute
_HELPERS = {
    "get_vision_position_ids": ("position_ids",),
    "get_vision_cu_seqlens": ("cu_seqlens",),
    "get_vision_attention_seqlens": ("cu_seqlens", "max_seqlen"),
    "get_vision_window_index": ("window_index", "cu_window_seqlens", "max_window_seqlen"),
    "get_vision_interpolation_indices_and_weights": ("interp_indices", "interp_weights"),
}
#: helpers that a model's own file may have -> (grid, patches, ...) -> what they compute
_OWN_HELPERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "get_vision_frame_index": ("frame_index", number_frames),
    "get_vision_temporal_merge_index": ("temporal_merge_index", merge_frames),
}
#: a helper of the towers that cut padded images to their sizes, and pack what is left
_PACKING_HELPER = "generate_block_attention_mask"


def find_towers(model: nn.Module) -> dict[nn.Module, frozenset[str]]:
    """Return the modules of ``model`` that are vision towers of the known kind, with the names of what they compute
    from a grid; none where grids are fixed."""
    if GRIDS_ARE_FIXED.get():
        return {}
    modules = list(model.modules())
    names = {kind: _computed_facts(kind) for kind in {type(m) for m in modules}}
    return {m: names[type(m)] for m in modules if names[type(m)]}


def _image_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the height and width of images that the model's config names."""
    config: Any = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", None) or config, "image_size", None)
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return size[0], size[1]
    return (size, size) if isinstance(size, int) else None


def is_padded_tower(kind: type[nn.Module]) -> bool:
    """Return whether modules of this ``kind`` are towers that take padded images, and cut them to their sizes."""
    forward: Any = inspect.unwrap(kind.forward)
    if not inspect.isfunction(forward) or _PACKING_HELPER not in forward.__code__.co_names:
        return False
    return list(inspect.signature(forward).parameters)[:3] == ["self", "pixel_values", "image_sizes"]


def _has_padded_tower(model: nn.Module) -> bool:
    return not GRIDS_ARE_FIXED.get() and any(is_padded_tower(kind) for kind in {type(m) for m in model.modules()})


def has_free_images(model: nn.Module) -> bool:
    """Return whether ``model`` is captured for any number of images: it has such towers, lists features of images as
    LLaVA does, or computes them of the sizes of images, or beside local patches. It is not where their grids are
    fixed."""
    if GRIDS_ARE_FIXED.get():
        return False
    methods = [getattr(type(m), "get_image_features", None) for m in model.modules()]
    found: list[Any] = [inspect.unwrap(m) for m in methods if callable(m)]
    names = [{*f.__code__.co_names} for f in found if hasattr(f, "__code__")]
    takes_sizes = any({"image_sizes", "num_local_patches"} & {*inspect.signature(f).parameters} for f in found)
    return bool(find_towers(model)) or takes_sizes or any("list" in n or {"split", "tolist"} <= n for n in names)


def _computed_facts(kind: type[nn.Module]) -> frozenset[str]:
    forward: Any = inspect.unwrap(kind.forward)
    if not inspect.isfunction(forward) or "grid_thw" not in inspect.signature(forward).parameters:
        return frozenset()
    helpers, called = sys.modules.get(kind.__module__), {*forward.__code__.co_names}
    known = {n for n in _HELPERS if getattr(getattr(helpers, n, None), "__module__", "") == "transformers.vision_utils"}
    methods = [inspect.unwrap(m) for n in called if inspect.isfunction(m := getattr(kind, n, None))]
    of_methods = {n for m in methods for n in m.__code__.co_names}
    own = {n for n in _OWN_HELPERS if n in called | of_methods and _is_known(getattr(helpers, n, None), n)}
    computed = {name for helper in known & called for name in _HELPERS[helper]}
    return frozenset(computed | {_OWN_HELPERS[n][0] for n in own})


def _is_known(helper: Any, name: str) -> bool:
    """Return whether a model's own ``helper`` gives what is known of helpers with its ``name``."""
    sides = () if name == "get_vision_frame_index" else (2, 3)
    for grid in ([[1, 4, 6], [3, 2, 3]], [[2, 8, 3]], [[1, 2, 3], [1, 6, 9], [2, 4, 3]]):
        given = torch.tensor(grid)
        try:
            found = helper(given, *sides)
        except Exception:  # a helper may raise anything
            return False
        wanted = _OWN_HELPERS[name][1](given, int(given.prod(1).sum()), *sides)
        pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (found, wanted)), strict=True)
        if not all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs):
            return False
    return True


def numbers_of_images(kwargs: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs that hold numbers of images, such as their sizes."""
    return [
        n
        for n, t in kwargs.items()
        if n.startswith(_OF_IMAGES) and isinstance(t, Tensor) and not (t.is_floating_point() or t.dtype == torch.bool)
    ]


def with_free_images(model: nn.Module, kwargs: Mapping[str, Any], free_dims: FreeDims) -> FreeDims:
    """Return ``free_dims`` for a call with texts and images: there may be more or fewer images than texts.

    ``kwargs`` are the inputs of the model. Of grids and patches, no other dimension is free. Neither is any of images
    that have the one size which the config names, where no tower cuts them to sizes of their own.
    """
    if "input_ids" not in kwargs:
        return free_dims
    has_sizes = isinstance(kwargs.get("image_sizes"), Tensor) and has_free_images(model)
    has_towers, own = bool(find_towers(model)), dict[int, dict[int, str | None]]()
    per_text = _images_per_text(kwargs) if has_free_images(model) else None
    for name, value in kwargs.items():
        if not isinstance(value, Tensor) or not name.startswith(_OF_IMAGES):
            continue
        if per_text is not None and tuple(value.shape[:2]) == per_text:
            own[id(value)] = {0: free_dims(kwargs["input_ids"]).get(0), 1: "images"}
        elif has_towers and name.endswith(("grid_thw", "merge_sizes")):
            own[id(value)] = {0: f"{name.partition('_')[0]}_count"}
        elif has_sizes and name == "image_sizes":
            own[id(value)] = {0: "images"}
        elif has_sizes and value.ndim == 5:
            own[id(value)] = {0: "images", 1: None}
        elif has_sizes and value.ndim == 4 and (_has_padded_tower(model) or value.shape[-2:] != _image_size(model)):
            own[id(value)] = {0: "images", 2: None, 3: None}
        else:
            fixed = (has_towers and value.ndim == 2) or tuple(value.shape[-2:]) == _image_size(model)
            own[id(value)] = {0: None} if fixed else {**free_dims(value), 0: None}
    return lambda tensor: own[id(tensor)] if id(tensor) in own else free_dims(tensor)


def _images_per_text(kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the sizes (texts, images) of inputs that have the images of each text on an axis of their own.

    That axis is filled up with images of zeros. None where there are no such inputs.
    """
    pixels, ids = kwargs.get("pixel_values"), kwargs["input_ids"]
    if not isinstance(pixels, Tensor) or pixels.ndim != 5 or pixels.shape[0] != ids.shape[0]:
        return None
    if "image_sizes" in kwargs:  # such an axis is of the tiles of an image
        return None
    return pixels.shape[0], pixels.shape[1]


def with_blank_image(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of a call with a blank image, of zeros, for each text after its only image.

    torch would take one image for a constant. Models that split their features by text leave blank images out. Other
    inputs are returned as they are.
    """
    sizes = _images_per_text(example) if "input_ids" in example and has_free_images(model) else None
    if sizes is None or sizes[1] != 1:
        return dict(example)
    of_images = {n for n, t in example.items() if n.startswith(_OF_IMAGES) and tuple(t.shape[:2]) == sizes}
    return {n: torch.cat([t, torch.zeros_like(t)], 1) if n in of_images else t for n, t in example.items()}


def facts_of_grid(tower: Any, names: frozenset[str], count: int, grid: Tensor, merges: Tensor | None) -> dict[str, Any]:
    """Return the ``names`` that a tower reads of what transformers computes from a grid outside of graphs.

    ``count`` is the number of patches. ``merges`` is what each image's patches are merged by, where the tower has no
    number of its own.
    """
    merge: Any = _setting(tower, "spatial_merge_size")
    merge = merges if merge is None and merges is not None else merge or 1
    places = place_patches(grid, count, merge)
    axes = [places.row, places.column]
    merges_frames = getattr(tower, "merge_temporal", _names_argument(tower, "merge_temporal"))
    facts: dict[str, Any] = {
        "position_ids": torch.stack([places.frame, *axes] if getattr(tower, "include_temporal", False) else axes, 1),
        "cu_seqlens": places.image if merges_frames else places.segment,
        "max_seqlen": count,
    }
    if "frame_index" in names:
        facts["frame_index"] = number_frames(grid, count)
    if "temporal_merge_index" in names:
        facts["temporal_merge_index"] = merge_frames(grid, count, *_setting(tower, "merge_kernel_size"))
    if "window_index" in names:
        side = _setting(tower, "window_size") // merge // _setting(tower, "patch_size")
        windows = sort_into_windows(grid, count, merge, side)
        facts |= {"window_index": windows.order, "cu_window_seqlens": windows.segment, "max_window_seqlen": count}
    if "interp_indices" in names:
        facts["interp_indices"], facts["interp_weights"] = interpolate_positions(
            places,
            _setting(tower, "num_grid_per_side"),
            mode=_setting(tower, "interpolation_mode") or "bilinear",
            padding=_setting(tower, "interpolation_padding") or "border",
            align_corners=_setting(tower, "interpolation_align_corners") is True,
        )
    return {name: facts[name] for name in names}


def _setting(tower: nn.Module, name: str) -> Any:
    return next((v for m in tower.modules() if (v := getattr(m, name, None)) is not None), None)


def _names_argument(tower: nn.Module, name: str) -> bool:
    """Return whether the ``forward`` of ``tower`` names an argument ``name`` in a call: its own attribute, or True."""
    constants = inspect.unwrap(type(tower).forward).__code__.co_consts
    return any(name in names for names in constants if isinstance(names, tuple))
