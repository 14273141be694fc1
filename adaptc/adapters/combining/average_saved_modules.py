"""Average tensors that adapters train whole: those of ``modules_to_save``, biases, and rows of tokens.

They are values W_i, not changes, so a weighted sum of changes is sum(w_i W_i) + (1 - sum(w_i)) W. Without a model, W is
not known. Then the weights of the adapters that have a tensor must sum to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptc.adapters.combining.adapter_sites import AdapterLike
from adaptc.binding.builder import EMBEDDING_NAMES
from adaptc.errors import CheckpointError, ConfigError

#: how far from one a sum of rounded weights may be
_ROUNDING = 1e-6


def average_saved(
    adapters: Sequence[AdapterLike],
    weights: Sequence[float],
    saved_tensors: Sequence[Mapping[str, Tensor]],
    base_values: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the weighted average of each tensor that adapters train whole, by key.

    ``saved_tensors`` has, for each adapter, the tensors that are not of its method. ``base_values`` has the base values
    by the same keys, where they are known. Raises ConfigError where only a model could tell the base value, and
    CheckpointError for shapes that differ.
    """
    out: dict[str, Tensor] = {}
    for key in dict.fromkeys(k for one in saved_tensors for k in one):
        holders = [i for i, one in enumerate(saved_tensors) if key in one]
        first = saved_tensors[holders[0]][key]
        for i in holders[1:]:
            if saved_tensors[i][key].shape != first.shape:
                raise CheckpointError(
                    f"{key!r} has shape {tuple(first.shape)} in {adapters[holders[0]].source} and "
                    f"{tuple(saved_tensors[i][key].shape)} in {adapters[i].source}: they are of different models"
                )
        _check_same_tokens(key, [adapters[i] for i in holders])
        same = all(torch.equal(saved_tensors[i][key], first) for i in holders)
        if same and (_is_base_embedding(key) or not first.is_floating_point()):
            out[key] = first
            continue
        total = sum(weights[i] for i in holders)
        base_value = None if base_values is None else base_values.get(key)
        if not first.is_floating_point() or (abs(total - 1) > _ROUNDING and base_value is None):
            raise ConfigError(
                f"{key!r} is trained whole, and without the model only weights that sum to one say what is between its "
                f"values; those of {', '.join(adapters[i].source for i in holders)} sum to {total:g}. Give such "
                "weights, or adapters without it (modules_to_save, bias or trainable tokens)"
            )
        value = torch.stack([saved_tensors[i][key] * weights[i] for i in holders]).sum(0)
        out[key] = value if base_value is None else value + (1 - total) * base_value.to(value)
    return out


def _is_base_embedding(key: str) -> bool:
    """Return whether a key is that of a base embedding or head, which PEFT may write beside an adapter."""
    module, _, param = key.removesuffix(".base_layer.weight").rpartition(".")
    return key.endswith(".base_layer.weight") or (param == "weight" and module.rpartition(".")[2] in EMBEDDING_NAMES)


def _check_same_tokens(key: str, adapters: Sequence[AdapterLike]) -> None:
    """Raise ConfigError where adapters train rows of different tokens. The tensor does not tell its tokens, the config
    does."""
    rows = [getattr(a.config, "trainable_token_indices", None) for a in adapters]
    other = next((i for i, r in enumerate(rows) if r != rows[0]), None)
    if "trainable_tokens" in key and other is not None:
        raise ConfigError(
            f"{key!r}: {adapters[0].source} trains the rows {rows[0]}, and {adapters[other].source} {rows[other]}; "
            "only adapters with the same trainable_token_indices can be combined"
        )
