"""Makes texts with images in them, in the forms that transformers' models take.

A form makes the inputs of some images. How many placeholders stand for an image is found by running the model, whose
error tells the number of features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.coverage.configs.sizes import VOCAB
from tests.coverage.small_values import find_setting, image_shape, packed_patches, random_values

Maker = Callable[[int, int], dict[str, Any]]
#: number of images, length of the text -> inputs
Form = Callable[[int, int], dict[str, Any]]
_COUNTS = re.compile(r"(?:[Tt]okens|[Pp]laceholder tokens|n_tokens)\D{1,20}(\d+)\D+(\d+)")
#: what configs call the id of a placeholder
IMAGE_TOKENS = (
    "image_token_id",
    "image_token_index",
    "image_pad_token_id",
    "im_patch_id",
    "media_placeholder_token_id",
    "img_context_token_id",
    "video_token_index",
)


def image_text_forms(model: Any, forward: list[str], text: Maker) -> Iterator[Maker]:
    """Yield makers of texts with an image in each row, of all forms that ``forward`` takes."""
    for form in _forms(model, forward):
        yield beside(model, forward, text, form)


def beside(
    model: Any, forward: list[str], text: Maker, form: Form, tokens: tuple[str, ...] = IMAGE_TOKENS, first: int = 1
) -> Maker:
    """Return a maker of texts with what ``form`` makes.

    ``tokens`` are what configs call the id of its placeholder. ``first`` is the number of placeholders that is tried
    first.
    """
    found: dict[tuple[int, int], int] = {}

    def make(batch: int, length: int) -> dict[str, Any]:
        count, tried = found.get((batch, length), next(iter(found.values()), first)), set()
        while True:
            written = _with_placeholders(model.config, forward, text(batch, length), count, tokens)
            inputs = {**written, **form(batch, written["input_ids"].shape[1])}
            tried.add(count)
            try:
                with torch.no_grad():
                    model(**inputs)
            except Exception as error:
                if not (told := _COUNTS.search(str(error))):
                    raise
                marked, features = map(int, told.groups())
                guesses = [features // batch, count * features // max(marked, 1), features // batch // 32]
                count = next((g for g in guesses if g and g not in tried), 0)
                if not count or len(tried) > 5:
                    raise
            else:
                found[batch, length] = count
                return inputs

    return make


def _with_placeholders(
    config: Any, forward: list[str], text: dict[str, Any], count: int, tokens: tuple[str, ...]
) -> dict[str, Any]:
    """Return the text with ``count`` placeholders after the first token of each row."""
    token = find_setting(config, *tokens)
    ids, mask = text["input_ids"], text.get("attention_mask")
    if token is None and "image_embeds_position_mask" in forward:
        token, count = VOCAB - 1, int(find_setting(config, "latent_query_num") or 1)
    if token is None:
        return text
    marks = [find_setting(config, f"vision_{end}_token_id", f"image_{end}_token_id") for end in ("start", "end")]
    middle = [
        *([marks[0]] if marks[0] is not None else []),
        *[token] * count,
        *([marks[1]] if marks[1] is not None else []),
    ]
    block = torch.tensor(middle).expand(len(ids), len(middle))
    out = {**text, "input_ids": torch.cat([ids[:, :1], block, ids[:, 1:]], 1)}
    if mask is not None:
        out["attention_mask"] = torch.cat([mask[:, :1], torch.ones_like(block), mask[:, 1:]], 1)
    # PaliGemma's processor gives every token of a prompt the type 0, images too: 1 is for the answer it learns.
    has_kinds = tokens is IMAGE_TOKENS and config.model_type != "paligemma"
    kinds = (out["input_ids"] == token).long() if has_kinds else torch.zeros_like(out["input_ids"])
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if name in forward:
            out[name] = kinds
    if "image_embeds_position_mask" in forward:
        out["image_embeds_position_mask"] = kinds
    return out


def _forms(model: Any, forward: list[str]) -> Iterator[Form]:
    config = model.config
    channels, height, width = image_shape(getattr(config, "vision_config", None) or config)
    vision = getattr(config, "vision_config", None) or config
    patch = find_setting(vision, "patch_size", "spatial_patch_size") or 8
    patch = int(patch[0] if isinstance(patch, (list, tuple)) else patch)
    merge = find_setting(config, "spatial_merge_size", "merge_size", "downsample_factor") or 2
    merge = int(merge[0] if isinstance(merge, (list, tuple)) else merge)
    frames = int(find_setting(vision, "temporal_patch_size") or 1)

    def with_grid(shape: tuple[int, ...], rows: int = 2 * merge, columns: int = 2 * merge, ndim: int = 3) -> Form:
        def form(images: int, length: int) -> dict[str, Any]:
            grid = torch.tensor([[1, rows, columns][3 - ndim :]]).expand(images, ndim).contiguous()
            name = "image_grid_thw" if ndim == 3 else "image_grid_hw"
            sizes = {"image_merge_sizes": torch.full((images,), merge)} if "image_merge_sizes" in forward else {}
            return {"pixel_values": random_values(images * rows * columns, *shape), name: grid, **sizes}

        return form

    def plain(*shape: int, **more: tuple[tuple[int, ...], Any]) -> Form:
        def form(images: int, length: int) -> dict[str, Any]:
            extras = {}
            for name, (of, value) in more.items():
                sizes = [length if s == -1 else s for s in of]
                extras[name] = torch.as_tensor(value).expand(images, *sizes).clone()
            return {"pixel_values": random_values(images, *shape), **extras}

        return form

    if "image_grid_thw" in forward:
        yield with_grid((channels * frames * patch * patch,))
        yield with_grid((channels * patch * patch,))
        yield with_grid((channels * 2 * patch * patch,))
        yield with_grid((channels, patch, patch))
        yield with_grid((channels, frames, patch, patch))
        yield with_grid((frames, channels, patch, patch))
        inner = with_grid((channels, patch, patch))
        yield lambda images, length: {
            k: v[None] if k == "pixel_values" else v for k, v in inner(images, length).items()
        }
    if "image_grid_hw" in forward:
        yield with_grid((channels * patch * patch,), ndim=2)
        yield with_grid((channels, patch, patch), ndim=2)
    size = [height, width]
    flat = (height // patch) * (width // patch)
    if "image_sizes" in forward:
        yield plain(channels, height, width, image_sizes=((2,), size))
        yield plain(5, channels, height, width, image_sizes=((2,), [2 * s for s in size]))
        yield plain(3, channels, height, width, image_sizes=((2,), [2 * height, width]))
        yield plain(2, channels, height, width, image_sizes=((2,), size))
    if "spatial_shapes" in forward:
        yield lambda images, length: packed_patches(config, images)
    if "image_position_ids" in forward:
        places = [[i % 6, i // 6] for i in range(36)]
        for side in (patch, 3 * patch):
            yield plain(36, channels * side * side, image_position_ids=((36, 2), places))
    if "aspect_ratio_ids" in forward:
        tiles = int(find_setting(vision, "max_num_tiles") or 4)
        yield plain(
            1,
            tiles,
            channels,
            height,
            width,
            aspect_ratio_ids=((1,), 1),
            aspect_ratio_mask=((1, tiles), 1),
            cross_attention_mask=((-1, 1, tiles), 1),
        )
    if "image_attention_mask" in forward:
        yield plain(1, channels, height, width, image_attention_mask=((-1, 1), 1))
    if "high_res_pixel_values" in forward:
        high = int(find_setting(getattr(config, "high_res_vision_config", config), "image_size") or height)

        def both(images: int, length: int) -> dict[str, Any]:
            return {
                **plain(channels, height, width)(images, length),
                "high_res_pixel_values": random_values(images, channels, high, high),
            }

        yield both
    if "pixel_attention_mask" in forward:
        yield plain(1, channels, height, width, pixel_attention_mask=((1, height, width), 1))
    yield plain(channels, height, width)
    yield plain(flat, channels * patch * patch)
    yield plain(1, channels, height, width)
    yield plain(2, channels, height, width)
    yield plain(4, channels, height, width)
