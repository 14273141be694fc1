"""A processor of transformers for the tiny Qwen2-VL of ``image_models``, and conversations with images."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from tests.support.image_models import END, FRAMES, IMAGE, MERGE, PATCH, START, VIDEO, VOCAB

_SPECIAL = {
    0: "<pad>", 1: "<bos>", 2: "<eos>", IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>",
    END: "<|vision_end|>",
}  # fmt: skip
_TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    " <|vision_start|> <|image_pad|> <|vision_end|> {% else %} {{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


@cache
def processor() -> Any:
    """Return the processor, which is not to be changed. Words are w9, w10 and so on; images keep 4 to 48 patches."""
    inner = Tokenizer(models.WordLevel({_SPECIAL.get(i, f"w{i}"): i for i in range(VOCAB)}, unk_token="w9"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [_SPECIAL[i] for i in (IMAGE, VIDEO, START, END)]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="w9",
        additional_special_tokens=marks, padding_side="left",
    )  # fmt: skip
    sizes = {"patch_size": PATCH, "temporal_patch_size": FRAMES, "merge_size": MERGE}
    side = PATCH * MERGE
    images = transformers.Qwen2VLImageProcessor(**sizes, min_pixels=side**2, max_pixels=12 * side**2)
    return transformers.Qwen2VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=_TEMPLATE,
    )  # fmt: skip


def image(height: int, width: int) -> Any:
    """Return an image of random colours, always the same for its size."""
    colours = np.random.default_rng(1000 * height + width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(colours)


def conversations(count: int) -> list[dict[str, Any]]:
    """Return questions with one or two images each, and their answers, as TRL takes them."""
    return [
        {
            "images": [image(28 + 14 * (i % 3), 28)] * (1 + i % 2),
            "prompt": [{"role": "user", "content": f"w{10 + i} w{20 + i}"}],
            "completion": [{"role": "assistant", "content": f"w{30 + i} w{40 + i} w{41 + i % 4}"}],
        }
        for i in range(count)
    ]
