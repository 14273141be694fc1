"""Say the ranks and scales of a file's layers in the fields of a config.

Some layers have a rank of their own, whatever a config says: whole changes, and layers of loralib that are stored by a
smaller rank. They keep their scale: ``rank_pattern`` and ``alpha_pattern`` get an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

from adaptc.adapter_files.formats.file_layer import FileLayer
from adaptc.errors import CheckpointError, ConfigError
from adaptc.methods import AdapterConfig, config_class, default_and_pattern
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.patterns import pattern_value


def rank_alpha_fields(peft_type: str, layers: Mapping[str, FileLayer]) -> dict[str, Any]:
    """Return the config fields for the ranks and alphas of all modules; {} for a method without them."""
    alpha_field = config_class(peft_type).alpha_field
    if not alpha_field:
        return {}
    ranks = {m: made.rank for m, made in layers.items()}
    return _fields(
        ranks, {m: made.rank if made.alpha is None else made.alpha for m, made in layers.items()}, alpha_field
    )


def with_ranks_of_layers(config: AdapterConfig, layers: Mapping[str, FileLayer], source: str) -> AdapterConfig:
    """Return ``config`` with the ranks of those ``layers`` that have one of their own; it counts for all others.

    Raises CheckpointError where the config's rank is not that of a layer of loralib, and ConfigError for a config that
    cannot say such ranks.
    """
    if not any(made.has_own_scale or made.file_rank is not None for made in layers.values()):
        return config
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"{source} has LoRA, and config= is a {type(config).__name__}: give a LoraConfig, or leave it out"
        )
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, made in layers.items():
        ranks[module] = pattern_value(config.rank_pattern, module, config.r)
        alphas[module] = pattern_value(config.alpha_pattern, module, config.lora_alpha)
        if made.has_own_scale:
            ranks[module], alphas[module] = made.rank, sqrt(made.rank) if config.use_rslora else made.rank
        elif made.file_rank is not None:
            if ranks[module] != made.file_rank:
                raise CheckpointError(
                    f"{source}: module {module!r} has the rank {made.file_rank}, and the config says "
                    f"{ranks[module]}. Give the r that the adapter was trained with, r={made.file_rank}."
                )
            growth = made.rank / made.file_rank
            ranks[module], alphas[module] = made.rank, alphas[module] * (sqrt(growth) if config.use_rslora else growth)
    return config.replace(**_fields(ranks, {m: _whole_if_equal(a) for m, a in alphas.items()}, "lora_alpha"))


def _fields(ranks: Mapping[str, int], alphas: Mapping[str, float], alpha_field: str) -> dict[str, Any]:
    r, other_ranks = default_and_pattern(ranks)
    alpha, other_alphas = default_and_pattern(alphas)
    return {"r": r, "rank_pattern": other_ranks, alpha_field: alpha, "alpha_pattern": other_alphas}


def _whole_if_equal(value: float) -> float:
    return int(value) if float(value).is_integer() else value
