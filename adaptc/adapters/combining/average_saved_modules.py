"""Average tensors that adapters train whole: those of ``modules_to_save``, biases, and rows of tokens.

They are values W_i, not changes, so a weighted sum of changes is sum(w_i W_i) + (1 - sum(w_i)) W. Without a model, W is
not known. Then the weights of the adapters that have a tensor must sum to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptc.adapters.combining.adapter_sites import AdapterLike
from adaptc.binding.builder import EMBEDDINGS
from adaptc.errors import CheckpointError, ConfigError

#: how far from one a sum of rounded weights may be
_ROUNDING = 1e-6


def averaged(
    adapters: Sequence[AdapterLike],
    weights: Sequence[float],
    others: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the weighted average of each tensor that adapters train whole, by key.

    ``others`` has, for each adapter, the tensors that are not of its method. ``base`` has the base values by the same
    keys, where they are known. Raises ConfigError where only a model could tell the base value, and CheckpointError for
    shapes that differ.
    """
    out: dict[str, Tensor] = {}
    for key in dict.fromkeys(k for one in others for k in one):
        has = [i for i, one in enumerate(others) if key in one]
        first = others[has[0]][key]
        for i in has[1:]:
            if others[i][key].shape != first.shape:
                raise CheckpointError(
                    f"{key!r} has shape {tuple(first.shape)} in {adapters[has[0]].source} and "
                    f"{tuple(others[i][key].shape)} in {adapters[i].source}: they are of different models"
                )
        _check_tokens(key, [adapters[i] for i in has])
        same = all(torch.equal(others[i][key], first) for i in has)
        if same and (_of_base(key) or not first.is_floating_point()):
            out[key] = first
            continue
        total = sum(weights[i] for i in has)
        before = None if base is None else base.get(key)
        if not first.is_floating_point() or (abs(total - 1) > _ROUNDING and before is None):
            raise ConfigError(
                f"{key!r} is trained whole, and without the model only weights that sum to one say what is between its "
                f"values; those of {', '.join(adapters[i].source for i in has)} sum to {total:g}. Give such weights, "
                "or adapters without it (modules_to_save, bias or trainable tokens)"
            )
        value = torch.stack([others[i][key] * weights[i] for i in has]).sum(0)
        out[key] = value if before is None else value + (1 - total) * before.to(value)
    return out


def _of_base(key: str) -> bool:
    """Return whether a key is that of a base embedding or head, which PEFT may write beside an adapter."""
    module, _, param = key.removesuffix(".base_layer.weight").rpartition(".")
    return key.endswith(".base_layer.weight") or (param == "weight" and module.rpartition(".")[2] in EMBEDDINGS)


def _check_tokens(key: str, adapters: Sequence[AdapterLike]) -> None:
    """Raise ConfigError where adapters train rows of different tokens. The tensor does not tell its tokens, the config
    does."""
    rows = [getattr(a.config, "trainable_token_indices", None) for a in adapters]
    other = next((i for i, r in enumerate(rows) if r != rows[0]), None)
    if "trainable_tokens" in key and other is not None:
        raise ConfigError(
            f"{key!r}: {adapters[0].source} trains the rows {rows[0]}, and {adapters[other].source} {rows[other]}; "
            "only adapters with the same trainable_token_indices can be combined"
        )
