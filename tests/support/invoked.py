"""Activated LoRA on the tiny families: adapters of PEFT's, and texts in which the tokens that invoke them come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from tests.support.families import VOCAB
from tests.support.oracle import Oracle

TARGETS = {"gpt2": ["c_attn", "c_fc", "c_proj"], "falcon": ["query_key_value", "dense_4h_to_h"]}
#: what PEFT says of a task for which its aLoRA does nothing
TASK = "aLoRA is currently only supported for CAUSAL_LM task."


def targets(name: str) -> list[str]:
    return TARGETS.get(name, ["q_proj", "v_proj", "down_proj"])


def config_of(name: str, tokens: Sequence[int], **options: Any) -> dict[str, Any]:
    """The fields of a config, for adaptc and PEFT alike."""
    fields = {"r": 3, "lora_alpha": 5, "target_modules": targets(name), "task_type": "CAUSAL_LM"}
    return {**fields, "alora_invocation_tokens": list(tokens), **options}


def alora_oracle(name: str, path: Path, tokens: Sequence[int], seed: int = 0, **options: Any) -> Oracle:
    """A family with an aLoRA of PEFT's, of random values, saved to ``path``."""
    return Oracle.wrap_and_save(name, peft.LoraConfig(**config_of(name, tokens, **options)), path, seed=seed)


def inputs_with_invocations(
    tokens: Sequence[int], batch: int, length: int, padding: str | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs whose rows have the tokens twice, at the end, only in part, or not at all, as they have room; padded as
    ``padding`` says, each row by another number, with a mask."""
    generator = torch.Generator().manual_seed(seed * 1000 + 10 * batch + length)
    ids, n = torch.randint(20, VOCAB, (batch, length), generator=generator), len(tokens)
    mask = torch.ones_like(ids)
    for row in range(batch):
        starts = [[0, length // 2], [length - n], [length - n + 1], []][row % 4]
        for start in starts:
            for i, token in enumerate(tokens):
                if 0 <= start + i < length:
                    ids[row, start + i] = token
        if padding == "left":
            mask[row, : row % 3] = 0
        elif padding == "right":
            mask[row, length - row % 3 :] = 0
    return {"input_ids": ids} if padding is None else {"input_ids": ids, "attention_mask": mask}
