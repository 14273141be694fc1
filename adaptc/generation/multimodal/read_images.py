"""Let the language model of a step read what images give it beside embeddings.

Qwen3-VL adds features of images after its first layers. In Gemma 3 the tokens of an image attend to each other, also to
those after them. Both are inputs of the step, with a value for each token that is zero at text.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from adaptc.capture.model_state import own_attribute, patch_forward
from adaptc.generation.modes.static_step import DEEPSTACK, LAST_KEYS

#: the arguments of language models that add features of images to the states of their tokens, and their method
IMAGE_MASK, IMAGE_FEATURES = "visual_pos_masks", "deepstack_visual_embeds"
_ADD_FEATURES = "_deepstack_process"


def last_keys_of_mask(mask: Any) -> Tensor | None:
    """Return the last position that each token attends to (rows, tokens), int64; None where no such mask is made.

    ``mask`` is what a language model takes as attention_mask: (rows, 1, tokens, keys), or such masks by the kind of
    layers, of which those with full attention count.
    """
    seen = _seen_keys(mask)
    return None if seen is None else (seen * torch.arange(seen.shape[-1], device=seen.device)).amax(-1)


def attends_around_keys(mask: Any, attention_mask: Tensor) -> bool:
    """Return whether a token attends to a key after it and not to all that lie between the two.

    ``mask`` is as in :func:`last_keys_of_mask`. ``attention_mask`` (rows, tokens) says which tokens are no padding.
    """
    seen, last_keys, is_token = _seen_keys(mask), last_keys_of_mask(mask), attention_mask.bool()
    if seen is None or last_keys is None:
        return False
    keys = torch.arange(seen.shape[-1], device=seen.device)
    between = (keys > keys[: seen.shape[1], None]) & (keys <= last_keys[:, :, None])
    return bool((between & ~seen & is_token[:, None, :] & is_token[:, :, None]).any())


def _seen_keys(mask: Any) -> Tensor | None:
    if isinstance(mask, dict):
        mask = cast("dict[str, Any]", mask).get("full_attention")
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0


@contextlib.contextmanager
def reading_images(model: Any, images: Mapping[str, Tensor], slots: Tensor) -> Generator[None]:
    """Run the block with a language model that reads ``images``, the inputs of a step that images have.

    ``slots`` (tokens,) are the positions of the step's tokens in the cache.
    """
    if not images:
        yield
        return
    language_model = model.get_decoder()
    original, parameters = language_model.forward, inspect.signature(language_model.forward).parameters
    features: dict[str, Any] = {}
    if (deepstack := images.get(DEEPSTACK)) is not None:
        mask = torch.ones_like(deepstack[:, :, 0, 0], dtype=torch.bool)
        features = {IMAGE_MASK: mask, IMAGE_FEATURES: deepstack.unbind(2)}

    def forward(*args: Any, **kwargs: Any) -> Any:
        if (last_keys := images.get(LAST_KEYS)) is not None:
            kwargs["attention_mask"] = _widen(kwargs["attention_mask"], last_keys, slots)
        return original(*args, **kwargs | features)

    with (
        patch_forward(language_model, forward, list(parameters.values())),
        own_attribute(language_model, _ADD_FEATURES, _add) if features else contextlib.nullcontext(),
    ):
        yield


def _add(hidden_states: Tensor, mask: Tensor, embeds: Tensor) -> Tensor:
    return hidden_states + embeds.to(hidden_states)


def _widen(mask: Any, last_keys: Tensor, slots: Tensor) -> Any:
    """Return the masks of a step in which tokens also attend to the keys after them, up to ``last_keys``."""
    if isinstance(mask, dict):
        return {kind: _widen(one, last_keys, slots) for kind, one in cast("dict[str, Any]", mask).items()}
    keys = torch.arange(mask.shape[-1], device=mask.device)
    ahead = (keys > slots[:, None]) & (keys <= last_keys[:, :, None])
    ahead = ahead.unsqueeze(1)
    return mask | ahead if mask.dtype == torch.bool else torch.where(ahead, torch.zeros_like(mask), mask)
