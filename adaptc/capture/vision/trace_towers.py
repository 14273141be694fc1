"""Let a model with a vision tower be traced for any number of images of any sizes.

While the model is traced,

- its towers are given what they compute from grids, as tensors of :mod:`tower_facts`;
- a tower attends within segments of patches by one call. transformers calls attention for each image, or gives the
  boundaries of all to a flash kernel. Only the kernel's call has no loop over images. So a tower gets an attention of
  such a name. The kernel's boundaries are replaced by a number for each patch, which patches of one segment share;
- features of all images stay in one tensor, where the model would split them by image and join them again;
- positions of text and images are those of :mod:`rotary_positions`.

Code of the model is replaced only where the replacement gives the same, for images drawn at random. Each replacement is
an attribute of one module for a while; no class and no function of transformers changes.

Private torch use, with the public route that was tried: ``torch._check_tensor_all``, which makes an assertion on values
in the graph. Public: ``torch.ops.aten._assert_async``, which has no place in programs for other runtimes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adaptc.capture.model_state import own_attribute
from adaptc.capture.vision.equal_methods import equal_deepstack, equal_positions
from adaptc.capture.vision.equal_towers import equal_resizing, equal_slicing
from adaptc.capture.vision.positions_by_ids import equal_positions_by_ids
from adaptc.capture.vision.tower_facts import facts_of_grid, find_towers, has_free_images
from adaptc.errors import CaptureError

_TORCH = str(Path(torch.__file__).parent)
#: transformers takes any name with "flash" in it for a kernel that gets boundaries
_SEGMENT_ATTENTION = "adaptc_flash_segments"


def _attend_in_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output (1, patches, heads, width), and None for its weights.

    ``query``, ``key`` and ``value`` are (1, heads, patches, width), and ``cu_seq_lens_q`` (patches,) are the segments.
    ``others`` are what transformers passes to kernels.
    """
    mask = cu_seq_lens_q.unsqueeze(1) == cu_seq_lens_q
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def _register_segment_attention() -> None:
    """Let transformers know this attention by its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(_SEGMENT_ATTENTION, _attend_in_segments)


@contextlib.contextmanager
def traced_for_any_images(model: nn.Module) -> Iterator[None]:
    """Run the block with ``model`` changed as the module says; a model without free images is left as it is."""
    if not has_free_images(model):
        yield
        return
    splits = _KeepWhole()
    with contextlib.ExitStack() as stack:
        for tower, names in find_towers(model).items():
            stack.enter_context(own_attribute(tower, "forward", _tower_forward(tower, names)))
            if "cu_seqlens" in names:
                _register_segment_attention()
                stack.enter_context(own_attribute(tower.config, "_attn_implementation_internal", _SEGMENT_ATTENTION))
        for module in model.modules():
            for name, make in _REPLACEMENTS.items():
                original = getattr(module, name, None)
                if inspect.ismethod(original) and (made := make(module, original, splits)) is not None:
                    stack.enter_context(own_attribute(module, name, made))
            resize = getattr(module, "resize_positional_embeddings", None)
            methods = equal_resizing(module, resize, _check_all) if inspect.isfunction(resize) else None
            for name, made in (methods or {}).items():
                stack.enter_context(own_attribute(module, name, made))
        yield


class _PatchCounts:
    """The numbers of patches of all images, of which no list can be made while a model is traced."""

    def __floordiv__(self, merged: int) -> _PatchCounts:
        return self

    def tolist(self) -> _PatchCounts:
        return self

    def item(self) -> _PatchCounts:
        return self


def _counts_patches(sizes: Any) -> bool:
    """Return whether the sizes of a split are patch counts, as they are or in the list that torch makes of them."""
    return isinstance(sizes, _PatchCounts) or (isinstance(sizes, list) and _counts_patches(sizes[0]))


class _KeepWhole(TorchFunctionMode):
    """Features of images stay in one tensor, where a function with one of ``codes`` would split them by image.

    That is a split by the numbers of patches, which are products of grids, or a list of a tensor (images, patches,
    width). What the function calls is not changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.codes = set[CodeType]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.split, Tensor.split) and _counts_patches(args[1]):
            return (args[0],)
        if func is Tensor.prod and self._is_called_by_features():
            return _PatchCounts()
        if func is Tensor.unbind and args[0].ndim == 1 and self._is_called_by_features():
            return (_PatchCounts(),)
        if func in (Tensor.unbind, Tensor.__len__) and args[0].ndim == 3 and self._is_called_by_features():
            return 1 if func is Tensor.__len__ else (args[0].flatten(0, 1),)
        return func(*args, **kwargs)

    def _is_called_by_features(self) -> bool:
        """Return whether the call being handled was made in one of ``codes``, directly or by torch's own functions."""
        frame = sys._getframe(2)  # noqa: SLF001
        while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        return frame is not None and frame.f_code in self.codes


def _tower_forward(tower: Any, names: frozenset[str]) -> Callable[..., Any]:
    original = tower.forward
    signature = inspect.signature(original)
    patches_name = next(iter(signature.parameters))

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        others = given.get("kwargs", {})
        patches, grid = given[patches_name], given["grid_thw"]
        count = patches.shape[1 if patches.ndim in (3, 5) and patches.shape[0] == 1 else 0]
        _check_that_grids_have_all_patches(grid, count)
        return original(*args, **{**facts_of_grid(tower, names, count, grid, others.get("merge_sizes")), **kwargs})

    return forward


def _check_that_grids_have_all_patches(grid: Tensor, count: int) -> None:
    _check_all(grid.prod(1).sum() == count)


def _check_all(holds: Tensor) -> None:
    torch._check_tensor_all(holds)  # noqa: SLF001


def _forward_of_image_lengths(module: Any, original: Any, splits: _KeepWhole) -> Any:
    """Return a forward that computes the lengths of images from their grids, where it takes both."""
    if not {"lengths", "image_shapes"} <= set(inspect.signature(original).parameters):
        return None

    @functools.wraps(original)
    def forward(embeddings: Tensor, lengths: Tensor, image_shapes: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(embeddings, image_shapes.prod(1), image_shapes, *args, **kwargs)

    return forward


def _features(module: Any, original: Any, splits: _KeepWhole) -> Any:
    splits.codes.add(inspect.unwrap(original.__func__).__code__)

    @functools.wraps(original)
    def features(*args: Any, **kwargs: Any) -> Any:
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


def _without_state(module: Any, original: Any, splits: _KeepWhole) -> Any:
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
_REPLACEMENTS: dict[str, Callable[[Any, Any, _KeepWhole], Any]] = {
    "forward": _forward_of_image_lengths,
    "get_image_features": _features,
    "get_video_features": _features,
    "compute_3d_position_ids": _without_state,
    "get_rope_index": lambda module, original, _: (
        equal_positions(module, original) or equal_positions_by_ids(module, original)
    ),
    "_temporal_slicing": lambda module, original, _: equal_slicing(module, original, _check_all),
    "_deepstack_process": lambda module, original, _: equal_deepstack(module, original),
}
