"""X-LoRA on the tiny families: LoRA experts in directories, and PEFT's model of them with a classifier that matters.

PEFT 0.21 knows the keys of experts only for models whose modules lie in ``model.model`` (llama), and writes neither the
classifier nor the experts whole: here its reader is told of gpt2's, and files are compared with adaptc's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import peft.tuners.xlora.model as theirs
import torch
from safetensors.torch import save_file
from torch import Tensor

import adaptc
from adaptc.methods.routed.xlora import CLASSIFIER
from tests.support.families import FAMILIES
from tests.support.oracle import EXPECTED_WARNINGS, quiet, randomize

#: experts of each family: rank and targets, of which no two are alike
EXPERTS: Mapping[str, Sequence[tuple[int, list[str]]]] = {
    "llama": ((3, ["q_proj", "v_proj"]), (5, ["q_proj", "down_proj"]), (2, ["o_proj", "embed_tokens"])),
    "gpt2": ((3, ["c_attn"]), (4, ["c_attn", "c_proj"]), (1, ["c_fc"])),
    "mamba": ((3, ["in_proj"]), (2, ["in_proj", "x_proj"])),
    "mistral": ((2, ["q_proj", "down_proj"]), (3, ["v_proj", "o_proj"])),
    "gemma3_text": ((3, ["k_proj", "v_proj"]), (1, ["up_proj", "q_proj"]), (2, ["o_proj"])),
    "opt": ((3, ["q_proj", "k_proj"]), (2, ["v_proj", "out_proj"])),
}
OTHERS: Mapping[str, Sequence[tuple[int, list[str]]]] = {
    "llama": ((1, ["q_proj", "v_proj"]), (4, ["down_proj"]), (6, ["o_proj"]), (2, ["embed_tokens", "q_proj"])),
    "gpt2": ((2, ["c_attn", "c_fc", "c_proj"]), (7, ["c_attn"])),
    "mamba": ((1, ["x_proj"]), (4, ["in_proj"]), (2, ["in_proj"])),
    "mistral": ((1, ["q_proj"]), (4, ["v_proj", "down_proj"]), (2, ["o_proj"])),
    "gemma3_text": ((4, ["v_proj", "q_proj"]), (1, ["k_proj", "up_proj", "o_proj"])),
}
_original_set_state_dict = theirs.set_peft_model_state_dict


def build(name: str) -> Any:
    model = FAMILIES[name].build()
    model.config.use_cache = False
    return model


def classifier_width(name: str) -> int:
    """Of what the head reads, which some models project the last hidden state to."""
    config = build(name).config
    return getattr(config, "word_embed_proj_dim", config.hidden_size)


def experts(name: str, path: Path, specs: Sequence[tuple[int, list[str]]] = (), **options: Any) -> dict[str, str]:
    """Directories of random LoRA adapters, every other one with rsLoRA's scale."""
    out: dict[str, str] = {}
    for i, (r, targets) in enumerate(specs or EXPERTS[name]):
        config = peft.LoraConfig(r=r, target_modules=targets, lora_alpha=5, use_rslora=bool(i % 2), **options)
        with quiet(*EXPECTED_WARNINGS):
            wrapped = peft.get_peft_model(build(name), config)
            randomize(wrapped, seed=i + 7 * r)
            wrapped.save_pretrained(str(path / str(i)))
        out[str(i)] = str(path / str(i))
    return out


def _set_state_dict(model: Any, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    parts = ("transformer", "backbone")
    found = {re.sub(f"^model.model.({'|'.join(parts)})", r"model.\1", k): t for k, t in tensors.items()}
    return _original_set_state_dict(model, found, *args, **kwargs)


def peft_model(name: str, adapters: Mapping[str, str], seed: int = 0, model: Any = None, **options: Any) -> Any:
    """PEFT's, in evaluation, with a random classifier that prefers some experts clearly."""
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=classifier_width(name), adapters=dict(adapters), **options
    )
    with (
        quiet(*EXPECTED_WARNINGS, ".*enable_softmax.*"),
        mock.patch.object(theirs, "set_peft_model_state_dict", _set_state_dict),
    ):
        wrapped = peft.get_peft_model(build(name) if model is None else model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if CLASSIFIER in n:
                p.copy_(torch.randn(p.shape, generator=generator).to(p.dtype))
    return wrapped


def classifier_of(wrapped: Any) -> dict[str, Tensor]:
    """Bare key -> tensor of PEFT's classifier."""
    found = ((n.removeprefix("base_model."), p) for n, p in wrapped.named_parameters())
    return {n: p.detach().clone() for n, p in found if n.startswith(CLASSIFIER)}


def config_of(name: str, adapters: Mapping[str, str], **options: Any) -> adaptc.XLoraConfig:
    return adaptc.XLoraConfig(hidden_size=classifier_width(name), adapters=dict(adapters), **options)


def save_xlora_adapter(wrapped: Any, path: Path) -> Path:
    """PEFT's adapter as PEFT writes it, but with all of its classifier."""
    with quiet(*EXPECTED_WARNINGS):
        wrapped.save_pretrained(str(path))
    tensors = {f"base_model.{k}": t.contiguous() for k, t in classifier_of(wrapped).items()}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def scalings_of(wrapped: Any) -> Tensor:
    return wrapped.base_model.get_latest_scalings()
