"""Models that branch on a size, told by their modules: what torch would find out by a first export that fails.

Before: any module. After: for sizes by name, the range in which it does one and the same thing. What is not known here
is still found, from torch's message, at the price of another export.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: class of a module -> (name of a size, the largest it may have). diffusers' upsampling copies batches of 64 and more
#: to work around a fault of torch, which is another branch.
_LARGEST = {"diffusers.models.upsampling.Upsample2D": ("batch", 63)}


def known_limits(model: nn.Module) -> dict[str, int]:
    """Name of a size -> the largest that ``model`` is captured for."""
    found: dict[str, int] = {}
    for kind in {type(m) for m in model.modules()}:
        if (limit := _LARGEST.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            name, largest = limit
            found[name] = min(largest, found.get(name, largest))
    positions = _positions(model)
    return found if positions is None else {**found, "sequence": positions}


def _positions(model: nn.Module) -> int | None:
    """How many tokens a model of transformers has positions for, where it cuts them from a table (BERT, CLIP)."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    for module in model.modules():
        table = dict(module.named_buffers(recurse=False)).get("position_ids")
        tokens = (m for m in module.children() if isinstance(m, nn.Embedding))
        if table is not None and table.ndim == 2 and any(m.num_embeddings == vocabulary for m in tokens):
            return table.shape[1]
    return None
