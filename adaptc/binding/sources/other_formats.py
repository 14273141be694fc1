"""Translate adapters of other formats to PEFT's, for a given model: component, modules, and the config that PEFT would
have.

The tensors come with the keys of their file and its header. The result is an :class:`AdapterData` with bare keys, whose
config targets exactly the modules that the keys name. Facts that a file does not state are never made up: the caller
must give them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from adaptc.adapter_files.adapter_data import PEFT_KEYS, AdapterData, FileOrigin, LoadedAdapter
from adaptc.adapter_files.foreign_file import has_peft_prefix
from adaptc.adapter_files.format import peft_component_error
from adaptc.adapter_files.formats.detect import detect_format, is_foreign_key, starts_with_component
from adaptc.adapter_files.formats.diffusers import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from adaptc.adapter_files.formats.file_layer import FileLayer
from adaptc.adapter_files.formats.full_rank import with_low_rank_change
from adaptc.adapter_files.formats.layers import convert_layer
from adaptc.adapter_files.formats.loralib import has_loralib_factors
from adaptc.adapter_files.formats.mmdit import ORIGINAL_BLOCKS
from adaptc.adapter_files.formats.original_layers import split_slots
from adaptc.adapter_files.formats.parts import ALPHA, ParsedKey, split_component
from adaptc.binding.sources.components import ChosenComponent, choose_component
from adaptc.binding.sources.configs import loaded_config
from adaptc.binding.sources.file_ranks import rank_alpha_fields, with_ranks_of_layers
from adaptc.binding.sources.module_names import FindOps, ModuleNames, no_ops
from adaptc.binding.sources.trained_parameters import TrainedParameters, trained_parameters, whole_module_tensors
from adaptc.errors import CheckpointError, ConfigError, short_repr
from adaptc.methods import AdapterConfig, TargetedConfig, config_class, exact_names_regex, proper_suffixes
from adaptc.value_types import checked_options

#: fields of a config that choose modules; here the keys of the file choose them
_TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")


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
        fields = {"peft_type": "LN_TUNING"} | _target_fields(list(layers), names)
        return raw.with_config(config or fields, tensors=tensors, format=PEFT_KEYS, origin=origin)
    adapted = {m: layer for m, layer in layers.items() if layer.peft_type}
    peft_type = _only_method(adapted, source)
    parameters = trained_parameters(layers, weights, peft_type, source)
    targets = _target_fields(list(adapted), names)
    tensors = {f"{module}.{slot}": t for module, layer in adapted.items() for slot, t in layer.tensors.items()}
    tensors |= parameters.tensors
    if config is not None:
        completed = _complete_from_keys(with_ranks_of_layers(config, adapted, source), targets, parameters)
        return raw.with_config(completed, tensors=tensors, format=PEFT_KEYS, origin=origin)
    has_default = file_format.has_default_scale and (
        chosen.component or _states_scale(raw, parsed_keys) or all(m.has_own_scale for m in adapted.values())
    )
    options = _options_of_layers(peft_type, adapted, names)
    fields = _config_in_file(raw, chosen, peft_type)
    if fields is None:
        _check_scale_known(peft_type, adapted, bool(has_default), f"{source} ({file_format.name})")
        fields = {"peft_type": peft_type} | targets | options | rank_alpha_fields(peft_type, adapted)
        return raw.with_config(fields | parameters.fields, tensors=tensors, format=PEFT_KEYS, origin=origin)
    fields = {k: v for k, v in fields.items() if k not in _TARGET_FIELDS} | targets | parameters.fields
    fields = fields if raw.component_configs is not None else options | fields
    if any(p.slot == ALPHA for p, _ in chosen.modules_by_key):
        fields |= rank_alpha_fields(peft_type, adapted)
        return raw.with_config(fields, tensors=tensors, format=PEFT_KEYS, origin=origin)
    stated = with_ranks_of_layers(loaded_config(fields), adapted, source)
    return raw.with_config(stated, tensors=tensors, format=PEFT_KEYS, origin=origin)


def _options_of_layers(peft_type: str, adapted: Mapping[str, FileLayer], names: ModuleNames) -> dict[str, Any]:
    """Return the config fields, other than targets and ranks, that follow from the tensors."""
    if peft_type == "IA3":
        return {"feedforward_modules": exact_names_regex([m for m, made in adapted.items() if made.scales_input]) or []}
    tensors, shapes = [made.tensors for made in adapted.values()], [names.shapes[m] for m in adapted]
    return config_class(peft_type).options_from_tensors(tensors, shapes)


def _check_scale_known(peft_type: str, adapted: Mapping[str, FileLayer], has_default: bool, source: str) -> None:
    """Raise CheckpointError for layers with a scale that neither the file nor its format says."""
    if has_default or not config_class(peft_type).alpha_field:
        return
    rank = next(made.file_rank or made.rank for made in adapted.values() if not made.has_own_scale)
    raise CheckpointError(
        f"{source} does not say its alpha, so its scale is unknown. Say it with config=, such as "
        f"config=LoraConfig(r={rank}, lora_alpha={2 * rank})."
    )


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
    return config.with_missing_filled(_target_fields(list(modules), names))


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


def _target_fields(modules: Sequence[str], names: ModuleNames) -> dict[str, Any]:
    """Return the config fields that choose exactly these modules.

    A name in PEFT's list also chooses every module whose path ends with it, so such modules are excluded.
    """
    wanted = frozenset(modules)
    more = [m for m in names.shapes if m not in wanted and any(end in wanted for end in proper_suffixes(m))]
    out: dict[str, Any] = {"target_modules": list(modules)}
    return out | ({"exclude_modules": "|".join(map(re.escape, more))} if more else {})


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


def _config_in_file(raw: LoadedAdapter, chosen: ChosenComponent, peft_type: str) -> dict[str, Any] | None:
    """Return the config that a file states for a component, or None where it states none."""
    if raw.component_configs is not None:
        prefix = f"{chosen.component}." if chosen.component else ""
        # A component's fields are prefixed with its name.
        fields = {k: v for k, v in raw.component_configs.items() if split_component(k)[0] == chosen.component}
        if fields:
            return {"peft_type": peft_type} | {k.removeprefix(prefix): v for k, v in fields.items()}
    if raw.config is not None and not chosen.component:
        return {"peft_type": peft_type} | dict(raw.config)
    return None


def _states_scale(raw: LoadedAdapter, parsed_keys: Sequence[ParsedKey]) -> bool:
    """Return whether a file whose keys name no component states its scales.

    It does by an alpha, by names that PEFT's keys do not have, or by its file name, which is one of diffusers'.
    """
    if any(
        p.slot == ALPHA or p.is_flattened or not p.key.endswith(p.slot) or p.key.startswith(ORIGINAL_BLOCKS)
        for p in parsed_keys
    ):
        return True
    return raw.path is not None and raw.path.name in (LORA_WEIGHT_NAME_SAFE, LORA_WEIGHT_NAME)
