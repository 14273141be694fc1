"""Replace methods of a model whose shapes depend on values, where the replacement is found to be equal.

A replacement is compared with the model's own method on inputs drawn at random, before the model is traced. Where no
replacement gives the same, the method stays, and torch says why it cannot be traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

from adaptc.capture.model_functions import Function, gives_the_same
from adaptc.capture.vision.rotary_positions import IMAGE, VIDEO, Grids, rotary_positions

_TRIALS = 12


def equal_positions(module: Any, original: Function) -> Function | None:
    """Return a method that gives what ``module.get_rope_index`` gives, or None where none is known."""
    config = getattr(getattr(module, "config", None), "vision_config", None)
    merge = getattr(config, "spatial_merge_size", None)
    names = set(inspect.signature(original).parameters)
    if merge is None or not {"mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask"} <= names:
        return None
    speed = getattr(config, "tokens_per_second", 1)
    merged = {"merge_frames": getattr(config, "temporal_merge_size", 1)}
    known: tuple[dict[str, Any], ...] = ({}, {"has_texts_between": True}, {"step": speed}, merged)
    for options in known:
        method = _positions_method(original, merge, options)
        if gives_the_same(original, method, _position_calls(merge, names, options)):
            return method
    return None


def _positions_method(original: Function, merge: int, of_videos: dict[str, Any]) -> Function:
    signature = inspect.signature(original)

    def method(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = signature.bind(*args, **kwargs).arguments
        grids: list[Grids] = []
        if (images := given.get("image_grid_thw")) is not None:
            grids.append(Grids(IMAGE, images))
        if (videos := given.get("video_grid_thw")) is not None:
            options = dict(of_videos)
            if (seconds := given.get("second_per_grid_ts")) is not None and "step" in options:
                options["step"] = options["step"] * torch.as_tensor(seconds, device=videos.device)
            grids.append(Grids(VIDEO, videos, **options))
        return rotary_positions(given["mm_token_type_ids"], given.get("attention_mask"), grids, merge)

    return method


def _position_calls(merge: int, names: set[str], of_videos: dict[str, Any]) -> Iterator[dict[str, Any]]:
    draw = Random(0)
    for _ in range(_TRIALS):
        grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
        rows = [_draw_row(draw, merge, grids, of_videos) for _ in range(draw.randint(1, 3))]
        length = max(map(len, rows)) + 1
        kinds, mask = torch.zeros(len(rows), length, dtype=torch.int), torch.zeros(len(rows), length, dtype=torch.long)
        is_left = draw.random() < 0.5
        for i, row in enumerate(rows):
            own = slice(length - len(row), length) if is_left else slice(0, len(row))
            kinds[i, own], mask[i, own] = torch.tensor(row, dtype=torch.int), 1
        call: dict[str, Any] = {"input_ids": torch.ones_like(mask), "mm_token_type_ids": kinds, "attention_mask": mask}
        for kind, name in ((IMAGE, "image_grid_thw"), (VIDEO, "video_grid_thw")):
            call[name] = torch.tensor(grids[kind]) if grids[kind] else None
        if "second_per_grid_ts" in names and grids[VIDEO]:
            call["second_per_grid_ts"] = torch.tensor([draw.choice([0.5, 1.0, 2.0]) for _ in grids[VIDEO]])
        yield call


def _draw_row(draw: Random, merge: int, grids: dict[int, list[list[int]]], of_videos: dict[str, Any]) -> list[int]:
    row: list[int] = []
    has_texts_between, merge_frames = "has_texts_between" in of_videos, of_videos.get("merge_frames", 1)
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice([IMAGE, VIDEO])
        frames = draw.randint(1, 3) if kind == VIDEO else 1
        down, across = draw.randint(1, 4), draw.randint(1, 4)
        grids[kind].append([frames * (merge_frames if kind == VIDEO else 1), merge * down, merge * across])
        tokens = [kind] * (down * across)
        row += [0] * draw.randint(1, 3)
        row += ([*tokens, 0] if has_texts_between and kind == VIDEO else tokens) * frames
    return [*row, *[0] * draw.randint(1, 3)]


def equal_deepstack(module: Any, original: Function) -> Function | None:
    """Return a method that adds features of images to the states of their tokens, or None where none is known."""
    if list(inspect.signature(original).parameters) != ["hidden_states", "visual_pos_masks", "visual_embeds"]:
        return None

    def add(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        mask = visual_pos_masks.to(hidden_states.device).unsqueeze(-1).expand_as(hidden_states)
        found = visual_embeds.to(hidden_states.device, hidden_states.dtype)
        return hidden_states + torch.zeros_like(hidden_states).masked_scatter(mask, found)

    def calls() -> Iterator[dict[str, Any]]:
        draw = torch.Generator().manual_seed(0)
        for rows in range(1, 4):
            mask = torch.rand(rows, 5, generator=draw) < 0.5
            features = torch.randn(int(mask.sum()), 7, generator=draw)
            states = torch.randn(rows, 5, 7, generator=draw)
            yield {"hidden_states": states, "visual_pos_masks": mask, "visual_embeds": features}

    return add if gives_the_same(original, add, calls()) else None
