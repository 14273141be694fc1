"""Replace the forward of a vision tower that cuts padded images to their sizes, where the replacement is equal.

Pixtral's tower takes images (images, channels, height, width) that are padded to one size, and ``image_sizes``. It cuts
each image's patches in a loop, and packs them into one row, in which an image attends to itself. Here the patches that
are no padding are found by index. One call of an attention within segments takes the place of the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.model_functions import Function, gives_the_same
from adaptc.capture.vision.attend_in_segments import attends_in_segments
from adaptc.capture.vision.packed_patches import find_real_patches
from adaptc.capture.vision.tower_facts import is_padded_tower

_TRIALS = 3


def equal_padded_forward(tower: Any, original: Function) -> Function | None:
    """Return a forward that gives what ``tower``'s own does, or None where none is known."""
    if not is_padded_tower(type(tower)):
        return None
    conv = getattr(tower, "patch_conv", None)
    parts = [getattr(tower, n, None) for n in ("ln_pre", "patch_positional_embedding", "transformer")]
    if not isinstance(conv, nn.Conv2d) or not all(isinstance(part, nn.Module) for part in parts):
        return None
    padded = MethodType(record_layers(_padded_forward), tower)

    def forward(pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any) -> Any:
        if image_sizes is None:
            return original(pixel_values, **kwargs)
        with attends_in_segments(tower):
            return padded(pixel_values, image_sizes, **kwargs)

    return forward if gives_the_same(_states(original), _states(forward), _calls(tower, conv)) else None


def record_layers(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``forward`` with the hidden states of layers in its output, where a call asks for them."""
    from transformers.utils.output_capturing import capture_outputs

    return capture_outputs(forward)


def _padded_forward(tower: Any, pixel_values: Tensor, image_sizes: Tensor, **kwargs: Any) -> Any:
    embeds = tower.patch_conv(pixel_values.to(tower.patch_conv.weight.dtype))
    rows, columns = embeds.shape[2:]
    real = find_real_patches(image_sizes.to(embeds.device) // tower.patch_size, rows, columns)
    states = tower.ln_pre(embeds.flatten(2).transpose(1, 2).flatten(0, 1)[real.index].unsqueeze(0))
    positions = tower.patch_positional_embedding(states, torch.stack([real.row, real.column], 1))
    segments = {"cu_seq_lens_q": real.image, "cu_seq_lens_k": real.image}
    return tower.transformer(states, attention_mask=None, position_embeddings=positions, **segments, **kwargs)


def _states(forward: Function) -> Function:
    def states(**inputs: Any) -> tuple[Tensor, ...]:
        found = forward(**inputs, output_hidden_states=True)
        return (found.last_hidden_state, *found.hidden_states)

    return states


def _calls(tower: Any, conv: nn.Conv2d) -> Iterator[dict[str, Any]]:
    patch: int = tower.patch_size
    for draw in map(Random, range(_TRIALS)):
        sizes = torch.tensor([[draw.randint(1, 3) * patch for _ in range(2)] for _ in range(draw.randint(1, 3))])
        height, width = sizes.amax(0).tolist()
        shape = (len(sizes), conv.in_channels, height, width)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(draw.randint(0, 99)))
        yield {"pixel_values": pixels.to(conv.weight.device, conv.weight.dtype), "image_sizes": sizes}
