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
from adaptc.adapter_files.foreign_file import RawFile, read_any_format
from adaptc.adapter_files.locate import check_plain_name
from adaptc.adapter_files.multi_adapter import write_together
from adaptc.errors import CheckpointError, short_repr
from adaptc.methods import AdapterConfig, ExpertAdapter, config_class, make_arrow_adapter, routed_adapter_names
from adaptc.methods.lora_family.arrow import ArrowConfig


def read_with_experts(
    path: str | os.PathLike[str], *, adapter_name: str | None = None, key_mapping: Mapping[str, str] | None = None
) -> AdapterFile | RawFile:
    """Read an adapter, and the adapters beside it that it routes between.

    :func:`~adaptc.adapter_files.foreign_file.read_any_format` documents the arguments.

    General adapters are subtracted from the others where the config says so, as PEFT does each time it loads one.
    Raises CheckpointError where an adapter that it names cannot be read.
    """
    file = read_any_format(path, adapter_name=adapter_name, key_mapping=key_mapping)
    if isinstance(file, RawFile) or not file.config.get("arrow_config"):
        return file
    task_names, general_names = routed_adapter_names(file.config)

    def read_sibling(name: str) -> ExpertAdapter:
        try:
            one = read_adapter(file.path.parent, adapter_name=name, key_mapping=key_mapping)
        except CheckpointError as error:
            raise CheckpointError(f"{file.path} routes between the adapters beside it: {error}") from error
        return ExpertAdapter(config_of_file(one), one.tensors, str(one.path))

    if not task_names:
        return file  # binding it raises the error
    arrow = ArrowConfig.from_value(file.config["arrow_config"])
    config, tensors = make_arrow_adapter(
        arrow, [read_sibling(n) for n in task_names], [read_sibling(n) for n in general_names]
    )
    return replace(file, config=config.to_dict(), tensors=tensors, flat_tensors=())


def config_from_dict(data: Mapping[str, Any]) -> AdapterConfig:
    """Return the config with the content of an ``adapter_config.json``."""
    kind = data.get("peft_type")
    cls = config_class(kind if isinstance(kind, str) else short_repr(kind))
    return cls.from_dict(data)


def config_of_file(file: AdapterFile) -> AdapterConfig:
    """Return the config of a file, without EVA's options, which only choose first values and leave the base as it
    was."""
    data = dict(file.config)
    if data.get("init_lora_weights") == "eva":
        data |= {"init_lora_weights": True, "eva_config": None}
    return config_from_dict(data)


def write_with_experts(
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
    root = Path(path) if adapter_name == "default" else Path(path) / check_plain_name(adapter_name, "adapter_name")
    parts = config.adapters_to_write(tensors, str(root.absolute()))
    if named := [n for n in parts if n]:  # first, so that the directory which names them never lies there without them
        with write_together(root, named) as stage:
            for name in named:
                write_adapter(stage, *parts[name], adapter_name=name, **options)
    if "" in parts:
        return write_adapter(path, *parts[""], adapter_name=adapter_name, **options)
    return root / list(parts)[-1]
