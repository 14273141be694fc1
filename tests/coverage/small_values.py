"""Holds what all makers of inputs need: random values that do not change, and settings found anywhere in a config."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from tests.coverage.configs.sizes import TEXT_IDS


def random_ids(batch: int, length: int) -> Tensor:
    """Return ids of plain text, the same for the same sizes."""
    generator = torch.Generator().manual_seed(1000 * batch + length)
    return torch.randint(*TEXT_IDS, (batch, length), generator=generator)


def random_values(*shape: int) -> Tensor:
    """Return normal values, the same for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def find_setting(config: Any, *names: str) -> Any:
    """Return the first value of the names in a config or its parts, the outermost first; None without one."""
    level = [config]
    while level:
        for name in names:
            for part in level:
                if (value := vars(part).get(name, getattr(type(part), name, None))) is not None and not callable(value):
                    return value
        level = [part for one in level for part in vars(one).values() if hasattr(part, "to_dict")]
    return None


def image_shape(config: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a config asks for; of any size, where it names none."""
    size = find_setting(config, "image_size", "img_size") or (64, 96)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(find_setting(config, "num_channels", "in_channels", "in_chans") or 3), int(height), int(width)


def packed_patches(config: Any, images: int) -> dict[str, Tensor]:
    """Return images of four times four patches, each patch a row, with their shapes."""
    size = int(find_setting(config, "patch_size", "encoder_patch_size") or 8)
    values = random_values(images, 16, 3 * size * size)
    shapes = torch.tensor([[4, 4]] * images)
    return {
        "pixel_values": values,
        "pixel_attention_mask": torch.ones(images, 16, dtype=torch.long),
        "spatial_shapes": shapes,
    }


def reason(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    first = lines[0] if len(lines[0]) > 30 or len(lines) < 2 else f"{lines[0]} {lines[1]}"
    return f"{type(error).__name__}: {without_places(first)[:300]}"


def without_places(text: str) -> str:
    """Return a text without what differs from run to run: addresses, and names of temporary files."""
    return re.sub(r"0x[0-9a-f]+|/\S*/tmp\w+[^ :]*", "...", re.sub(r"/\S*/site-packages/", "", text))
