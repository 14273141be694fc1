"""Replace what Step3 does with the features of each image, where the replacement is found to be equal.

An image may have local patches, whose features come before those of the image. The model joins them in a loop over the
images. Where a call has no local patches, the features of all images stay in one tensor here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adaptc.capture.model_functions import Function, gives_the_same

_ARGUMENTS = ("pixel_values", "pixel_values_local", "num_local_patches")


def equal_whole_features(module: Any, original: Function) -> Function | None:
    """Return a ``get_image_features`` that gives what ``module``'s own does, or None where none is known."""
    signature = inspect.signature(original)
    tower, projector = getattr(module, "vision_model", None), getattr(module, "multi_modal_projector", None)
    if tuple(signature.parameters)[:3] != _ARGUMENTS or tower is None or projector is None:
        return None

    @functools.wraps(original)
    def features(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if any(given.get(name) is not None for name in _ARGUMENTS[1:]):
            return original(*args, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        options = {n: v for n, v in given.get("kwargs", {}).items() if n != "return_dict"}
        out = tower(given["pixel_values"], **options)
        tokens: Any = [projector(out.last_hidden_state).flatten(0, 1)]
        return BaseModelOutputWithPooling(
            last_hidden_state=out.last_hidden_state,
            pooler_output=tokens,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def joined(function: Function, pixels: Tensor) -> Tensor:
        return torch.cat(list(function(pixels, return_dict=True).pooler_output))

    same = gives_the_same(
        functools.partial(joined, original), functools.partial(joined, features), _calls(module, tower)
    )
    return features if same else None


def _calls(module: Any, tower: Any) -> Iterator[dict[str, Any]]:
    like, size = next(tower.parameters()), module.config.vision_config.image_size
    draw = torch.Generator().manual_seed(0)
    for images in (1, 3):
        pixels = torch.randn(images, 3, size, size, generator=draw)
        yield {"pixels": pixels.to(like.device, like.dtype)}
