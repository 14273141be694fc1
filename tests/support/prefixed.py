"""Models with an encoder whose decoder begins with keys and values of an adapter's: tiny ones that PEFT takes, and what
transformers computes behind a cache with those in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from adaptc.generation.spec import cache_argument_name
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import Oracle

TASK_OPTIONS = {"task_type": "SEQ_2_SEQ_LM"}


def build(name: str) -> Any:
    """A family's model; of T5 one whose heads together are as wide as its states, which PEFT takes for granted."""
    if name != "t5":
        return FAMILIES[name].build()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"d_model": 24, "num_heads": 4, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 3}
        ids = {"decoder_start_token_id": 1, "pad_token_id": 0}
        return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes, **ids)).eval()


def prefix_oracle(name: str, path: Path, cls: str = "PrefixTuningConfig", seed: int = 0, **config: Any) -> Oracle:
    """PEFT's model with random keys and values that matter, saved to ``path``."""
    found = Oracle.wrap_and_save(
        name, getattr(peft, cls)(**{**TASK_OPTIONS, **config}), path, model=build(name), seed=seed
    )
    with torch.no_grad():
        for parameter in found.model.prompt_encoder.parameters():
            parameter.mul_(3)
    found.model.save_pretrained(str(path))
    return found


def decoder_sizes(model: Any) -> tuple[int, int, int]:
    """Layers, heads and the width of all heads, of a decoder."""
    c = model.config
    if c.model_type == "t5":
        return c.num_decoder_layers, c.num_heads, c.num_heads * c.d_kv
    return c.decoder_layers, c.decoder_attention_heads, c.d_model


def random_prefix(model: Any, count: int, seed: int = 0) -> Tensor:
    """(count, 2 * layers * width)"""
    layers, _, width = decoder_sizes(model)
    return 2 * torch.randn(count, 2 * layers * width, generator=torch.Generator().manual_seed(seed))


def run_with_cache_prefix(model: Any, prefix: Tensor, inputs: dict[str, Tensor], stride: int = 1) -> Any:
    """What transformers computes where the decoder's cache begins with ``prefix``; layer i has pair ``stride`` * i."""
    layers, heads, _ = decoder_sizes(model)
    batch = next(iter(inputs.values())).shape[0]
    pairs = prefix.view(len(prefix), layers, 2, heads, -1).permute(1, 2, 3, 0, 4).unsqueeze(2)
    pairs = pairs.expand(-1, -1, batch, -1, -1, -1)
    prefix_cache = DynamicCache([tuple(pairs[stride * i % layers].contiguous()) for i in range(layers)])
    with torch.no_grad():
        return model(**inputs, **{cache_argument_name(): EncoderDecoderCache(prefix_cache, DynamicCache())})
