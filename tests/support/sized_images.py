"""Tiny models that loop over images of different sizes, and texts with such images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.coverage.build import build
from tests.coverage.image_texts import IMAGE_TOKENS
from tests.coverage.rows import Row
from tests.coverage.small_values import find_setting
from tests.support.image_models import with_lora_of_peft

#: the height and width of an image, in units of its family
Size = tuple[int, int]
Images = Callable[[Any, Sequence[Size]], dict[str, Tensor]]
#: the height and width of a tile, in pixels
TILE = 32


def _values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _padded(model: Any, sizes: Sequence[Size], unit: int) -> dict[str, Tensor]:
    """Return images that are padded to the largest, with ``unit`` pixels to a unit."""
    own = torch.tensor(sizes) * unit
    height, width = own.amax(0).tolist()
    return {"pixel_values": _values(len(sizes), 3, height, width), "image_sizes": own}


def _of_patches(model: Any, sizes: Sequence[Size]) -> dict[str, Tensor]:
    return _padded(model, sizes, model.config.vision_config.patch_size)


def _of_codes(model: Any, sizes: Sequence[Size]) -> dict[str, Tensor]:
    return _padded(model, sizes, model.model.vqmodel.vision_spatial_factor)


def _of_tiles(model: Any, sizes: Sequence[Size]) -> dict[str, Tensor]:
    """Return images in tiles, with as many for each as for the one with the most; a unit is of eleven pixels."""
    own = torch.tensor(sizes) * 11
    count = sys.modules[type(model).__module__].image_size_to_num_patches
    most = max(count(size, model.config.image_grid_pinpoints, TILE) for size in own)
    return {"pixel_values": _values(len(sizes), most, 3, TILE, TILE), "image_sizes": own}


def _of_grids(*patch: int) -> Images:
    """Return a maker of images whose patches are in one row; a unit is of two patches."""

    def make(model: Any, sizes: Sequence[Size]) -> dict[str, Tensor]:
        grid = torch.tensor([[1, 2 * height, 2 * width] for height, width in sizes])
        return {"pixel_values": _values(int(grid.prod(1).sum()), *patch), "image_grid_thw": grid}

    return make


def _of_merged_grids(model: Any, sizes: Sequence[Size]) -> dict[str, Tensor]:
    merges = torch.tensor([2 - i % 2 for i in range(len(sizes))])
    return {**_of_grids(192)(model, sizes), "image_merge_sizes": merges}


#: family -> class, and its images of some sizes
FAMILIES: Mapping[str, tuple[str, Images]] = {
    "mistral3": ("Mistral3ForConditionalGeneration", _of_patches),
    "lighton_ocr": ("LightOnOcrForConditionalGeneration", _of_patches),
    "mistral_large4": ("MistralLarge4ForConditionalGeneration", _of_patches),
    "llava_next": ("LlavaNextForConditionalGeneration", _of_tiles),
    "llava_next_video": ("LlavaNextVideoForConditionalGeneration", _of_tiles),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", _of_tiles),
    "llava_onevision1_5": ("LlavaOnevision15ForConditionalGeneration", _of_grids(192)),
    "emu3": ("Emu3ForConditionalGeneration", _of_codes),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", _of_grids(3, 8, 8)),
    "paddleocr_vl": ("PaddleOCRVLForConditionalGeneration", _of_grids(3, 8, 8)),
    "lfm3_vl": ("Lfm3VlForConditionalGeneration", _of_grids(384)),
    "video_llama_3": ("VideoLlama3ForConditionalGeneration", _of_merged_grids),
}
#: the heights and widths of fields of tiles, of which the last is scaled down by models that do so
RESOLUTIONS = [[64, 32], [32, 64], [64, 64], [32, 96], [96, 160]]


def model_of(family: str) -> Any:
    model = build(Row(family, "IMAGE_TEXT_TO_TEXT", FAMILIES[family][0]))
    if hasattr(model.config, "image_grid_pinpoints"):
        model.config.image_grid_pinpoints = RESOLUTIONS
    for module in model.modules():  # Emu3 has some by default
        vars(module).update(dict.fromkeys({"p", "dropout", "attention_dropout"} & {*vars(module)}, 0.0))
    return model


@cache
def adapted_by_peft(family: str) -> tuple[Any, Path]:
    """Return PEFT's model with a LoRA on all linear layers, and its directory."""
    return with_lora_of_peft(model_of(family))


@cache
def _plain(family: str) -> Any:
    return model_of(family)


def image_token(family: str) -> int:
    config = _plain(family).config
    return config.vocabulary_map["<image>"] if family == "emu3" else find_setting(config, *IMAGE_TOKENS)


def call_with_images(
    family: str, rows: Sequence[Sequence[Size]], *, pads_left: bool = False, tells_counts: bool = False
) -> dict[str, Tensor]:
    """Return the inputs of texts with images; ``rows`` has the sizes of each text's images, in units.

    ``tells_counts`` adds the number of each text's images, by which LLaVA-OneVision cuts images into tiles.
    """
    model, token = _plain(family), image_token(family)
    images = FAMILIES[family][1](model, [size for sizes in rows for size in sizes])
    if tells_counts:
        images["batch_num_images"] = torch.tensor([len(sizes) for sizes in rows])
    with torch.no_grad():
        counts = [len(f) for f in model.model.get_image_features(**images, return_dict=True).pooler_output]
    left, texts = iter(counts), list[list[int]]()
    for i, sizes in enumerate(rows):
        texts.append([11 + i, 12])
        for _ in sizes:
            texts[-1] += [*[token] * next(left), 21 + i]
    length = max(map(len, texts)) + 1
    ids, mask = torch.full((len(rows), length), 9), torch.zeros(len(rows), length, dtype=torch.long)
    for i, text in enumerate(texts):
        own = slice(length - len(text), length) if pads_left else slice(0, len(text))
        ids[i, own], mask[i, own] = torch.tensor(text), 1
    kinds = {"mm_token_type_ids": (ids == token).int()} if family == "paddleocr_vl" else {}
    return {"input_ids": ids, "attention_mask": mask, **kinds, **images}
