"""Replace what UDOP does to join patches of an image to a text, where the replacement is found to be equal.

Each token has a box on the page. The patch in the middle of the box is added to the token, and patches of no token
follow the text. transformers picks these row by row, and fills rows up to one length. Here the patches of each row are
sorted, those of no token first, and the rest becomes zeros.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.model_functions import Function, all_arguments, gives_the_same, replaced_functions

_NAME = "combine_image_text_embeddings"
_ARGUMENTS = ("image_embeddings", "inputs_embeds", "bbox", "visual_bbox", "attention_mask", "num_patches", "max_len")
_SIDE, _WIDTH = 3, 5


def joins_patches_at_once(model: nn.Module) -> AbstractContextManager[None]:
    """Run the block, which traces ``model``, with functions that join patches to texts for all rows at once."""
    return replaced_functions(model, {_NAME: _replace})


def _replace(original: Function) -> Function | None:
    """Return a function that gives what ``original`` gives, or None where none is known."""
    signature, boxes_of = inspect.signature(original), vars(inspect.getmodule(original)).get("get_visual_bbox")
    if not {*_ARGUMENTS} <= {*signature.parameters} or boxes_of is None:
        return None

    def join(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        given = all_arguments(signature, args, kwargs)
        if given["visual_bbox"] is None:
            boxes: Tensor = boxes_of(image_size=given["image_size"], patch_size=given["patch_size"])
            given["visual_bbox"] = boxes.to(given["bbox"].device).expand(given["bbox"].shape[0], -1, -1)
        return _join(*(given[name] for name in _ARGUMENTS))

    def on_a_copy(**call: Any) -> Any:  # it adds to its input in place
        return original(**{**call, "inputs_embeds": call["inputs_embeds"].clone()})

    return join if gives_the_same(on_a_copy, join, _calls()) else None


def _join(
    patches: Tensor, embeds: Tensor, boxes: Tensor, patch_boxes: Tensor, mask: Tensor | None, side: int, most: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the embeddings (rows, tokens, width), the boxes (rows, tokens, 4) and the mask of texts with patches.

    ``patches`` (rows, patches, width) are those of pages of ``side`` x ``side`` patches. ``most`` is the length of rows
    with patches; 0 for as many tokens as a page has patches, after those of the text.
    """
    middle = ((boxes[:, :, :2] + boxes[:, :, 2:]) / 2.0 * side).floor().long().clip(0, side - 1)
    own = middle[:, :, 0] + middle[:, :, 1] * side
    boxes = boxes.double()
    mean = boxes.mean(-1, keepdim=True)
    added = patches.gather(1, own.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
    embeds = embeds + torch.where((mean == 0.0) | (mean == 1.0), 0.0, added)
    is_taken = torch.zeros_like(patches[:, :, 0], dtype=torch.bool).scatter(1, own, True)
    order = is_taken.int().argsort(stable=True, dim=1)
    count = patches.shape[1]
    place = torch.arange(most - embeds.shape[1] if most else count, device=patches.device)
    order = order[:, place.clamp(max=count - 1)].unsqueeze(-1)
    is_there = (place < (~is_taken).sum(1, keepdim=True)).unsqueeze(-1)

    def rest(values: Tensor) -> Tensor:
        return torch.where(is_there, values.gather(1, order.expand(-1, -1, values.shape[2])), 0)

    if mask is not None:
        mask = torch.cat([mask, is_there.squeeze(-1).to(mask.dtype)], 1)
    joined = torch.cat([embeds, rest(patches)], 1)
    return joined, torch.cat([boxes, rest(patch_boxes).double()], 1), mask


def _calls() -> Iterator[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    for length in (1, 6):
        for most in (0, length + 4, length + 20):
            boxes = torch.rand(2, length, 4, generator=draw)
            boxes[0, 0], boxes[1, -1] = 0.0, 1.0
            for own in (None, torch.rand(2, _SIDE**2, 4, generator=draw)):
                yield {
                    "image_embeddings": torch.randn(2, _SIDE**2, _WIDTH, generator=draw),
                    "inputs_embeds": torch.randn(2, length, _WIDTH, generator=draw),
                    "bbox": boxes, "visual_bbox": own, "attention_mask": torch.ones(2, length, dtype=torch.long),
                    "num_patches": _SIDE, "max_len": most, "image_size": _SIDE * 4, "patch_size": 4,
                }  # fmt: skip
