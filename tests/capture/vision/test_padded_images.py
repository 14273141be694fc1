"""Models that read the images of each text from an axis of their own, filled up with images of zeros: Idefics, SmolVLM.

They take any number of images for each text, some texts without any, and images that a mask makes smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from tests.coverage.build import build
from tests.coverage.rows import Row
from tests.support.image_models import with_lora_of_peft

#: family -> class, and the tokens of an image
FAMILIES = {
    "idefics2": ("Idefics2ForConditionalGeneration", 64),
    "idefics3": ("Idefics3ForConditionalGeneration", 4),
    "smolvlm": ("SmolVLMForConditionalGeneration", 4),
}
SIZE, PATCH = 32, 8
COUNTS = {
    "as captured": (2, 1, 1),
    "one text, one image": (1,),
    "more of both": (3, 1, 2, 1),
    "a text without images": (1, 0),
    "no image that fills up": (2, 2),
}

# What is refused at a call names the line of the model that refuses it.
pytestmark = pytest.mark.usefixtures("stack_traces")
every_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str) -> Any:
    return build(Row(family, "IMAGE_TEXT_TO_TEXT", FAMILIES[family][0]))


@cache
def adapted_by_peft(family: str) -> tuple[Any, Path]:
    """Return PEFT's model with a LoRA on all linear layers, and its directory."""
    return with_lora_of_peft(model_of(family))


def call_with_images(family: str, counts: Sequence[int], cut: bool = False) -> dict[str, Tensor]:
    """Return the inputs of texts with so many images each. ``cut``: a mask leaves out a part of each second image."""
    draw, (token, per_image) = torch.Generator().manual_seed(sum(counts)), (image_token(family), FAMILIES[family][1])
    pixels = torch.zeros(len(counts), max(counts), 3, SIZE, SIZE)
    mask = torch.zeros(len(counts), max(counts), SIZE, SIZE, dtype=torch.int64)
    texts: list[list[int]] = []
    for row, count in enumerate(counts):
        text = [11, 12]
        for i in range(count):
            height = SIZE - PATCH if cut and i % 2 else SIZE
            pixels[row, i, :, :height] = torch.randn(3, height, SIZE, generator=draw)
            mask[row, i, :height] = 1
            text += [*[token] * per_image, 13 + i]
        texts.append(text)
    length = max(map(len, texts)) + 1
    ids, attention = torch.full((len(counts), length), 9), torch.zeros(len(counts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], attention[row, : len(text)] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": attention, "pixel_values": pixels, "pixel_attention_mask": mask}


@cache
def image_token(family: str) -> int:
    return model_of(family).config.image_token_id


@cache
def program_of(family: str) -> adaptc.AdaptedProgram:
    """Return the program that was captured with one image for each text, which is the usual example."""
    example = call_with_images(family, (1, 1, 1))
    return adaptc.compile(model_of(family), adapted_by_peft(family)[1], example_inputs=example)


@torch.no_grad()
def logits(model: Any, call: dict[str, Tensor]) -> Tensor:
    return model(**call)["logits"]


@pytest.mark.long
@pytest.mark.few(4)
@every_family
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("cut", [False, True])
def test_outputs_are_pefts(family: str, counts: str, cut: bool) -> None:
    oracle, _ = adapted_by_peft(family)
    call = call_with_images(family, COUNTS[counts], cut)
    found = logits(program_of(family), call)
    torch.testing.assert_close(found, logits(oracle, call), rtol=2e-5, atol=2e-5)
    with oracle.disable_adapter():
        assert not torch.allclose(found, logits(oracle, call), rtol=0.02, atol=0.02)
    other = {**call, "pixel_values": call["pixel_values"] * 0.5}
    assert not torch.allclose(found, logits(program_of(family), other), atol=1e-3)


@pytest.mark.long
@every_family
def test_numbers_that_do_not_fit_are_refused(family: str) -> None:
    """Images without placeholders, and masks of other images, before anything is computed."""
    call, program = call_with_images(family, (2, 1)), program_of(family)
    fewer = {**call, "pixel_values": call["pixel_values"].clone()}
    fewer["pixel_values"][0, 1] = 0
    with pytest.raises(adaptc.AdaptcError, match="do not pass the check"):
        program(**fewer)
    with pytest.raises(adaptc.AdaptcError, match="pixel_attention_mask"):
        program(**{**call, "pixel_attention_mask": call["pixel_attention_mask"][:, :1]})


@pytest.mark.long
def test_an_example_whose_masks_are_of_other_images_is_refused() -> None:
    call = call_with_images("idefics3", (2, 2, 2))
    call["pixel_attention_mask"] = call["pixel_attention_mask"][:, :1]
    with pytest.raises(adaptc.CaptureError, match="pixel_attention_mask"):
        adaptc.compile(model_of("idefics3"), adapted_by_peft("idefics3")[1], example_inputs=call)


@pytest.mark.long
def test_prompts_with_any_number_of_images_are_continued() -> None:
    oracle, path = adapted_by_peft("smolvlm")
    example = call_with_images("smolvlm", (1, 1, 1))
    gen = adaptc.compile_for_generation(model_of("smolvlm"), path, example_inputs=example)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for counts in ((2, 2, 2, 2), (1,), (3, 3)):
        call = {n: t[:, :-1] if t.ndim == 2 else t for n, t in call_with_images("smolvlm", counts).items()}
        with torch.no_grad():
            assert torch.equal(gen.generate(**call, **options), oracle.generate(**call, **options))
