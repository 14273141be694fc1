"""A language model of few layers, whose sizes are none alike, for tests and for the benchmarks' dry run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY = 97
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=112, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def llama_3_8b() -> nn.Module:
    """A model of the sizes of Llama-3-8B, with random weights, made on the GPU in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0, use_cache=False, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def tokens(rows: int, length: int, device: torch.device, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(length)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def peft_model(base: nn.Module, rank: int, folder: Path | str, seed: int | None = None, **options: Any) -> Any:
    """PEFT around a copy of ``base``, with an adapter that is no zero anywhere, which ``folder`` then holds too.

    Its values follow ``seed``, or the rank."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config, **options).eval()
    generator = torch.Generator().manual_seed(rank if seed is None else seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                # Updates of about a tenth of the weights.
                p.copy_(torch.randn(p.shape, generator=generator) * (0.002 / rank) ** 0.5)
    model.save_pretrained(str(folder))
    return model
