"""Images and sounds that a model cannot take, and inputs of another processor: refused before they are computed.

The sizes are those that a tower has no patches, blocks or positions for.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from tests.coverage.build import build_and_run
from tests.coverage.rows import all_rows

CONFIG = adaptc.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


@cache
def program_and_call(family: str, task: str) -> tuple[Any, dict[str, Tensor]]:
    row = next(r for r in all_rows() if (r.family, r.task) == (family, task))
    model, (example, _) = build_and_run(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adaptc.compile(model, CONFIG, example_inputs=example), example


def cut(name: str, axis: int) -> Any:
    """Change an input: one less along an axis."""
    return lambda call: {**call, name: call[name].narrow(axis, 0, call[name].shape[axis] - 1)}


def longer(name: str, axis: int) -> Any:
    """Change an input: it goes on for twice as long."""
    return lambda call: {**call, name: torch.cat([call[name], call[name]], axis)}


def renamed(name: str, other: str) -> Any:
    """Change an input: another model's processor calls it otherwise."""
    return lambda call: {other if n == name else n: t for n, t in call.items()}


def with_more(name: str, like: str) -> Any:
    """Change a call: it has an input that the program has not."""
    return lambda call: {**call, name: call[like]}


LLAVA, WHISPER = ("llava", "IMAGE_TEXT_TO_TEXT"), ("whisper", "SPEECH_SEQ_2_SEQ")
QWEN, CLIP = ("qwen2_vl", "IMAGE_TEXT_TO_TEXT"), ("clip", "ZERO_SHOT_IMAGE_CLASSIFICATION")


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "change", "said"),
    [
        (LLAVA, cut("pixel_values", 2), "'pixel_values': axis 2 has size"),
        (LLAVA, longer("pixel_values", 0), "captured for other values of 'input_ids', 'pixel_values'"),
        (LLAVA, with_more("pixel_values_videos", "pixel_values"), "pixel_values_videos"),
        (LLAVA, renamed("pixel_values", "pixel_attention_mask"), "pixel_"),
        (QWEN, cut("image_grid_thw", 1), "'image_grid_thw': axis 1 has size 2"),
        (QWEN, with_more("pixel_values_videos", "pixel_values"), "pixel_values_videos"),
        (QWEN, renamed("image_grid_thw", "image_sizes"), "image_"),
        (CLIP, cut("pixel_values", 3), "'pixel_values': axis 3 has size"),
        (WHISPER, longer("input_features", 2), "'input_features': axis 2 has size"),
        (WHISPER, cut("input_features", 1), "'input_features': axis 1 has size"),
        (WHISPER, renamed("input_features", "input_values"), "input_"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(model: tuple[str, str], change: Any, said: str) -> None:
    program, call = program_and_call(*model)
    program(**call)
    with pytest.raises(adaptc.AdaptcError, match=said):
        program(**change(call))


@pytest.mark.long
@pytest.mark.parametrize("grid", [(1, 3, 2), (1, 2, 3)])
def test_a_grid_without_whole_blocks_is_refused(grid: tuple[int, int, int]) -> None:
    """Qwen2-VL merges two by two patches."""
    program, call = program_and_call(*QWEN)
    count = grid[0] * grid[1] * grid[2]
    pixels = call["pixel_values"]
    odd = {**call, "image_grid_thw": torch.tensor([grid]), "pixel_values": pixels[:1].expand(count, -1).clone()}
    with pytest.raises(adaptc.AdaptcError):
        program(**odd)
