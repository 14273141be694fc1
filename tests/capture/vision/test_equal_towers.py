"""Methods of towers that loop over grids are replaced where the replacement gives the same, and nowhere else."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptc.capture.vision.methods.equal_methods import equal_positions
from adaptc.capture.vision.methods.equal_towers import equal_resizing, equal_slicing
from adaptc.capture.vision.methods.local_patches import equal_whole_features
from adaptc.capture.vision.methods.positions_by_ids import equal_positions_by_ids
from tests.coverage.build import build
from tests.coverage.rows import all_rows


def model_of(family: str) -> Any:
    return build(next(r for r in all_rows() if r.family == family)).model


def check(holds: Tensor) -> None:
    assert bool(holds.all())


def test_tables_are_resized_to_each_image() -> None:
    embeddings = model_of("cosmos3_edge").visual.embeddings
    methods = equal_resizing(embeddings, embeddings.resize_positional_embeddings, check)
    assert methods is not None
    grid = torch.tensor([[2, 2, 6], [1, 6, 4], [1, 10, 2]])
    pixels = torch.randn(int(grid.prod(1).sum()), embeddings.patch_embedding.in_features)
    pixels.requires_grad_()
    wanted = embeddings(pixels, grid)
    vars(embeddings).update(methods)
    torch.testing.assert_close(embeddings(pixels, grid), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        embeddings(pixels[:2], torch.tensor([[1, 2, 1]]))


def test_a_table_that_is_resized_otherwise_stays() -> None:
    embeddings = model_of("cosmos3_edge").visual.embeddings
    original = embeddings.resize_positional_embeddings

    def doubled(positional_embeddings: Tensor, grid_thw: Tensor, spatial_merge_size: int) -> Tensor:
        return 2 * original(positional_embeddings, grid_thw, spatial_merge_size)

    def another(table: Tensor, grid_thw: Tensor, spatial_merge_size: int) -> Tensor:
        return original(table, grid_thw, spatial_merge_size)

    assert equal_resizing(embeddings, doubled, check) is None
    assert equal_resizing(embeddings, another, check) is None


def test_images_are_paired_with_themselves() -> None:
    resampler = model_of("ernie4_5_vl_moe").resampler_model
    method = equal_slicing(resampler, resampler._temporal_slicing, check)
    assert method is not None
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    states = torch.randn(7, 5)
    assert torch.equal(method(states, grid), resampler._temporal_slicing(states, grid))
    with pytest.raises(AssertionError):  # a video's frames are paired with each other
        method(states, torch.tensor([[2, 2, 2]]))

    def turned(self: Any, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        return resampler._temporal_slicing(hidden_states.flip(0), grid_thw)

    assert equal_slicing(resampler, MethodType(turned, resampler), check) is None


def test_positions_of_frames_that_are_merged() -> None:
    module = model_of("ernie4_5_vl_moe")
    method = equal_positions(module, module.get_rope_index)
    assert method is not None
    kinds = torch.tensor([[0, 0, 2, 2, 0, 1, 1, 0], [0, 2, 2, 2, 0, 0, 0, 0]])
    call = {
        "input_ids": torch.ones_like(kinds), "mm_token_type_ids": kinds, "image_grid_thw": torch.tensor([[1, 2, 4]]),
        "video_grid_thw": torch.tensor([[4, 2, 2], [2, 2, 6]]),
    }  # fmt: skip
    for found, wanted in zip(method(**call), module.get_rope_index(**call), strict=True):
        assert torch.equal(found, wanted)


BY_IDS = ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"]


def texts_of(config: Any, left: bool) -> dict[str, Any]:
    image, start = config.image_token_id, config.vision_start_token_id
    rows = [[9, 8, start, *[image] * 6, 7, start, *[image] * 2, 9], [8, start, *[image] * 3, 7, 7]]
    ids, mask = torch.full((2, 15), 9), torch.zeros(2, 15, dtype=torch.long)
    for i, row in enumerate(rows):
        own = slice(15 - len(row), 15) if left else slice(0, len(row))
        ids[i, own], mask[i, own] = torch.tensor(row), 1
    grid = torch.tensor([[1, 4, 6], [1, 2, 4], [1, 6, 2]])
    return {"input_ids": ids, "image_grid_thw": grid, "attention_mask": mask}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", BY_IDS)
def test_positions_by_ids(family: str, left: bool) -> None:
    module = model_of(family) if hasattr(model_of(family), "get_rope_index") else None
    assert module is not None
    method = equal_positions_by_ids(module, module.get_rope_index)
    assert method is not None
    call = texts_of(module.config, left)
    for found, wanted in zip(method(**call), module.get_rope_index(**call), strict=True):
        assert torch.equal(found, wanted)
        assert found.dtype == wanted.dtype


def test_calls_with_videos_and_sounds_are_left_to_the_model() -> None:
    module = model_of(BY_IDS[0])
    called: list[dict[str, Any]] = []
    original = module.get_rope_index

    def noted(self: Any, input_ids: Any = None, image_grid_thw: Any = None, video_grid_thw: Any = None,
              attention_mask: Any = None, use_audio_in_video: Any = False, audio_seqlens: Any = None,
              second_per_grids: Any = None) -> Any:  # fmt: skip
        called.append({"video_grid_thw": video_grid_thw, "audio_seqlens": audio_seqlens})
        return original(input_ids, image_grid_thw, video_grid_thw, attention_mask)

    method = equal_positions_by_ids(module, MethodType(noted, module))
    assert method is not None
    call = texts_of(module.config, False)
    called.clear()
    method(**call)
    assert not called
    method(**call, audio_seqlens=torch.tensor([4]))
    method(input_ids=call["input_ids"], attention_mask=call["attention_mask"])
    assert len(called) == 2


def test_other_positions_by_ids_stay() -> None:
    module = model_of(BY_IDS[0])
    original = module.get_rope_index

    def shifted(self: Any, input_ids: Any = None, image_grid_thw: Any = None, video_grid_thw: Any = None,
                attention_mask: Any = None, use_audio_in_video: Any = False, audio_seqlens: Any = None,
                second_per_grids: Any = None) -> Any:  # fmt: skip
        positions, deltas = original(input_ids, image_grid_thw, video_grid_thw, attention_mask)
        return positions + (len(image_grid_thw) > 2), deltas

    assert equal_positions_by_ids(module, MethodType(shifted, module)) is None
    assert equal_positions_by_ids(nn.Linear(2, 2), original) is None


@torch.no_grad()
def test_features_of_images_without_local_patches_stay_whole() -> None:
    model = next(m for m in model_of("step3p7").modules() if hasattr(m, "multi_modal_projector"))
    features = equal_whole_features(model, model.get_image_features)
    assert features is not None
    side = model.config.vision_config.image_size
    pixels, patches = torch.randn(3, 3, side, side), torch.randn(2, 3, side, side)
    wanted, found = model.get_image_features(pixels), features(pixels)
    assert len(found.pooler_output) == 1
    torch.testing.assert_close(found.pooler_output[0], torch.cat(wanted.pooler_output))
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state)
    with_patches = features(pixels, patches, [2, 0, 0]).pooler_output
    torch.testing.assert_close(with_patches, model.get_image_features(pixels, patches, [2, 0, 0]).pooler_output)

    def doubled(pixel_values: Tensor, pixel_values_local: Any = None, num_local_patches: Any = None, **_: Any) -> Any:
        made = model.get_image_features(pixel_values)
        made.pooler_output = [2 * t for t in made.pooler_output]
        return made

    assert equal_whole_features(model, doubled) is None
