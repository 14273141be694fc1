"""Replace the forward of a vision tower that puts a class token before each frame, where the replacement is equal.

LLaVA-OneVision 1.5's tower takes the patches of all images in one row. It cuts the row by frame in Python, and puts a
learned token before each part, which the patches of the frame attend to. Here a class token finds its place by index.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from random import Random
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.model_functions import Function, gives_the_same
from adaptc.capture.vision.attend_in_segments import attends_in_segments
from adaptc.capture.vision.image_grids import place_patches
from adaptc.capture.vision.methods.padded_towers import record_layers
from adaptc.capture.vision.packed_patches import true_indices

_TRIALS = 3
_PARTS = ("patch_embed", "rotary_pos_emb", "cls_embeddings", "pre_layernorm", "blocks", "merger")
#: the helper by which such a tower counts the patches of frames
_HELPER = "get_vision_frame_lengths"


def equal_class_token_forward(tower: Any, original: Function) -> Function | None:
    """Return a forward that gives what ``tower``'s own does, or None where none is known."""
    if _HELPER not in inspect.unwrap(type(tower).forward).__code__.co_names:
        return None
    if not all(isinstance(getattr(tower, name, None), nn.Module) for name in _PARTS):
        return None
    whole = MethodType(record_layers(_class_token_forward), tower)

    def forward(pixel_values: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        with attends_in_segments(tower):
            return whole(pixel_values, grid_thw, **kwargs)

    return forward if gives_the_same(_states(original), _states(forward), _calls(tower)) else None


def _class_token_forward(tower: Any, pixel_values: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    states = tower.patch_embed(pixel_values)
    count = states.shape[0]
    places = place_patches(grid_thw.to(states.device), count, tower.spatial_merge_size)
    cos, sin = tower.rotary_pos_emb(states, torch.stack([places.row, places.column], 1))
    first = true_indices((places.row == 0) & (places.column == 0))
    index = torch.arange(count, device=states.device)
    order = torch.cat([2 * first, 2 * index + 1]).argsort()

    def with_class_tokens(token: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([token.to(rows.dtype).expand(first.shape[0], -1), rows])[order]

    tokens = tower.cls_embeddings
    angles = torch.cat([tokens.class_pos_emb, tokens.class_pos_emb], -1).to(cos.dtype)
    states = tower.pre_layernorm(with_class_tokens(tokens.class_embedding, states))
    angles = with_class_tokens(angles.cos(), cos), with_class_tokens(angles.sin(), sin)
    segments = torch.cat([places.segment[first], places.segment])[order]
    for block in tower.blocks:
        states = block(states, segments, position_embeddings=angles, max_seqlen=states.shape[0], **kwargs)
    states = states[index + places.segment + 1]
    return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=tower.merger(states))


def _states(forward: Function) -> Function:
    def states(**inputs: Any) -> tuple[Tensor, ...]:
        found = forward(**inputs, output_hidden_states=True)
        return (found.last_hidden_state, found.pooler_output, *found.hidden_states)

    return states


def _calls(tower: Any) -> Iterator[dict[str, Any]]:
    merge: int = tower.spatial_merge_size
    weight: Tensor = next(tower.patch_embed.parameters())
    for draw in map(Random, range(_TRIALS)):
        sides = [[merge * draw.randint(1, 3) for _ in range(2)] for _ in range(draw.randint(1, 3))]
        grid = torch.tensor([[draw.randint(1, 2), *side] for side in sides])
        shape = (int(grid.prod(1).sum()), weight[0].numel())
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(draw.randint(0, 99)))
        yield {"pixel_values": pixels.to(weight.device, weight.dtype), "grid_thw": grid.to(weight.device)}
