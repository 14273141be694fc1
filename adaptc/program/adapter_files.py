"""The current adapter of a program as a directory that PEFT reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from filecmp import cmp
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.binding.bind import embedding_tensors, file_tensors
from adaptc.binding.binding import Binding
from adaptc.binding.combine import part_of
from adaptc.errors import CheckpointError, ConfigError
from adaptc.peft_files.directory import write_adapter
from adaptc.peft_files.format import SAFE_NAME
from adaptc.peft_files.staging import replacing
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


@contextmanager
def linked_for_trainer(directory: Path) -> Iterator[None]:
    """Writes of an adapter into ``directory`` after which its weights have a second name there, under which Trainer
    finds them: the same file, or a copy of it where the filesystem has no links.

    Raises CheckpointError, before anything is written, where that name is something else's, such as a whole model's.
    """
    weights, name = directory / SAFE_NAME, directory / TRAINER_NAME
    if os.path.lexists(name):
        if not (weights.is_file() and name.is_file() and cmp(weights, name, shallow=False)):
            raise CheckpointError(
                f"{name} is there, and not this adapter's: it would be lost, or Trainer would resume from it. Choose "
                "another directory"
            )
        name.unlink()  # so that it is never of an older adapter than its neighbour
    try:
        yield
    finally:
        if weights.is_file():
            try:
                os.link(weights, name)
            except OSError:
                with replacing(name) as copied:
                    shutil.copyfile(weights, copied)
