"""Load an adapter from whatever holds one: a directory, a file of any format, a state dict, or an object of one.

This is the one place that tells these apart. Tensors are checked once and renamed once here. No model is involved, so
keys of other formats than PEFT's stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from adaptc.adapter_files.adapter_data import PEFT_KEYS, STATE_DICT_KEYS, AdapterData, LoadedAdapter
from adaptc.adapter_files.atomic_write import is_abandoned, list_stages
from adaptc.adapter_files.check_state_dict import check_state_dict, is_state_dict
from adaptc.adapter_files.directory import read_adapter
from adaptc.adapter_files.foreign_file import read_adapter_file
from adaptc.adapter_files.format import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, routed_names
from adaptc.adapter_files.formats.diffusers import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from adaptc.adapter_files.key_mapping import RenameRules, compile_rules, rename_tensors
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, short_repr
from adaptc.torch_typing import is_mapping, is_path
from adaptc.value_types import checked_options


def has_tensors(source: Any) -> bool:
    """Return whether ``source`` is something that :func:`load` takes, and not just a config.

    A path counts, and a non-empty mapping of tensors.
    """
    return isinstance(source, (str, os.PathLike, AdapterData)) or hasattr(source, "as_file") or is_state_dict(source)


def load(
    source: Any,
    *,
    adapter_name: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    with_experts: bool = True,
) -> LoadedAdapter:
    """Return the adapter that ``source`` holds.

    ``source`` is a path, a state dict, an :class:`AdapterData`, or an object whose ``as_file()`` gives one. A path may
    be a PEFT directory, or one of PEFT's weight files beside its config. It may also be a directory with diffusers'
    ``pytorch_lora_weights`` or with a single ``.safetensors`` file. Else it is a file: ``.safetensors``, or one of
    ``torch.save``.

    ``adapter_name`` chooses from a directory of adapters. ``key_mapping`` maps regular expressions to replacements, for
    keys without PEFT's prefix. ``with_experts`` also reads the adapters beside an Arrow router.

    Raises CheckpointError for what cannot be read or bound. Raises ConfigError for options that do not go with
    ``source``, and AdaptcError for a ``source`` of another kind.
    """
    adapter_name, key_mapping = checked_options(load, adapter_name=adapter_name, key_mapping=key_mapping)
    rules = compile_rules(key_mapping)
    if is_path(source):
        file = _find_file(Path(source), adapter_name)
        data: LoadedAdapter = (
            read_adapter(source, adapter_name=adapter_name)
            if file is None
            else replace(read_adapter_file(file), source=str(source))
        )
        if with_experts and data.format == PEFT_KEYS and data.config and data.config.get("arrow_config"):
            names = routed_names(data.config)
            data = replace(data, experts={name: _read_expert(data, name, rules) for name in names})
    elif adapter_name is not None:
        raise ConfigError(
            f"adapter_name={adapter_name!r} chooses from a directory of adapters, and the adapter is a "
            f"{type(source).__name__}: leave it out"
        )
    elif is_mapping(source):
        tensors = check_state_dict(source, "state dict")
        data = AdapterData(None, tensors, "state dict", format=STATE_DICT_KEYS, is_shared=True)
    else:
        data = _check_object(source)
    if rules:
        data = replace(data, tensors=rename_tensors(data.tensors, rules, data.source, data.format == PEFT_KEYS))
    return data


def _find_file(path: Path, adapter_name: str | None) -> Path | None:
    """Return the file to read by itself, or None where PEFT's rules find the adapter or explain why there is none."""
    try:
        if path.is_file():
            if adapter_name not in (None, "default"):
                raise CheckpointError(
                    f"{path} is a file, which has no adapter {adapter_name!r} in it; leave out the name"
                )
            return path
        if not path.is_dir() or adapter_name not in (None, "default"):
            return None
        if any((path / n).is_file() for n in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            return None
        # While a write is under way, other files will be there soon.
        if any(not is_abandoned(s) for s in list_stages(path)):
            return None
        entries = sorted(path.iterdir())
        if any(not d.name.startswith(".") and (d / CONFIG_NAME).is_file() for d in entries if d.is_dir()):
            return None
    except OSError as exc:
        raise CheckpointError(f"cannot look for an adapter in {path}: {exc}. Check its permissions.") from exc
    for name in (LORA_WEIGHT_NAME_SAFE, LORA_WEIGHT_NAME):
        if (path / name).is_file():
            return path / name
    found = [f for f in entries if f.suffix == ".safetensors" and not f.name.startswith(".") and f.is_file()]
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds several files of tensors, {short_repr([f.name for f in found])}, and no {CONFIG_NAME}. Give "
            "the path of the one that is the adapter."
        )
    return found[0] if found else None


def _read_expert(data: LoadedAdapter, name: str, rules: RenameRules) -> LoadedAdapter:
    assert data.path is not None
    try:
        expert = read_adapter(data.path.parent, adapter_name=name)
        renamed = rename_tensors(expert.tensors, rules, expert.path, True) if rules else expert.tensors
    except CheckpointError as error:
        raise CheckpointError(f"{data.path} routes between the adapters beside it: {error}") from error
    return replace(expert, tensors=renamed, source=str(expert.path))


def _check_object(source: Any) -> LoadedAdapter:
    """Return the adapter that an object holds. Raises AdaptcError where it is no adapter."""
    data = source.as_file() if hasattr(source, "as_file") else source
    if not isinstance(data, AdapterData):
        raise AdaptcError(
            f"an adapter is a directory, a file, a state dict, a binding, or what prog.bind returned; got "
            f"{type(source).__name__}"
        )
    check_state_dict(data.tensors, data.source)
    return replace(cast("LoadedAdapter", data), is_shared=True)
