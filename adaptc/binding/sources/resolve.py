"""Resolve an adapter that was loaded for one model: what its keys mean there, and which config it has.

The steps: the adapters that it routes between, the format and component of its keys, and its targets. Then come copies
that PEFT's wrappers left, layers that the model stacks, and X-LoRA's experts. Adapters with PEFT's keys and a config
pass through without a copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.adapter_data import PEFT_KEYS, STATE_DICT_KEYS, AdapterData, LoadedAdapter
from adaptc.adapter_files.check_state_dict import bare_tensors
from adaptc.adapter_files.format import peft_component_error
from adaptc.binding.binding import ResolvedAdapter
from adaptc.binding.sources.composite_adapters import join_experts, join_routed
from adaptc.binding.sources.configs import loaded_config
from adaptc.binding.sources.module_names import FindOps, no_ops
from adaptc.binding.sources.old_experts import is_expert_key, stack_old_experts
from adaptc.binding.sources.other_formats import has_peft_keys, translate_to_peft, with_targets
from adaptc.errors import CheckpointError
from adaptc.methods import AdapterConfig, TargetedConfig

#: the part of a key that is of PEFT's wrapper of a module that is trained as a whole
_WRAPPER = re.compile(r"\.(original_module|modules_to_save)(?=\.)")


def resolve(
    data: AdapterData[Any],
    weights: Mapping[str, Tensor],
    *,
    config: AdapterConfig | None = None,
    default: AdapterConfig | None = None,
    find_targets: bool = False,
    find_ops: FindOps = no_ops,
) -> ResolvedAdapter:
    """Return ``data`` with a config and PEFT's bare keys, for the model with these ``weights``.

    ``config`` is the caller's, and counts instead of the source's. ``default`` is the config of a state dict without
    one; its ranks are then read off the tensors. With ``find_targets``, the keys give the targets that ``config``
    leaves open. ``find_ops`` finds the ops that read the model's weights, by the paths of their modules.

    Raises CheckpointError and ConfigError where no config says what the tensors are, or keys do not fit the model.
    """
    is_state_dict = data.format == STATE_DICT_KEYS
    joined: AdapterData[Any] = join_routed(data) if data.experts else data
    if joined.format == PEFT_KEYS:
        found = joined if config is None else joined.with_config(config)
    elif has_peft_keys(joined, weights, config is not None or (is_state_dict and default is not None)):
        found = _with_bare_keys(joined, config, default)
        find_targets = find_targets or not is_state_dict
    else:
        found = translate_to_peft(joined, weights, config, find_ops)
    if find_targets and config is not None and isinstance(found.config, TargetedConfig):
        found = found.with_config(with_targets(found.config, found.tensors, weights))
    if not isinstance(found.config, AdapterConfig):
        found = replace(found, config=loaded_config(found.config))
    if found.config.ranks_differ_in_files():
        found = replace(found, infer_ranks=True)
    found = _with_wrapped_biases(found, weights)
    if copies := _wrapper_copies(found.tensors):
        found = replace(found, tensors={k: t for k, t in found.tensors.items() if k not in copies})
    if any(map(is_expert_key, found.tensors)):
        found = stack_old_experts(found, weights)
    return join_experts(found, paths, weights) if (paths := found.config.expert_paths()) else found


def _with_wrapped_biases(found: AdapterData[Any], weights: Mapping[str, Tensor]) -> AdapterData[Any]:
    """Return ``found`` with the keys that trained biases of adapted layers have since PEFT 0.7.

    Before, a layer with an adapter was no wrapper, and its bias was ``fc.bias`` where it is ``fc.base_layer.bias`` now.
    """
    if getattr(found.config, "bias", "none") == "none":
        return found
    new: dict[str, str] = {}
    for key in found.tensors:
        module, _, end = key.rpartition(".")
        wrapped = f"{module}.base_layer.bias"
        if end == "bias" and f"{module}.weight" in weights and wrapped not in found.tensors:
            inside = (k[len(module) + 1 :] for k in found.tensors if k.startswith(f"{module}.") and k != key)
            if any(slot != "weight" and f"{module}.{slot}" not in weights for slot in inside):
                new[key] = wrapped
    return replace(found, tensors={new.get(k, k): t for k, t in found.tensors.items()}) if new else found


def _wrapper_copies(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the keys inside of PEFT's wrappers whose tensors say nothing more.

    Where a model has resized embeddings that are trained, PEFT writes the wrapper's modules beside the trained tensor:
    the original one, and the trained one again.
    """
    copies: set[str] = set()
    for key in tensors:
        wrapper = _WRAPPER.search(key)
        trained = None if wrapper is None else tensors.get(_WRAPPER.sub("", key, count=1))
        if wrapper is not None and trained is not None:
            is_original = wrapper.group(1) == "original_module"
            if is_original or torch.equal(tensors[key], trained):
                copies.add(key)
    return copies


def _with_bare_keys(
    data: LoadedAdapter, config: AdapterConfig | None, default: AdapterConfig | None
) -> AdapterData[Any]:
    """Return ``data``, which has PEFT's keys and was given without its directory, with bare keys and its config."""
    if data.component is not None:
        raise peft_component_error(data.component, data.source)
    is_default = config is None and data.format == STATE_DICT_KEYS
    found: Any = config or (default if is_default else data.config)
    if found is None:
        raise CheckpointError(
            f"{data.source} has PEFT's keys, and there is no adapter_config.json beside it: give the directory that "
            "has both, or say the config with config=."
        )
    kind = found.peft_type if isinstance(found, AdapterConfig) else str(found.get("peft_type"))
    tensors = bare_tensors(data.tensors, data.source, kind)
    return data.with_config(found, tensors=tensors, format=PEFT_KEYS, infer_ranks=is_default)
