"""The current adapter of a program as a directory that PEFT reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.binding.bind import embedding_tensors, file_tensors
from adaptc.binding.binding import Binding
from adaptc.binding.combine import part_of
from adaptc.errors import ConfigError
from adaptc.peft_files.directory import write_adapter
from adaptc.peft_files.format import SAFE_NAME
from adaptc.program.core import ProgramCore

#: where transformers' Trainer looks for weights when it goes on from a checkpoint
TRAINER_NAME = "model.safetensors"


def write_current(
    program: ProgramCore,
    path: str | os.PathLike[str],
    binding: Binding | None = None,
    *,
    adapter_name: str = "default",
    safe_serialization: bool = True,
    base_model: str | None = None,
    save_embedding_layers: bool = False,
) -> Path:
    """See ``adaptc.save_adapter``. ``binding``: what to write, None for the program's current one."""
    binding, spec = program.binding if binding is None else binding, program.spec()
    if binding.parts:
        if adapter_name not in binding.parts:
            raise ConfigError(
                f"the program has no adapter called {adapter_name!r}; say which of {list(binding.parts)} to write with "
                "adapter_name"
            )
        binding, spec = binding.parts[adapter_name], part_of(spec, adapter_name)
    tensors: dict[str, Tensor] = file_tensors(spec, binding)
    if save_embedding_layers:
        found = embedding_tensors(spec, binding)
        if not found:
            raise ConfigError(
                "save_embedding_layers=True, but the program has no module called embed_tokens or lm_head"
            )
        tensors = {**found, **tensors}
    config: Mapping[str, Any] = binding.config.to_dict()
    return write_adapter(
        path,
        config,
        tensors,
        adapter_name=adapter_name,
        safe_serialization=safe_serialization,
        base_model=base_model,
    )


def link_for_trainer(directory: Path) -> None:
    """Give the weights of an adapter directory a second name, under which Trainer finds them: the same file, or a copy
    of it where the filesystem has no links."""
    weights, name = directory / SAFE_NAME, directory / TRAINER_NAME
    aside = directory / f".{TRAINER_NAME}.new"
    with suppress(FileNotFoundError):
        aside.unlink()
    try:
        os.link(weights, aside)
    except OSError:
        shutil.copyfile(weights, aside)
    os.replace(aside, name)
