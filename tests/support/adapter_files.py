"""Small adapters as files, shared by the checkpoint tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

LORA = {"peft_type": "LORA", "r": 3, "target_modules": ["l1"]}
SAFE, BIN, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"l1.lora_A.weight": torch.randn(3, 8), "l1.lora_B.weight": torch.randn(12, 3)}


def tensors_are_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return sorted(a) == sorted(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
