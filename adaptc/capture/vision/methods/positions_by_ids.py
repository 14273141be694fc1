"""Replace methods that find images in texts by token ids, and give all tokens their positions (Qwen-Omni).

Such a method searches each text as a Python list. A token of sound counts as one of text, so images alone tell how the
positions differ from an index. A call with videos, or with the lengths of sounds, is left to the model.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

from adaptc.capture.model_functions import gives_the_same
from adaptc.capture.vision.rotary_positions import IMAGE, Grids, rotary_positions

_TRIALS = 12
_NAMES = {"input_ids", "image_grid_thw", "video_grid_thw", "attention_mask", "audio_seqlens", "second_per_grids"}
#: the position of padding, and the dtype of all positions, in the models that are known
_KNOWN = ((1, torch.long), (0, torch.float))


def equal_positions_by_ids(module: Any, original: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a method that gives what ``module.get_rope_index`` gives, or None where none is known."""
    config: Any = getattr(module, "config", None)
    ids = [getattr(config, name, None) for name in ("image_token_id", "vision_start_token_id")]
    merge: Any = getattr(module, "spatial_merge_size", None)
    if not set(inspect.signature(original).parameters) >= _NAMES or None in (*ids, merge):
        return None
    for padding, dtype in _KNOWN:
        method = _positions_method(original, config.image_token_id, merge, padding, dtype)
        if gives_the_same(original, method, _calls(config, merge)):
            return method
    return None


def _positions_method(
    original: Callable[..., Any], image: int, merge: int, padding: int, dtype: torch.dtype
) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def method(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = signature.bind(*args, **kwargs).arguments
        ids, mask, grid = (given.get(n) for n in ("input_ids", "attention_mask", "image_grid_thw"))
        others = [given.get(n) for n in ("video_grid_thw", "audio_seqlens")]
        if ids is None or mask is None or grid is None or any(o is not None for o in others):
            return original(*args, **kwargs)
        kinds = torch.where(ids == image, IMAGE, 0)
        positions, deltas = rotary_positions(kinds, mask == 1, [Grids(IMAGE, grid)], merge)
        return torch.where(mask == 1, positions, padding).to(dtype), deltas.to(dtype)

    return method


def _calls(config: Any, merge: int) -> Iterator[dict[str, Any]]:
    draw, image, start = Random(0), config.image_token_id, config.vision_start_token_id
    special = {n for n in vars(config).values() if isinstance(n, int)}
    text = next(n for n in itertools.count(2) if n not in special)
    for _ in range(_TRIALS):
        grids: list[list[int]] = []
        rows: list[list[int]] = []
        for _ in range(draw.randint(1, 3)):
            row: list[int] = []
            for _ in range(draw.randint(1, 3)):
                down, across = draw.randint(1, 4), draw.randint(1, 4)
                grids.append([1, merge * down, merge * across])
                row += [text] * draw.randint(1, 3) + [start] + [image] * (down * across) + [text]
            rows.append(row + [text] * draw.randint(0, 3))
        length = max(map(len, rows)) + 1
        ids, mask = torch.full((len(rows), length), text), torch.zeros(len(rows), length, dtype=torch.long)
        is_left = draw.random() < 0.5
        for i, row in enumerate(rows):
            own = slice(length - len(row), length) if is_left else slice(0, len(row))
            ids[i, own], mask[i, own] = torch.tensor(row), 1
        yield {"input_ids": ids, "image_grid_thw": torch.tensor(grids), "attention_mask": mask}
