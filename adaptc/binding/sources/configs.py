"""Make config objects of what users give: configs of adaptc and peft, dicts, adapter directories and JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from adaptc.adapter_files.adapter_data import AdapterData
from adaptc.adapter_files.directory import read_config
from adaptc.adapter_files.stable_read import FileChangedError, OpenedFile, read_json_object
from adaptc.binding.binding import ResolvedAdapter
from adaptc.errors import CheckpointError, ConfigError, did_you_mean, short_repr
from adaptc.methods import AdapterConfig, config_class
from adaptc.torch_typing import is_mapping, is_path


def as_config(config: Any) -> AdapterConfig:
    """Return a config from any object or path that gives one, an adapter directory included.

    Raises ConfigError or CheckpointError.
    """
    if isinstance(config, AdapterConfig):
        config.check_types()  # fields may have been set since it was made
        return config
    if is_path(config):
        return config_from_dict(read_config(config))
    if is_mapping(config):
        return config_from_dict(config)
    if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
        return config_from_peft(config)
    raise ConfigError(
        f"expected a config such as LoraConfig, a peft config, or an adapter directory; got {type(config).__name__}"
    )


def config_from_dict(data: Mapping[str, Any]) -> AdapterConfig:
    """Return the config with the content of an ``adapter_config.json``."""
    kind = data.get("peft_type")
    cls = config_class(kind if isinstance(kind, str) else short_repr(kind))
    return cls.from_dict(data)


def config_from_fields(data: Any) -> AdapterConfig:
    """Return the config with fields that a user wrote, with PEFT's names; ``peft_type`` is LORA where it is left out.

    Raises ConfigError for a field that the config does not have, which a file of a newer PEFT may have.
    """
    if not is_mapping(data):
        raise ConfigError(f"{short_repr(data)} is no config: expected fields and their values")
    kind = data.get("peft_type", "LORA")
    cls = config_class(kind if isinstance(kind, str) else short_repr(kind))
    known = [f.name for f in fields(cls)]
    for name in data:
        if name not in known and name != "peft_type":
            raise ConfigError(f"{cls.__name__} has no field {short_repr(name)}{did_you_mean(str(name), known)}")
    return cls.from_dict(data)


def loaded_config(given: AdapterConfig | Mapping[str, Any]) -> AdapterConfig:
    """Return the config object of a loaded adapter that has the config ``given``.

    EVA's options are left out, since they only choose first values and leave the base as it was.
    """
    if isinstance(given, AdapterConfig):
        return given
    if given.get("init_lora_weights") == "eva":
        given = {**given, "init_lora_weights": True, "eva_config": None}
    return config_from_dict(given)


def new_adapter(config: AdapterConfig) -> ResolvedAdapter:
    """Return a new adapter of ``config``, which has no tensors yet."""
    return AdapterData(config, {}, f"a new {type(config).__name__}", is_new=True)


def config_from_peft(config: Any) -> AdapterConfig:
    """Return a config from a config object of the peft library, which need not be importable here.

    Raises ConfigError where its ``to_dict()`` fails.
    """
    try:
        data = dict(config.to_dict())
    except Exception as error:  # an object that is no peft config may fail in any way
        raise ConfigError(f"{type(config).__name__}.to_dict() gives no config: {short_repr(error)}") from error
    data["peft_type"] = getattr(data.get("peft_type"), "value", data.get("peft_type"))
    data["task_type"] = getattr(data.get("task_type"), "value", data.get("task_type"))
    if getattr(config, "runtime_config", None) is not None:
        offload = getattr(config.runtime_config, "ephemeral_gpu_offload", False)
        data["runtime_config"] = {"ephemeral_gpu_offload": True} if offload else None
    new = config_from_dict(data)
    for name in new.unsaved_attributes:
        setattr(new, name, getattr(config, name, None))
    return new


def read_config_file(path: Path) -> AdapterConfig:
    """Return the config in a JSON file with the content of an ``adapter_config.json``. Raises CheckpointError for other
    files."""
    try:
        with OpenedFile(path) as file:
            data = read_json_object(file)
    except FileChangedError:
        raise CheckpointError(
            f"there is no file {path}; expected an adapter directory, or the JSON of a config"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is no config of an adapter, a JSON object with a 'peft_type': {error}"
        ) from error.__cause__
    if "peft_type" not in data:
        raise CheckpointError(f"{path} is no config of an adapter: expected a JSON object with a 'peft_type'")
    return config_from_dict(data)
