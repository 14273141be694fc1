"""Masks that transformers maps over positions are made by broadcasting while a model is traced, where that is equal."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration
from transformers.masking_utils import sdpa_mask

import adaptc
from adaptc.capture.replacements.broadcast_masks import broadcast_masks
from tests.support.families import perturb

TEXT = {
    "vocab_size": 67, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 18, "intermediate_size": 29, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 14,
    "patch_size": 7,
}  # fmt: skip
GROUPS = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 2, 2]])


def of_one_group(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query >= key) | (GROUPS[batch, query] == GROUPS[batch, key]) & (GROUPS[batch, key] > 0)


def is_first(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Look at the shape of what it is given, so it gives something else for broadcast positions."""
    return query + key < 4 + query.ndim


def mask_of(function: Any) -> Tensor:
    made = sdpa_mask(
        batch_size=3, q_length=5, kv_length=5, mask_function=function, use_vmap=True, allow_is_causal_skip=False
    )
    assert made is not None
    return made


def test_an_indexing_function_gives_the_same() -> None:
    wanted = mask_of(of_one_group)
    with broadcast_masks() as used:
        assert not used.any
        assert torch.equal(mask_of(of_one_group), wanted)
    assert used.any
    assert torch.equal(mask_of(of_one_group), wanted)


def test_other_threads_map_as_before() -> None:
    wanted, found = mask_of(is_first), list[Tensor]()
    with broadcast_masks() as used:
        thread = threading.Thread(target=lambda: found.append(mask_of(is_first)))
        thread.start()
        thread.join()
        assert not used.any
        assert not torch.equal(mask_of(is_first), wanted)
    assert torch.equal(found[0], wanted)


class OwnMask(nn.Module):
    """Attention with a mask function that transformers maps."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.function = nn.Linear(6, 18), nn.Linear(6, 6), function

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(query, key, value, mask_of(self.function))).squeeze(
            1
        )


@pytest.mark.filterwarnings("ignore:.*was captured for some sizes alone")
def test_a_program_that_would_differ_is_refused() -> None:
    x, config = torch.randn(3, 5, 6), adaptc.LoraConfig(r=2, target_modules=["qkv"])
    program = adaptc.compile(OwnMask(of_one_group), config, example_inputs=x)
    torch.testing.assert_close(program(x), OwnMask(of_one_group)(x))
    with pytest.raises(adaptc.CaptureError, match="masks of its own, in a way"):
        adaptc.compile(OwnMask(is_first), config, example_inputs=x)


def with_images(images: list[int], marker: int, per_image: int) -> dict[str, Tensor]:
    """Return texts of which row i has ``images[i]`` images."""
    rows = [[5 + i, *([marker] * per_image + [9]) * n, 11 + i] for i, n in enumerate(images)]
    length = max(map(len, rows)) + 1
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    pixels = torch.randn(sum(images), 3, 14, 14, generator=torch.Generator().manual_seed(sum(images)))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels}


def built(model: Any) -> Any:
    perturb(model)
    return model.eval()


def gemma3() -> tuple[Any, Any]:
    config = Gemma3Config(
        text_config={**TEXT, "sliding_window": 4}, vision_config=TOWER, mm_tokens_per_image=1, image_token_index=3
    )

    def inputs(images: list[int]) -> dict[str, Tensor]:
        call = with_images(images, 3, 1)
        return {**call, "token_type_ids": (call["input_ids"] == 3).long()}

    return built(Gemma3ForConditionalGeneration(config)), inputs


def llava() -> tuple[Any, Any]:
    config = LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**TOWER, "model_type": "clip_vision_model"},
        image_token_index=3,
    )  # fmt: skip
    return built(LlavaForConditionalGeneration(config)), lambda images: with_images(images, 3, 4)


@pytest.mark.long
@pytest.mark.parametrize("make", [gemma3, llava])
@pytest.mark.filterwarnings("ignore:.*was captured for some sizes alone")
def test_images_of_one_size_in_any_number(make: Any) -> None:
    """Each model takes other numbers of images and rows than it was captured with."""
    torch.manual_seed(0)
    model, inputs = make()
    config = adaptc.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=inputs([1, 1, 1]))
    for images in ([1, 1, 1], [2, 1], [1, 3, 0, 1], [1]):
        call = inputs(images)
        with torch.no_grad():
            wanted = model(**call)["logits"]
            torch.testing.assert_close(program.base(**call)["logits"], wanted, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(program(**call)["logits"], wanted, atol=1e-2)
