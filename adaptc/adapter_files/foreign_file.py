"""Read adapter files that are not PEFT directories: one file of tensors, with the texts of its header.

The tensors have the keys of the file and memory of their own. Limits and refusals are those of PEFT's files
(``safe_load``, ``safetensors_reader``, ``stable_read``). No code of a file is run, and a file that changes during the
read is read again.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from adaptc.adapter_files import safe_load, safetensors_reader
from adaptc.adapter_files.adapter_data import FILE_KEYS, AdapterData, LoadedAdapter
from adaptc.adapter_files.directory import read_adapter, read_checked
from adaptc.adapter_files.format import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from adaptc.adapter_files.formats import diffusers
from adaptc.adapter_files.stable_read import OpenedFile, read_json_object, retry_while_changing
from adaptc.errors import CheckpointError
from adaptc.nesting import MAX_DEPTH, is_nested_too_deep
from adaptc.torch_typing import is_dict


def read_adapter_file(file: Path) -> LoadedAdapter:
    """Return the adapter in one file, with the keys of the file; of PEFT's weights beside their config, the directory.

    Raises CheckpointError.
    """
    if file.name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) and (file.parent / CONFIG_NAME).is_file():
        return read_adapter(file.parent)
    tensors, header_configs, config = retry_while_changing(lambda: _read_once(file))
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors at all.")
    return AdapterData(
        config, MappingProxyType(tensors), str(file), file, format=FILE_KEYS, component_configs=header_configs
    )


def _read_once(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any] | None]:
    header_configs = adapter_config = None
    with OpenedFile(file) as weights_file:
        # Any other suffix is taken for torch.save, since many files are called .ckpt and .pt.
        if file.suffix == ".safetensors":
            tensors, _ = read_checked(safetensors_reader.load_tensors, weights_file)
            header_configs = read_checked(_read_header_configs, weights_file)
        else:
            tensors = read_checked(safe_load.load_pickle, weights_file)
        if (file.parent / CONFIG_NAME).is_file() and (
            file.suffix != ".safetensors" or any(map(has_peft_prefix, tensors))
        ):
            with OpenedFile(file.parent / CONFIG_NAME) as head:
                adapter_config = read_checked(read_json_object, head)
                head.check_unchanged()
        weights_file.check_unchanged()
    return tensors, header_configs, adapter_config


def has_peft_prefix(key: str) -> bool:
    """Return whether a key has the prefix of PEFT's files."""
    return key.startswith("base_model.")


def _read_header_configs(file: OpenedFile) -> dict[str, Any] | None:
    """Return the configs that diffusers writes into a header, or None. Raises CheckpointError where they are no JSON
    object."""
    text = safetensors_reader.read_metadata(file).get(diffusers.LORA_ADAPTER_METADATA_KEY)
    if text is None:
        return None
    try:
        value = json.loads(text)
        if not is_dict(value):
            raise ValueError(f"it is a {type(value).__name__}")
        if is_nested_too_deep(value):
            raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(
            f"{file.path}: {diffusers.LORA_ADAPTER_METADATA_KEY} in its header is not a JSON object of config fields "
            f"({exc}). Save or download it again."
        ) from exc
    return value
