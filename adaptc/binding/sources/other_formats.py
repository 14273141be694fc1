"""Translate adapters of other formats to PEFT's, for a given model: component, modules, and the config that PEFT would
have.

The tensors come with the keys of their file and its header. The result is an :class:`AdapterData` with bare keys, whose
config targets exactly the modules that the keys name. Facts that a file does not state are never made up: the caller
must give them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from adaptc.adapter_files.adapter_data import PEFT_KEYS, AdapterData, FileOrigin, LoadedAdapter
from adaptc.adapter_files.foreign_file import has_peft_prefix
from adaptc.adapter_files.format import peft_component_error
from adaptc.adapter_files.formats.detect import detect_format, is_foreign_key, starts_with_component
from adaptc.adapter_files.formats.file_layer import FileLayer
from adaptc.adapter_files.formats.full_rank import with_low_rank_change
from adaptc.adapter_files.formats.layers import convert_layer
from adaptc.adapter_files.formats.loralib import has_loralib_factors
from adaptc.adapter_files.formats.original_layers import split_slots
from adaptc.binding.sources.components import ChosenComponent, choose_component
from adaptc.binding.sources.file_config import config_of_file, target_fields
from adaptc.binding.sources.file_ranks import with_ranks_of_layers
from adaptc.binding.sources.module_names import FindOps, ModuleNames, no_ops
from adaptc.binding.sources.trained_parameters import TrainedParameters, trained_parameters, whole_module_tensors
from adaptc.errors import CheckpointError, ConfigError, short_repr
from adaptc.methods import AdapterConfig, TargetedConfig
from adaptc.value_types import checked_options


def translate_to_peft(
    raw: LoadedAdapter, weights: Mapping[str, Tensor], config: AdapterConfig | None, find_ops: FindOps = no_ops
) -> AdapterData[Any]:
    """Return ``raw`` with PEFT's keys and config, for a model with these weights.

    ``config`` is the caller's, and counts instead of the file's. Targets that it leaves open are those of the keys.
    ``find_ops`` finds the ops of the model's layers, where it takes them to tell what a tensor means. Raises
    CheckpointError, and ConfigError where no config says what the tensors are.
    """
    source = raw.source
    file_format, parsed_keys = detect_format(raw.tensors, source)
    names = ModuleNames(weights, find_ops)
    chosen = choose_component(file_format, parsed_keys, raw.tensors, names, raw.component, source)
    layers = _convert_layers(chosen, raw.tensors, names, source)
    origin = FileOrigin(file_format.name, chosen.component, MappingProxyType(dict(chosen.other_components)))
    if not any(layer.peft_type for layer in layers.values()):
        tensors = whole_module_tensors(layers, weights, source)
        if config is not None and config.peft_type != "LN_TUNING":
            raise ConfigError(
                f"{source} trains modules as a whole and has no {config.peft_type}, and config= is a "
                f"{type(config).__name__}: leave it out"
            )
        fields = {"peft_type": "LN_TUNING"} | target_fields(list(layers), names)
        return raw.with_config(config or fields, tensors=tensors, format=PEFT_KEYS, origin=origin)
    adapted = {m: layer for m, layer in layers.items() if layer.peft_type}
    peft_type = _only_method(adapted, source)
    parameters = trained_parameters(layers, weights, peft_type, source)
    targets = target_fields(list(adapted), names)
    tensors = {f"{module}.{slot}": t for module, layer in adapted.items() for slot, t in layer.tensors.items()}
    tensors |= parameters.tensors
    if config is not None:
        completed = _complete_from_keys(with_ranks_of_layers(config, adapted, source), targets, parameters)
        return raw.with_config(completed, tensors=tensors, format=PEFT_KEYS, origin=origin)
    made = config_of_file(raw, file_format, parsed_keys, chosen, adapted, names, {**targets, **parameters.fields})
    return raw.with_config(made, tensors=tensors, format=PEFT_KEYS, origin=origin)


def _only_method(adapted: Mapping[str, FileLayer], source: str) -> str:
    kinds = dict.fromkeys(made.peft_type for made in adapted.values())
    if len(kinds) > 1:
        raise CheckpointError(
            f"{source} has modules with {' and '.join(kinds)}: these are several adapters, and a file of PEFT's, or "
            f"a config, is of one method. Split the file by method and compile for a list of them."
        )
    return next(iter(kinds))


def may_be_foreign_key(key: str, weights: Mapping[str, Tensor]) -> bool:
    """Return whether ``key``, the first key of a state dict, may be of another format than PEFT's, for a model of
    ``weights``.

    A key that names a module of the model is PEFT's: GPT-2 has a module ``transformer``, which diffusers has as a
    component.
    """
    if is_foreign_key(key) or not starts_with_component(key):
        return is_foreign_key(key)
    return not any(key.startswith(f"{module}.") for module in ModuleNames(weights).shapes)


def with_targets(
    config: TargetedConfig, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> TargetedConfig:
    """Return ``config`` with the modules that PEFT's keys name as its targets, where it names no targets itself.

    These are the modules with adapter tensors, not modules that the file holds as a whole. Raises CheckpointError where
    no key names a module of the model.
    """
    if config.target_modules is not None:
        return config
    names, modules = ModuleNames(weights), dict[str, None]()
    for key in tensors:
        if key in weights:
            continue
        pieces = key.split(".")
        module = next((m for n in range(len(pieces) - 1, 0, -1) if (m := ".".join(pieces[:n])) in names.shapes), None)
        if module is not None:
            modules[module] = None
    if not modules:
        raise CheckpointError(
            f"no key of the adapter names a module of the model: {short_repr(list(tensors)[:3])}. Is it for another "
            "model? target_modules of the config says which are meant."
        )
    return config.with_missing_filled(target_fields(list(modules), names))


def has_peft_keys(raw: LoadedAdapter, weights: Mapping[str, Tensor], is_config_known: bool) -> bool:
    """Return whether the keys of ``raw`` are PEFT's, for a model of ``weights``.

    Without PEFT's prefix they are taken for PEFT's only where the method ``is_config_known``.
    """
    if any(map(has_peft_prefix, raw.tensors)):
        return True
    first = next(iter(raw.tensors), "")
    return is_config_known and not may_be_foreign_key(first, weights) and not has_loralib_factors(raw.tensors)


def component_names(raw: LoadedAdapter) -> list[str]:
    """Return the components that the keys name; none for PEFT's keys, and for keys of one model alone.

    Raises CheckpointError for keys of no known format.
    """
    first = next(iter(raw.tensors), "")
    if any(map(has_peft_prefix, raw.tensors)) or not (is_foreign_key(first) or starts_with_component(first)):
        return []
    _, parts = detect_format(raw.tensors, raw.source)
    return sorted({p.component for p in parts} - {""})


def for_component(adapters: Sequence[AdapterData[Any]], component: str | None) -> list[AdapterData[Any]]:
    """Return ``adapters`` with ``component`` asked for in those whose keys name components.

    A single one is asked in any case, and raises itself where it has no such component. Raises ConfigError where none
    is of another format than PEFT's.
    """
    (component,) = checked_options(for_component, component=component)
    if component is None:
        return list(adapters)
    if len(adapters) == 1 and adapters[0].format == PEFT_KEYS and not adapters[0].is_new:
        raise peft_component_error(component, adapters[0].source)
    found = [a.format != PEFT_KEYS and (len(adapters) == 1 or bool(component_names(a))) for a in adapters]
    if not any(found):
        raise ConfigError(
            f"component={component!r} chooses from a file of another format than PEFT's whose keys name components, "
            "and there is none; leave it out"
        )
    return [replace(a, component=component) if f else a for a, f in zip(adapters, found, strict=True)]


def _convert_layers(
    chosen: ChosenComponent, tensors: Mapping[str, Tensor], names: ModuleNames, source: str
) -> dict[str, FileLayer]:
    """Return what the file has for each module of the model."""
    by_name: dict[str, dict[str, Tensor]] = {}
    spelled: dict[tuple[str, str], str] = {}
    for part, name in chosen.modules_by_key:
        if (name, part.slot) in spelled:
            raise CheckpointError(
                f"{source}: {spelled[name, part.slot]!r} and {part.key!r} are both {part.slot} of {name!r}; drop one"
            )
        spelled[name, part.slot] = part.key
        by_name.setdefault(name, {})[part.slot] = tensors[part.key]
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, slots in by_name.items():
        original = names.original_layer(name)
        split = {name: slots} if original is None else split_slots(f"{source}: layer {name!r}", slots, original)
        if double := sorted(split.keys() & by_module.keys()):
            raise CheckpointError(
                f"{source}: {double[0]!r} is adapted by its own name, and as a part of a layer of the original code; "
                "drop one"
            )
        by_module |= split
    layers = {m: convert_layer(names.target(m), slots, source) for m, slots in by_module.items()}
    if {layer.peft_type for layer in layers.values()} <= {"", "LORA"}:
        layers = {m: with_low_rank_change(layer, names.target(m), source) for m, layer in layers.items()}
    return layers


def _complete_from_keys(
    config: AdapterConfig, targets: Mapping[str, Any], parameters: TrainedParameters
) -> AdapterConfig:
    """Return the caller's config with what it leaves open and the keys say: targets, saved modules and biases."""
    if not isinstance(config, TargetedConfig):
        return config
    if config.target_modules is None:
        config = config.with_missing_filled(targets)
    open_fields = {k: v for k, v in parameters.fields.items() if getattr(config, k, None) in (None, "none")}
    return config.replace(**open_fields) if open_fields else config
