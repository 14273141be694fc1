"""Read adapter files that are not PEFT directories: one file of tensors, with the texts of its header.

The tensors have the keys of the file and memory of their own. Limits and refusals are those of PEFT's files
(``safe_load``, ``safetensors_reader``, ``stable_read``). No code of a file is run, and a file that changes during the
read is read again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from adaptc.adapter_files import safe_load, safetensors_reader
from adaptc.adapter_files.atomic_write import abandoned, stages
from adaptc.adapter_files.directory import AdapterFile, checked, read_adapter
from adaptc.adapter_files.format import BIN_NAME, CONFIG_NAME, MODULE, SAFE_NAME
from adaptc.adapter_files.formats import diffusers
from adaptc.adapter_files.key_mapping import renamed, rules_of
from adaptc.adapter_files.stable_read import OpenedFile, settled
from adaptc.errors import CheckpointError, shown
from adaptc.value_types import DEEPEST, is_deep


@dataclass(frozen=True, eq=False)
class RawFile:
    """An adapter file's tensors, under the keys of the file, with its configs.

    ``configs`` is the JSON that its header has on the adapters in it, None where it has none. ``beside`` is the content
    of a config file in the same directory, for a file that needs one; None otherwise.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    path: Path
    configs: Mapping[str, Any] | None = None
    beside: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of tensor data."""
        return sum(t.nbytes for t in self.tensors.values())


def read_any(
    path: str | os.PathLike[str], *, adapter_name: str | None = None, key_mapping: Mapping[str, str] | None = None
) -> AdapterFile | RawFile:
    """Read a PEFT directory as :func:`read_adapter` does, and any other file with its own keys.

    ``path`` may be a PEFT directory, or one of PEFT's weight files beside its config. It may also be a directory with
    diffusers' ``pytorch_lora_weights`` or with a single ``.safetensors`` file. Else it is a file: ``.safetensors``, or
    one of ``torch.save``. ``key_mapping`` is applied to the keys as :func:`rename` does. Raises CheckpointError and
    ConfigError.
    """
    file = _raw_path(Path(path), adapter_name)
    if file is None:
        return read_adapter(path, adapter_name=adapter_name, key_mapping=key_mapping)
    if file.name in (SAFE_NAME, BIN_NAME) and (file.parent / CONFIG_NAME).is_file():
        return read_adapter(file.parent, key_mapping=key_mapping)
    rules_of(key_mapping)  # raises for a bad mapping before anything is read
    tensors, configs, beside = settled(lambda: _read(file))
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors at all.")
    return RawFile(MappingProxyType(rename(tensors, key_mapping, file)), file, configs, beside)


def rename(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None, source: object) -> dict[str, Tensor]:
    """Return ``tensors`` under their renamed keys. PEFT's prefix ``base_model.model.`` is not renamed, and stays.

    Raises like :func:`~adaptc.adapter_files.key_mapping.renamed`.
    """
    rules = rules_of(key_mapping)
    if not rules:
        return dict(tensors)
    names = renamed({key: key.removeprefix(MODULE) for key in tensors}, rules, source)
    return {(MODULE if key.startswith(MODULE) else "") + new: tensors[key] for new, key in names.items()}


def _raw_path(path: Path, adapter_name: str | None) -> Path | None:
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
        if any((path / n).is_file() for n in (CONFIG_NAME, SAFE_NAME, BIN_NAME)):
            return None
        if any(not abandoned(s) for s in stages(path)):  # a write is under way, so other files will be there soon
            return None
        entries = sorted(path.iterdir())
        if any(not d.name.startswith(".") and (d / CONFIG_NAME).is_file() for d in entries if d.is_dir()):
            return None
    except OSError as exc:
        raise CheckpointError(f"cannot look for an adapter in {path}: {exc}. Check its permissions.") from exc
    for name in (diffusers.SAFE, diffusers.BIN):
        if (path / name).is_file():
            return path / name
    found = [f for f in entries if f.suffix == ".safetensors" and not f.name.startswith(".") and f.is_file()]
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds several files of tensors, {shown([f.name for f in found])}, and no {CONFIG_NAME}. Give "
            f"the path "
            "of the one that is the adapter."
        )
    return found[0] if found else None


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any] | None]:
    configs = beside = None
    with OpenedFile(file) as body:
        # Any other suffix is taken for torch.save, since many files are called .ckpt and .pt.
        if file.suffix == ".safetensors":
            tensors, _ = checked(safetensors_reader.load, body)
            configs = checked(_configs, body)
        else:
            tensors = checked(safe_load.load_pickle, body)
        if (file.parent / CONFIG_NAME).is_file() and (file.suffix != ".safetensors" or any(map(of_peft, tensors))):
            with OpenedFile(file.parent / CONFIG_NAME) as head:
                beside = checked(safe_load.read_json_object, head)
                head.check()
        body.check()
    return tensors, configs, beside


def of_peft(key: str) -> bool:
    """Return whether a key has the prefix of PEFT's files."""
    return key.startswith("base_model.")


def _configs(file: OpenedFile) -> dict[str, Any] | None:
    """Return the configs that diffusers writes into a header, or None. Raises CheckpointError where they are no JSON
    object."""
    text = safetensors_reader.header_texts(file).get(diffusers.METADATA)
    if text is None:
        return None
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"it is a {type(value).__name__}")
        if is_deep(value):
            raise ValueError(f"it is nested deeper than {DEEPEST}")
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(
            f"{file.path}: {diffusers.METADATA} in its header is not a JSON object of config fields ({exc}). Save or "
            "download it again."
        ) from exc
    return value
