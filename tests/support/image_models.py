"""Tiny models whose vision towers take the patches of all images in one row, and texts with images of given sizes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import adaptc
from tests.support.families import perturb
from tests.support.oracle import gradients_by_key, quiet, randomize

IMAGE, VIDEO, START, END, VOCAB = 3, 4, 5, 6, 71
MERGE, PATCH, FRAMES = 2, 7, 2
Grid = tuple[int, int, int]

_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}  # fmt: skip
_VISION = {"depth": 2, "num_heads": 2, "in_channels": 3, "patch_size": PATCH, "temporal_patch_size": FRAMES,
           "spatial_merge_size": MERGE}  # fmt: skip
_GLM = {"image_start_token_id": START, "image_end_token_id": END, "video_start_token_id": 7, "video_end_token_id": 8}
#: family -> (class of the model, class of its config, settings of the tower, settings of the config)
FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any], Mapping[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", {"embed_dim": 16, "hidden_size": 24}, _IDS),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"hidden_size": 16, "intermediate_size": 27, "out_hidden_size": 24, "window_size": 28,
         "fullatt_block_indexes": [1], "tokens_per_second": 2},
        _IDS,
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {"hidden_size": 16, "intermediate_size": 27, "out_hidden_size": 24, "num_position_embeddings": 25,
         "deepstack_visual_indexes": [0]},
        _IDS,
    ),
    "glm4v": (
        "Glm4vForConditionalGeneration",
        "Glm4vConfig",
        {"hidden_size": 16, "intermediate_size": 27, "out_hidden_size": 24, "image_size": 35},
        {**{k: v for k, v in _IDS.items() if k.endswith("token_id") and "vision" not in k}, **_GLM},
    ),
}  # fmt: skip


def build(family: str) -> Any:
    """Return the family's model, from a fixed seed, in eval mode."""
    import transformers

    model_class, config_class, tower, settings = FAMILIES[family]
    config = getattr(transformers, config_class)(
        text_config=dict(_TEXT), vision_config={**_VISION, **tower}, **settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
    perturb(model)
    return model.eval()


@cache
def adapted_by_peft(family: str) -> tuple[Any, Path]:
    """Return PEFT's model with a LoRA on all linear layers, tower and projector included, and its directory."""
    return with_lora_of_peft(build(family))


def with_lora_of_peft(base: Any) -> tuple[Any, Path]:
    """Return ``base`` as PEFT's model with a random LoRA on all linear layers, and the adapter's directory."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
    with quiet():
        model = peft.get_peft_model(base, config).eval()
    randomize(model)
    path = Path(tempfile.mkdtemp())
    model.save_pretrained(str(path))
    return model, path


def with_labels(call: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with labels, which are the text's own tokens where it is not masked."""
    return {**call, "labels": call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)}


def check_training(
    model: Any, oracle: Any, path: Path, example: dict[str, Tensor], call: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """The loss of a call with labels is PEFT's, and so is the gradient of each tensor of the adapter in ``path``."""
    example, call = ({k: t.to(dtype) if t.is_floating_point() else t for k, t in c.items()} for c in (example, call))
    module = adaptc.compile(model.to(dtype), path, example_inputs=example, training=True).module()
    twin = copy.deepcopy(oracle).to(dtype).train()
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_("lora_" in name)
    found, wanted = (side(**copy.deepcopy(call))["loss"] for side in (module, twin))
    found.backward()
    wanted.backward()
    # Sums in another order: rounding grows on the way back through all layers.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)
    ours, theirs = gradients_by_key(module), gradients_by_key(twin)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        largest = float(value.abs().max())
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=tolerance * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


def call_with_images(rows: Sequence[Sequence[Grid]], *, pads_left: bool = False) -> dict[str, Tensor]:
    """Return the inputs of texts with images; ``rows`` has the grids of each text's images, in patches."""
    draw = torch.Generator().manual_seed(sum(map(len, rows)))
    texts: list[list[int]] = []
    for i, grids in enumerate(rows):
        text = torch.randint(9, VOCAB, (2 + i,), generator=draw).tolist()
        for frames, height, width in grids:
            text += [START, *[IMAGE] * (frames * height * width // MERGE**2), END, 11 + i]
        texts.append(text)
    length = max(map(len, texts)) + 1
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, text in enumerate(texts):
        own = slice(length - len(text), length) if pads_left else slice(0, len(text))
        ids[i, own], mask[i, own] = torch.tensor(text), 1
    grid = torch.tensor([g for grids in rows for g in grids])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * FRAMES * PATCH * PATCH, generator=draw)
    return {
        "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int(), "pixel_values": patches,
        "image_grid_thw": grid,
    }  # fmt: skip


def answers(count: int, length: int) -> Tensor:
    """Return ids (count, length) that are of no image, as a user's next turn."""
    return torch.randint(9, VOCAB, (count, length), generator=torch.Generator().manual_seed(7))
