"""Methods of a model are replaced where the replacement gives the same, and nowhere else."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch

from adaptc.capture.vision.methods.equal_methods import equal_deepstack, equal_positions
from tests.support.image_models import FAMILIES, build, call_with_images

WITH_POSITIONS = list(FAMILIES)


@pytest.mark.parametrize("family", WITH_POSITIONS)
@pytest.mark.parametrize("pads_left", [False, True])
def test_positions(family: str, pads_left: bool) -> None:
    module = build(family).model
    method = equal_positions(module, module.get_rope_index)
    assert method is not None
    call = call_with_images([[(1, 4, 6), (1, 2, 2)], [(1, 6, 2)], [(1, 2, 8)]], pads_left=pads_left)
    arguments = {k: call[k] for k in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
    for found, wanted in zip(method(**arguments), module.get_rope_index(**arguments), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("seconds", [None, [0.5, 2.0]])
def test_positions_of_videos(seconds: list[float] | None) -> None:
    module = build("qwen2_5_vl").model
    method = equal_positions(module, module.get_rope_index)
    assert method is not None
    kinds = torch.tensor([[0, 0, 2, 2, 2, 2, 0, 1, 0], [0, 2, 2, 2, 2, 2, 2, 0, 0]])
    call: dict[str, Any] = {
        "input_ids": torch.ones_like(kinds), "mm_token_type_ids": kinds, "image_grid_thw": torch.tensor([[1, 2, 2]]),
        "video_grid_thw": torch.tensor([[2, 2, 4], [3, 4, 2]]), "second_per_grid_ts": seconds,
    }  # fmt: skip
    for found, wanted in zip(method(**call), module.get_rope_index(**call), strict=True):
        assert torch.equal(found, wanted)


def test_a_method_that_gives_something_else_stays() -> None:
    module = build("qwen2_vl").model
    original = module.get_rope_index

    def shifted(self: Any, input_ids: Any, mm_token_type_ids: Any, image_grid_thw: Any = None,
                video_grid_thw: Any = None, attention_mask: Any = None) -> Any:  # fmt: skip
        positions, deltas = original(input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, attention_mask)
        return positions + (image_grid_thw is not None and len(image_grid_thw) > 2), deltas

    assert equal_positions(module, MethodType(shifted, module)) is None
    assert equal_positions(module, original) is not None


def test_features_are_added_where_images_are() -> None:
    text = build("qwen3_vl").model.language_model
    assert equal_deepstack(text, text._deepstack_process) is not None

    def doubled(self: Any, hidden_states: Any, visual_pos_masks: Any, visual_embeds: Any) -> Any:
        return text._deepstack_process(hidden_states, visual_pos_masks, 2 * visual_embeds)

    assert equal_deepstack(text, MethodType(doubled, text)) is None
