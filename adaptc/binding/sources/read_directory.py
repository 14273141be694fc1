"""Read and write adapters that may be several directories on disk.

An Arrow adapter is LoRA adapters with a router beside them. Reading makes one adapter of all that it names. Writing
writes all of its directories, or leaves what was there before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.adapter_files.directory import AdapterFile, read_adapter, write_adapter
from adaptc.adapter_files.foreign_file import RawFile, read_any
from adaptc.adapter_files.locate import plain_name
from adaptc.adapter_files.multi_adapter import written_together
from adaptc.errors import CheckpointError, shown
from adaptc.methods import AdapterConfig, MethodPart, config_class, names_in, routing
from adaptc.methods.lora_family.arrow import ArrowConfig


def read_whole(
    path: str | os.PathLike[str], *, adapter_name: str | None = None, key_mapping: Mapping[str, str] | None = None
) -> AdapterFile | RawFile:
    """Read an adapter, and the adapters beside it that it routes between.

    :func:`~adaptc.adapter_files.foreign_file.read_any` documents the arguments.

    General adapters are subtracted from the others where the config says so, as PEFT does each time it loads one.
    Raises CheckpointError where an adapter that it names cannot be read.
    """
    file = read_any(path, adapter_name=adapter_name, key_mapping=key_mapping)
    if isinstance(file, RawFile) or not file.config.get("arrow_config"):
        return file
    tasks, general = names_in(file.config)

    def beside(name: str) -> MethodPart:
        try:
            one = read_adapter(file.path.parent, adapter_name=name, key_mapping=key_mapping)
        except CheckpointError as error:
            raise CheckpointError(f"{file.path} routes between the adapters beside it: {error}") from error
        return MethodPart(of_file(one), one.tensors, str(one.path))

    if not tasks:
        return file  # binding it raises the error
    arrow = ArrowConfig.of(file.config["arrow_config"])
    config, tensors = routing(arrow, [beside(n) for n in tasks], [beside(n) for n in general])
    return replace(file, config=config.to_dict(), tensors=tensors, runs=())


def from_dict(data: Mapping[str, Any]) -> AdapterConfig:
    """Return the config with the content of an ``adapter_config.json``."""
    kind = data.get("peft_type")
    cls = config_class(kind if isinstance(kind, str) else shown(kind))
    return cls.from_dict(data)


def of_file(file: AdapterFile) -> AdapterConfig:
    """Return the config of a file, without EVA's options, which only choose first values and leave the base as it
    was."""
    data = dict(file.config)
    if data.get("init_lora_weights") == "eva":
        data |= {"init_lora_weights": True, "eva_config": None}
    return from_dict(data)


def write_whole(
    path: str | os.PathLike[str],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    **options: Any,
) -> Path:
    """Write an adapter as :func:`~adaptc.adapter_files.directory.write_adapter` does, and return the path of its
    directory.

    An adapter that files hold as several is written as one directory per name. The path is then that of the directory
    that stands for all.
    """
    root = Path(path) if adapter_name == "default" else Path(path) / plain_name(adapter_name, "adapter_name")
    parts = config.written(tensors, str(root.absolute()))
    if named := [n for n in parts if n]:  # first, so that the directory which names them never lies there without them
        with written_together(root, named) as stage:
            for name in named:
                write_adapter(stage, *parts[name], adapter_name=name, **options)
    if "" in parts:
        return write_adapter(path, *parts[""], adapter_name=adapter_name, **options)
    return root / list(parts)[-1]
