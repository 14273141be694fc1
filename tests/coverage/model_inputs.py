"""Makes eager inputs for the model of a task, at a batch and a length.

Texts have a mask that pads the last row. Images have the config's size. Beside a text, images come in the forms that
transformers' models take, which are tried one after another until the model runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.coverage.audio_inputs import audio_text_forms, sounds
from tests.coverage.image_texts import IMAGE_TOKENS, image_text_forms
from tests.coverage.small_values import find_setting, image_shape, packed_patches, random_ids, random_values

#: (batch, length) of the two calls; the first is what adaptc captures by itself
SIZES = ((3, 7), (2, 11))
Maker = Callable[[int, int], dict[str, Any]]


def makers(model: Any, task: str) -> Iterator[Maker]:
    """Yield functions of batch and length that make inputs, the most likely first."""
    forward = list(inspect.signature(model.forward).parameters)
    both = "pixel_values" in forward and "input_ids" in forward
    if both and (task == "IMAGE_TEXT_TO_TEXT" or find_setting(model.config, *IMAGE_TOKENS) is not None):
        yield from image_text_forms(model, forward, _with_decoder(_text(forward), forward))
    if "input_ids" in forward and {"input_features", "input_values"} & set(forward):
        yield from audio_text_forms(model, forward, _text(forward))
    for make in (_series, _images, _patches):
        yield from make(model, forward)
    for maker in sounds(model.config, forward):
        yield from _beside_text(maker, forward)
    if "input_ids" in forward:
        yield _with_decoder(_text(forward), forward)


def _text(forward: list[str]) -> Maker:
    def make(batch: int, length: int) -> dict[str, Any]:
        ids = random_ids(batch, length)
        out = {"input_ids": ids}
        if "attention_mask" in forward:
            out["attention_mask"] = torch.ones_like(ids)
            out["attention_mask"][-1, length - length // 3 :] = 0
        if "qformer_input_ids" in forward:
            out["qformer_input_ids"] = ids.flip(1)
        if "visual_bbox" in forward:
            out["bbox"] = torch.rand(batch, length, 4, generator=torch.Generator().manual_seed(length))
        return out

    return make


def _with_decoder(maker: Maker, forward: list[str]) -> Maker:
    if "decoder_input_ids" not in forward:
        return maker

    def make(batch: int, length: int) -> dict[str, Any]:
        return {**maker(batch, length), "decoder_input_ids": random_ids(batch, length + 4)}

    return make


def _images(model: Any, forward: list[str]) -> Iterator[Maker]:
    name = next((n for n in ("pixel_values", "pixel_values_videos") if n in forward), None)
    if name is None:
        return
    shapes = [image_shape(model.config), (3, 64, 64)]
    if getattr(getattr(model.config, "vision_config", None) or model.config, "image_size", None) is None:
        # adaptc captures with such images, too.
        shapes.insert(0, (shapes[0][0], 64, 96))
    frames = find_setting(model.config, "num_frames", "frames_per_clip")
    if frames:
        shapes = [(int(frames), *shape) for shape in shapes] + shapes
    if "spatial_shapes" in forward:
        yield from _beside_text(lambda batch, length: packed_patches(model.config, batch), forward)
    for shape in shapes:

        def pixels(batch: int, length: int, shape: tuple[int, ...] = shape) -> dict[str, Any]:
            out: dict[str, Any] = {name: random_values(batch, *shape)}
            if "prompt_depth" in forward:
                out["prompt_depth"] = random_values(batch, 1, *shape[1:])
            return out

        yield from _beside_text(pixels, forward)


def _beside_text(maker: Maker, forward: list[str]) -> Iterator[Maker]:
    """Yield ``maker`` with texts where the model takes both, and alone."""
    if "input_ids" in forward:
        text = _text(forward)
        yield _with_decoder(lambda batch, length: {**text(batch, length), **maker(batch, length)}, forward)
    if "decoder_input_ids" in forward:
        yield _with_decoder(maker, forward)
    yield maker


def _patches(model: Any, forward: list[str]) -> Iterator[Maker]:
    """Yield images as patches in rows, whose first two values are their row and column."""
    if "flattened_patches" not in forward:
        return
    size = int(find_setting(model.config, "patch_size") or 8)

    def patches(batch: int, length: int) -> dict[str, Any]:
        values = random_values(batch, 6, int(find_setting(model.config, "patch_embed_hidden_size") or 3 * size * size))
        places = torch.tensor([[1 + i // 3, 1 + i % 3] for i in range(6)]).expand(batch, 6, 2)
        return {"flattened_patches": torch.cat([places.to(values.dtype), values], -1)}

    yield from _beside_text(patches, forward)


def _series(model: Any, forward: list[str]) -> Iterator[Maker]:
    if "past_values" not in forward:
        return

    def series(batch: int, length: int) -> dict[str, Any]:
        out: dict[str, Any] = {"past_values": random_values(batch, 128)}
        if "freq" in forward:
            out["freq"] = torch.zeros(batch, 1, dtype=torch.long)
        return out

    yield series
