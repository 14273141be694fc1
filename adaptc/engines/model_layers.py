"""Read which layers a model has, and how large they are: the names that engines look adapters up by.

Of a directory the config and the headers of its files are read, and no weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adaptc.adapters.model_tensors import safetensors_files
from adaptc.capture.model_files import QUANTIZATION_CONFIG
from adaptc.engines.check import read_model_config
from adaptc.engines.safetensors_header import read_header


@dataclass(frozen=True)
class ModelLayerSizes:
    """The linear layers of a model: name -> (rows, columns) of the weight, and the model's config.

    The sizes of quantised layers are not known; they are (0, 0).
    """

    config: Mapping[str, Any]
    sizes: Mapping[str, tuple[int, int]]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "model"))

    def part_rows(self, name: str) -> int:
        """Return the rows that the config gives to ``q_proj``, ``k_proj``, ``v_proj``, ``gate_proj`` or ``up_proj``; 0
        where it does not tell."""
        c = self.config
        if name in ("gate_proj", "up_proj"):
            return int(c.get("intermediate_size") or 0)
        heads = int(c.get("num_attention_heads") or 0)
        size = int(c.get("head_dim") or (c.get("hidden_size", 0) // heads if heads else 0))
        return size * (heads if name == "q_proj" else int(c.get("num_key_value_heads") or heads))


def read_layer_sizes(model: Any) -> ModelLayerSizes | None:
    """Return the layers of a model directory or of a module; None for anything else, and for a directory without
    safetensors files.

    Raises CheckpointError for a damaged directory.
    """
    if isinstance(model, (str, os.PathLike)):
        if not any(Path(model).glob("*.safetensors")):
            return None
        config = read_model_config(model)
        shapes = {k: s for f in safetensors_files(Path(model)) for k, (s, _) in read_header(f).items()}
        named = {k.removesuffix(".weight"): s for k, s in shapes.items() if k.endswith(".weight")}
    elif isinstance(model, nn.Module):
        own: Any = getattr(model, "config", None)
        config = own.to_dict() if hasattr(own, "to_dict") else {}
        weights = {n: getattr(m, "weight", None) for n, m in model.named_modules()}
        named = {n: tuple(w.shape) for n, w in weights.items() if isinstance(w, Tensor)}
    else:
        return None
    is_quantized = bool(config.get(QUANTIZATION_CONFIG))
    sizes = {n: (0, 0) if is_quantized else (s[0], s[1]) for n, s in named.items() if len(s) == 2}
    return ModelLayerSizes(config, sizes)
