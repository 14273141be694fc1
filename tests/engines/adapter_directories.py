"""Directories of adapters for the tests of engines: written by PEFT for a small model, or made of a config alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.support.oracle import quiet

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(14).reshape(2, 7)
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
CONFIGS: dict[str, Any] = {
    # Everything that PEFT's scale depends on.
    "patterns": peft.LoraConfig(
        r=3,
        lora_alpha=7,
        use_rslora=True,
        target_modules=ALL,
        rank_pattern={"q_proj": 5, "layers.1.mlp.up_proj": 2},
        alpha_pattern={"v_proj": 11},
    ),
    "expression": peft.LoraConfig(r=3, lora_alpha=6, target_modules=r".*\.layers\.1\.self_attn\.(q|k|v)_proj"),
    "embedding": peft.LoraConfig(r=3, lora_alpha=2, target_modules=["embed_tokens", "o_proj"]),
    "bias": peft.LoraConfig(r=3, target_modules=ALL, lora_bias=True),
    "dora": peft.LoraConfig(r=3, target_modules=ALL, use_dora=True),
    "pissa": peft.LoraConfig(r=3, target_modules=ALL, init_lora_weights="pissa"),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=ALL),
    "saved": peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
    "alora": peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"
    ),
}


@cache
def model_directory() -> Path:
    """A Llama in float64, with q, k and v of different sizes."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).double()
    model.save_pretrained(path := Path(mkdtemp()) / "model")
    return path


def load_model(dtype: torch.dtype = torch.float64) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(model_directory(), dtype=dtype).eval()


@cache
def adapter_directory(name: str) -> Path:
    """The adapter of one of CONFIGS as PEFT writes it, with no zeros in it: in float64, which PEFT's PiSSA has not."""
    path = Path(mkdtemp()) / name
    with quiet(
        "Setting `save_embedding_layers`.*", "`lora_bias=True` was passed.*", ".*tensor.s. have invalid shape.*"
    ):
        base = load_model(torch.float32 if name == "pissa" else torch.float64)
        adapted = peft.get_peft_model(base, CONFIGS[name], autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(1)
        for key, p in adapted.named_parameters():
            if "lora_" in key or "hada_" in key:
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.data = p.data * (1 + 0.2 * noise) if "magnitude" in key or name == "pissa" else 0.3 * noise
        adapted.save_pretrained(path)
    return path


def peft_logits(adapter: Path, dtype: torch.dtype = torch.float64) -> Tensor:
    """The logits of the model with an adapter, by PEFT."""
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(load_model(dtype), adapter, autocast_adapter_dtype=False)
        return model.eval()(IDS).logits


def write_directory(
    path: Path, options: dict[str, Any] | None = None, ranks: dict[str, int] | None = None, **more: Any
) -> Path:
    """Write LoRA of 7 x 5 weights, with ``options`` in its config; ``ranks`` by module, ``more`` tensors by key."""
    ranks = ranks or {"model.layers.0.self_attn.q_proj": 3, "model.layers.0.self_attn.v_proj": 3}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": sorted(ranks)} | (options or {})
    tensors = dict(more)
    for module, rank in ranks.items():
        tensors |= {f"{module}.lora_A.weight": torch.ones(rank, 5), f"{module}.lora_B.weight": torch.ones(7, rank)}
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{k}": t for k, t in tensors.items()}, path / "adapter_model.safetensors")
    return path
