"""Compose several cartridges into one, one after the other (``compose_cartridge_adapters``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptc.adapters.adapter import Adapter
from adaptc.adapters.combining.combine_tensors import warn_of_models
from adaptc.adapters.from_program import as_adapter_object
from adaptc.errors import CheckpointError, ConfigError, listing
from adaptc.methods import PROMPT_EMBEDDINGS
from adaptc.methods.prompt.cartridge import CartridgeConfig
from adaptc.value_types import validates_options

#: options in which cartridges of one model agree, in PEFT's order
_SHARED_FIELDS = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


@validates_options("safe_serialization")
def compose_cartridge_adapters(
    adapter_paths: Sequence[Any],
    *,
    output_path: str | os.PathLike[str] | None = None,
    safe_serialization: bool = True,
) -> Adapter:
    """Return one cartridge with the KV prefix of the first, then that of the second, and so on (arXiv 2506.06266).

    No model is needed and nothing is computed. ``num_virtual_tokens`` of the result is the sum. ``num_frozen_tokens``
    is that of the first cartridge, whose first token is the attention sink. A warning tells where the adapters name
    different models.

    Args:
        adapter_paths: at least two PEFT directories of cartridges, :class:`adaptc.Adapter` objects, programs, or
            results of ``bind``.
        output_path: the directory to write the result to as well, as PEFT's function of this name does; None for none.
        safe_serialization: whether to write ``.safetensors``; False writes a ``.bin``.

    Returns:
        an adapter, which ``swap``, ``bind``, ``compile`` and ``save_adapter`` take.

    Raises:
        ConfigError: there are fewer than two cartridges, or an adapter is of another method or also trains modules.
            The same where their models differ (layers, heads, widths, task).
        CheckpointError: the tensors of a cartridge do not fit its config, or have no token.

    Example:
        >>> one = adaptc.compile(lm, adaptc.CartridgeConfig(num_virtual_tokens=3))
        >>> other = adaptc.compile(lm, adaptc.CartridgeConfig(num_virtual_tokens=2))
        >>> adaptc.prefixes.compose_cartridge_adapters([one, other]).config.num_virtual_tokens
        5
    """
    if isinstance(adapter_paths, (str, bytes, os.PathLike)) or not isinstance(adapter_paths, Sequence):
        raise ConfigError(f"adapter_paths must be a list of cartridges, got {type(adapter_paths).__name__}")
    if len(adapter_paths) < 2:
        raise ConfigError(f"there are {len(adapter_paths)} cartridges, and at least 2 are needed to compose one")
    adapters = [as_adapter_object(a) for a in adapter_paths]
    rows = [_kv_prefix_rows(a) for a in adapters]
    first = adapters[0]
    for a, r in zip(adapters, rows, strict=True):
        for name in _SHARED_FIELDS:
            _check_same_value(a, first, name, getattr(a.config, name), getattr(first.config, name))
        _check_same_value(a, first, "width of prompt_embeddings", r.shape[1], rows[0].shape[1])
    warn_of_models(adapters)
    made = torch.cat([r.to(rows[0].device) for r in rows])
    source = f"the cartridges {listing((a.source for a in adapters), 3)}"
    new = Adapter(first.config.replace(num_virtual_tokens=made.shape[0]), {PROMPT_EMBEDDINGS: made}, source)
    if output_path is not None:
        new.write(output_path, safe_serialization=safe_serialization)
    elif not safe_serialization:
        raise ConfigError("safe_serialization=False is how to write to output_path, and there is none: leave it out")
    return new


def _check_same_value(a: Adapter, first: Adapter, name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ConfigError(
            f"{a.source} has {name} {found!r}, and {first.source} {expected!r}: cartridges of one model and task go "
            "behind each other"
        )


def _kv_prefix_rows(a: Adapter) -> Tensor:
    config = a.config
    if not isinstance(config, CartridgeConfig):
        raise ConfigError(f"{a.source} is a {config.peft_type} adapter, and cartridges are composed alone")
    if more := sorted(a.tensors.keys() - {PROMPT_EMBEDDINGS}):
        raise ConfigError(f"{a.source} trains modules beside its cartridge ({more[0]}), of which there can be one")
    rows = a.tensors[PROMPT_EMBEDDINGS]
    if rows.ndim != 2 or not rows.shape[0] or rows.shape[0] != config.num_virtual_tokens:
        raise CheckpointError(
            f"{a.source}: {PROMPT_EMBEDDINGS!r} has shape {tuple(rows.shape)}, and its config says num_virtual_tokens="
            f"{config.num_virtual_tokens}: expected ({config.num_virtual_tokens}, 2 * layers * token_dim)"
        )
    return rows
