"""Make the config that PEFT would have for an adapter in another format.

It is the config that the file states, or else follows from the tensors. Facts that a file does not state are never made
up: the caller must give them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from adaptc.adapter_files.adapter_data import LoadedAdapter
from adaptc.adapter_files.formats.diffusers import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from adaptc.adapter_files.formats.file_layer import FileLayer
from adaptc.adapter_files.formats.mmdit import ORIGINAL_BLOCKS
from adaptc.adapter_files.formats.parts import ALPHA, Format, ParsedKey, split_component
from adaptc.binding.sources.components import ChosenComponent
from adaptc.binding.sources.configs import loaded_config
from adaptc.binding.sources.file_ranks import rank_alpha_fields, with_ranks_of_layers
from adaptc.binding.sources.module_names import ModuleNames
from adaptc.errors import CheckpointError
from adaptc.methods import AdapterConfig, config_class, exact_names_regex, proper_suffixes

#: fields of a config that choose modules; here the keys of the file choose them
_TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")


def config_of_file(
    raw: LoadedAdapter,
    file_format: Format,
    parsed_keys: Sequence[ParsedKey],
    chosen: ChosenComponent,
    adapted: Mapping[str, FileLayer],
    names: ModuleNames,
    fields: Mapping[str, Any],
) -> AdapterConfig | dict[str, Any]:
    """Return the config of an adapter with the layers ``adapted``, all of one method, as an object or its fields.

    ``fields`` are those that follow from the keys: targets, and what is trained beside them. Raises CheckpointError
    where nothing says the scale of a layer.
    """
    peft_type = next(iter(adapted.values())).peft_type
    options = _options_of_layers(peft_type, adapted, names)
    stated = _config_in_file(raw, chosen, peft_type)
    if stated is None:
        has_default = file_format.has_default_scale and (bool(chosen.component) or _states_scale(raw, parsed_keys))
        _check_scale_known(peft_type, adapted, has_default, f"{raw.source} ({file_format.name})")
        return {"peft_type": peft_type, **options, **rank_alpha_fields(peft_type, adapted), **fields}
    if raw.component_configs is not None:
        options = {}
    stated = {**options, **{k: v for k, v in stated.items() if k not in _TARGET_FIELDS}, **fields}
    if any(p.slot == ALPHA for p, _ in chosen.modules_by_key):
        return {**stated, **rank_alpha_fields(peft_type, adapted)}
    return with_ranks_of_layers(loaded_config(stated), adapted, raw.source)


def target_fields(modules: Sequence[str], names: ModuleNames) -> dict[str, Any]:
    """Return the config fields that choose exactly these modules.

    A name in PEFT's list also chooses every module whose path ends with it, so such modules are excluded.
    """
    wanted = frozenset(modules)
    more = [m for m in names.shapes if m not in wanted and any(end in wanted for end in proper_suffixes(m))]
    out: dict[str, Any] = {"target_modules": list(modules)}
    return out | ({"exclude_modules": "|".join(map(re.escape, more))} if more else {})


def _options_of_layers(peft_type: str, adapted: Mapping[str, FileLayer], names: ModuleNames) -> dict[str, Any]:
    """Return the config fields, other than targets and ranks, that follow from the tensors."""
    if peft_type == "IA3":
        return {"feedforward_modules": exact_names_regex([m for m, made in adapted.items() if made.scales_input]) or []}
    tensors, shapes = [made.tensors for made in adapted.values()], [names.shapes[m] for m in adapted]
    return config_class(peft_type).options_from_tensors(tensors, shapes)


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


def _check_scale_known(peft_type: str, adapted: Mapping[str, FileLayer], has_default: bool, source: str) -> None:
    """Raise CheckpointError for layers with a scale that neither the file nor its format says."""
    ranks = [made.file_rank or made.rank for made in adapted.values() if not made.has_own_scale]
    if has_default or not ranks or not config_class(peft_type).alpha_field:
        return
    rank = ranks[0]
    raise CheckpointError(
        f"{source} does not say its alpha, so its scale is unknown. Say it with config=, such as "
        f"config=LoraConfig(r={rank}, lora_alpha={2 * rank})."
    )
