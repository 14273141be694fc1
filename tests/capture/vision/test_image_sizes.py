"""Models that loop over the sizes of their images, adapted for any number of images of any sizes, against PEFT."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llava_next import modeling_llava_next

import adaptc
from tests.support.image_models import check_training, with_labels
from tests.support.sized_images import (
    FAMILIES,
    RESOLUTIONS,
    TILE,
    adapted_by_peft,
    call_with_images,
    image_token,
    model_of,
)

EXAMPLE = [[(2, 3)], [(3, 2)], [(2, 3)]]
CALLS = {
    "as captured": EXAMPLE,
    "one text, one image": [[(3, 5)]],
    "a text without images": [[], [(5, 3)], [(2, 2), (9, 4), (3, 7)]],
    "more images than texts": [[(2, 5), (3, 3), (4, 2)], [(7, 2)]],
}
#: the families whose layers keep something else than keys and values
NO_STEP = {"mistral_large4"}
#: the families with a grouped matmul of experts, which torch has in float32 at most
GROUPED = {"kimi_k25", "mistral_large4"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*of layers that the program never calls:adaptc.AdaptcWarning"),
    # What is refused at a call names the line of the model that refuses it.
    pytest.mark.usefixtures("stack_traces"),
]
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def program_of(family: str) -> adaptc.AdaptedProgram:
    path = adapted_by_peft(family)[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*captured for those of the example inputs alone")
        return adaptc.compile(model_of(family), path, example_inputs=call_with_images(family, EXAMPLE))


@torch.no_grad()
def logits(model: Any, call: dict[str, Tensor]) -> Tensor:
    return model(**copy.deepcopy(call))["logits"]


@pytest.mark.long
@pytest.mark.few(12)
@every_family
@pytest.mark.parametrize("which", CALLS)
def test_outputs_are_pefts(family: str, which: str) -> None:
    oracle, _ = adapted_by_peft(family)
    call = call_with_images(family, CALLS[which])
    wanted, found = logits(oracle, call), logits(program_of(family), call)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    with oracle.disable_adapter():
        assert not torch.allclose(found, logits(oracle, call), rtol=0.02, atol=0.02)
    other = {**call, "pixel_values": call["pixel_values"].flip(0, -1).sin()}
    assert not torch.allclose(found, logits(program_of(family), other), atol=1e-3)


@pytest.mark.long
@pytest.mark.few(4)
@every_family
def test_numbers_that_do_not_fit_are_refused(family: str) -> None:
    call = call_with_images(family, EXAMPLE)
    ids = call["input_ids"].clone()
    ids[0, (ids[0] == image_token(family)).nonzero()[0]] = 13
    with pytest.raises(adaptc.AdaptcError, match="do not pass the check"):
        program_of(family)(**{**call, "input_ids": ids})
    sizes = next(n for n in call if n in ("image_sizes", "image_grid_thw"))
    with pytest.raises(adaptc.AdaptcError):
        program_of(family)(**{**call, sizes: call[sizes][:-1]})


@pytest.mark.long
@pytest.mark.few(4)
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NO_STEP))
def test_prompts_are_continued(family: str) -> None:
    oracle, path = adapted_by_peft(family)
    example = call_with_images(family, EXAMPLE, pads_left=True)
    gen = adaptc.compile_for_generation(model_of(family), path, example_inputs=example, max_length=128)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for rows in ([[(3, 4)]], [[], [(4, 3)], [(2, 2), (2, 3)]]):
        call = call_with_images(family, rows, pads_left=True)
        with torch.no_grad():
            assert torch.equal(gen.generate(**call, **options), oracle.generate(**call, **options))


@pytest.mark.long
@pytest.mark.few(2)
@every_family
def test_text_alone_is_captured_as_before(family: str) -> None:
    model = model_of(family)
    program = adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules="all-linear"))
    call = {n: t for n, t in call_with_images(family, EXAMPLE).items() if n in ("input_ids", "attention_mask")}
    call["input_ids"] = call["input_ids"].masked_fill(call["input_ids"] == image_token(family), 12)
    wanted = logits(model, call)
    assert (logits(program.base, call) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def check_outputs(family: str, example: dict[str, Tensor], call: dict[str, Tensor]) -> None:
    oracle, path = adapted_by_peft(family)
    program = adaptc.compile(model_of(family), path, example_inputs=example)
    wanted = logits(oracle, call)
    assert (logits(program, call) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.long
def test_frames_attend_to_each_other_and_are_merged() -> None:
    grid = torch.tensor([[3, 4, 2], [1, 2, 2], [2, 4, 4]])
    pixels = torch.randn(int(grid.prod(1).sum()), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    counts = (grid[:, 1] * grid[:, 2] // 4).tolist()
    ids = torch.tensor([[11, *[image_token("kimi_k25")] * sum(counts), 12, 13]])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_grid_thw": grid}
    check_outputs("kimi_k25", call_with_images("kimi_k25", EXAMPLE), call)


@pytest.mark.long
def test_several_images_of_a_text_are_not_cut_into_tiles() -> None:
    rows = [[(2, 3), (5, 4)], [(3, 2)], [], [(4, 6)]]
    example, call = (call_with_images("llava_onevision", r, tells_counts=True) for r in ([*EXAMPLE, rows[0]], rows))
    assert call["batch_num_images"].tolist() == [2, 1, 0, 1]
    check_outputs("llava_onevision", example, call)


@pytest.mark.long
def test_tiles_that_are_joined_before() -> None:
    calls = [call_with_images("llava_next", rows) for rows in (EXAMPLE, CALLS["more images than texts"])]
    count = modeling_llava_next.image_size_to_num_patches
    for call in calls:
        counts = [count(size, RESOLUTIONS, TILE) for size in call["image_sizes"]]
        pairs = zip(call["pixel_values"], counts, strict=True)
        call["pixel_values"] = torch.cat([tiles[:n] for tiles, n in pairs])
    check_outputs("llava_next", *calls)


@pytest.mark.long
def test_torch_reads_a_saved_program(tmp_path: Path) -> None:
    for family in ("mistral3", "llava_next", "emu3", "video_llama_3"):
        call = call_with_images(family, CALLS["a text without images"])
        program, file = adaptc.merge(program_of(family)), tmp_path / f"{family}.pt2"
        adaptc.save(program, file)
        found = torch.export.load(file).module()(**call)["logits"]
        wanted = logits(program, call)
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.long
@pytest.mark.few(5)
@every_family
def test_gradients_of_training(family: str) -> None:
    """The loss of a text with images, and the gradients of all adapters, are PEFT's, at sizes that are not captured."""
    oracle, path = adapted_by_peft(family)
    example, call = (with_labels(call_with_images(family, r)) for r in (EXAMPLE, CALLS["a text without images"]))
    check_training(model_of(family), oracle, path, example, call, torch.float32 if family in GROUPED else torch.float64)
