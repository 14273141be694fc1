"""Tell the sizes at which known models branch, from their modules, which saves a first export that fails.

For each named size this gives the largest for which the model's code takes one branch. Limits that are not known here
are still read from torch's message, which costs another export.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: class of a module -> (name of a size, the largest it may have). diffusers' upsampling copies batches of 64 and more
#: to work around a fault of torch, and so takes another branch.
_LARGEST = {"diffusers.models.upsampling.Upsample2D": ("batch", 63)}


def known_limits(model: nn.Module) -> dict[str, int]:
    """Return for each limited size, by name, the largest that ``model`` is captured for."""
    found: dict[str, int] = {}
    for kind in {type(m) for m in model.modules()}:
        if (limit := _LARGEST.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            name, largest = limit
            found[name] = min(largest, found.get(name, largest))
    positions = _positions(model)
    return found if positions is None else {**found, "sequence": positions}


def _positions(model: nn.Module) -> int | None:
    """Return how many position_ids a transformers model has in a buffer that it slices (BERT, CLIP); None for other
    models."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    for module in model.modules():
        table = dict(module.named_buffers(recurse=False)).get("position_ids")
        tokens = (m for m in module.children() if isinstance(m, nn.Embedding))
        if table is not None and table.ndim == 2 and any(m.num_embeddings == vocabulary for m in tokens):
            return table.shape[1]
    return None
