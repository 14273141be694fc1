"""SmolLM2-135M for benchmarks: the real architecture; random weights do, since no time depends on their values."""

from __future__ import annotations

import torch
from torch import nn

RANK = 16


def smollm2() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 49152, (rows, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
