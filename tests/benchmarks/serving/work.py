"""The requests of the serving benchmark: prompts, adapters and options, the same on all sides.

Sixteen requests over five adapters of rank 16 on all linear layers and the base, prompts of 16 to 256 tokens, 32 new
tokens each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adaptc
from tests.benchmarks.model import RANK

REQUESTS, ADAPTERS, NEW, LENGTHS = 16, 5, 32, (16, 256)
SIZES: dict[str, int] = {"max_batch_tokens": 256, "num_blocks": 256, "page_size": 32}
CONFIG = adaptc.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.linspace(*LENGTHS, REQUESTS).int()[torch.randperm(REQUESTS, generator=draw)]
    return [torch.randint(3, 49152, (int(n),), generator=draw).tolist() for n in lengths]


def names() -> list[str | None]:
    return [None if i % (ADAPTERS + 1) == ADAPTERS else f"a{i % (ADAPTERS + 1)}" for i in range(REQUESTS)]


def greedy(model: Any) -> Any:
    made = copy.deepcopy(model.generation_config)
    made.update(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    return made


def write_adapters(model: Any, folder: Path) -> dict[str, Path]:
    """Write the adapters, and return them by name."""
    program, adapters = adaptc.compile(model, CONFIG), {}
    for i in range(ADAPTERS):
        for t in program.binding.values.values():
            if t.ndim > 1:
                torch.nn.init.normal_(t, std=0.02)
        adapters[f"a{i}"] = adaptc.save_adapter(program, folder / f"a{i}")
    return adapters


def left_padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), longest, dtype=torch.int64), torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :], mask[row, longest - len(text) :] = torch.tensor(text), 1
    return ids, mask
