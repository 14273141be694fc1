"""Write the adapter or the model that a module has now, and refuse to write its program's where that is out of date.

The parameters of a module may have been replaced since the module was made: FSDP2 puts sharded tensors in their place.
What is trained then is in the module alone, and the program still has the tensors from before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding
from adaptc.capture.capture import PretrainedFacts
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.state.adapter_output import with_trainer_name, without_trainer_name, write_adapter
from adaptc.state.core import ProgramCore
from adaptc.state.model_directory import check_save_options, write_model
from adaptc.training.checkpoints import is_checkpoint
from adaptc.training.program_module import ProgramModule
from adaptc.training.sharded_tensors import gather, is_first_process, mesh_of, reshard


def write_module_adapter(
    module: ProgramModule,
    path: str | os.PathLike[str],
    binding: Binding | None = None,
    *,
    is_writer: bool = True,
    for_trainer: bool = False,
    **options: Any,
) -> Path:
    """Write the adapter of ``module``; returns the directory.

    ``binding``: a binding to write instead, None for the module's. ``is_writer``: whether this process writes, where
    every process has whole tensors. ``for_trainer``: write the weights under the name that Trainer looks for, too.
    ``options``: those of :func:`write_adapter`.

    All processes call it where the module is sharded. The first of them writes, and all return when it has. Raises as
    :func:`write_adapter` does, and CheckpointError where another process could not write.
    """
    mesh = None
    if binding is None:
        reshard(module)
        binding = module.binding()
        mesh = next((m for t in binding.values.values() if (m := mesh_of(t)) is not None), None)
        binding = replace(binding, values={k: gather(t) for k, t in binding.values.items()})
    written = Path(path)
    with is_first_process(mesh) as first:
        if first and (is_writer or mesh is not None):
            with with_trainer_name(written) if for_trainer else without_trainer_name(written):
                written = write_adapter(module.program, path, binding, **options)
    return written


def check_not_stale(program: ProgramCore) -> None:
    """Raise AdaptcError where a module of the program trains other tensors than the program has.

    The program then lacks what these tensors learn. A file or a merged program would have the adapter from before.
    """
    if program.current is None:
        return
    now = program.current.values
    for module in list(program.run_state.modules):
        own = module.tensors()
        # Trainable tensors only: scales are buffers, which torch replaces whenever a module is moved.
        trained = {k: t for k, t in module.program.binding.values.items() if t.requires_grad and k in own}
        known = [k for k, t in trained.items() if now.get(k) is t]
        lost = [k for k in known if own[k] is not now[k]]
        if lost:
            parts = mesh_of(own[lost[0]]) is not None
            how = "parts of them, in several processes" if parts else "others in their place"
            raise AdaptcError(
                f"the program does not have what was trained: it was made with {short_repr(lost[0])} and "
                f"{len(lost) - 1} more tensors, and its module has {how}. Write the adapter with "
                f"adaptc.save_adapter(module, path){', called in every process' if parts else ''}; "
                "adaptc.swap(program, path) then gives the program it"
            )


class PretrainedFiles(ProgramModule):
    """A module of a program that was a transformers model, as far as it is written to files."""

    name_or_path: str

    @property
    def source(self) -> PretrainedFacts:
        source = self.program.adaptation.source
        assert source is not None
        return source

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        save_embedding_layers: bool = False,
        **options: Any,
    ) -> None:
        """Write the adapter as a PEFT directory, where ``is_main_process``; without an adapter, write a transformers
        directory.

        ``state_dict``: tensors to write instead, in PEFT's keys or in the model's. All processes call it for a module
        that FSDP2 shards, and the first one writes. Only a program that was merged or unloaded takes ``options``, which
        are transformers' ``max_shard_size`` and ``save_original_format``.

        In a checkpoint of Trainer's (``checkpoint-10``) the adapter's weights have ``model.safetensors`` as a second
        name, which Trainer looks for when it resumes.

        Raises ConfigError for other options, and CheckpointError as ``adaptc.save_adapter`` and
        :func:`adaptc.state.model_directory.write_model` do. Raises CheckpointError, too, where a checkpoint has a
        ``model.safetensors`` that is something else.
        """
        if push_to_hub:
            raise ConfigError("push_to_hub=True: write the directory, and push it with huggingface_hub")
        options = {k: v for k, v in options.items() if v is not None}
        if self.program.current is None:
            options |= {"safe_serialization": safe_serialization, "save_embedding_layers": save_embedding_layers}
            self._save_model(save_directory, is_main_process, state_dict, check_save_options(options))
            return
        if options:
            raise ConfigError(
                f"save_pretrained of a program writes its adapter, and takes no {', '.join(sorted(options))}; "
                "adaptc.merge(program).module().save_pretrained writes the model"
            )
        write_module_adapter(
            self,
            save_directory,
            None if state_dict is None else bind_adapter(self.program, state_dict),
            is_writer=is_main_process,
            for_trainer=safe_serialization and is_checkpoint(save_directory),
            safe_serialization=safe_serialization,
            base_model=self.name_or_path or None,
            save_embedding_layers=save_embedding_layers,
        )

    def _save_model(
        self,
        path: str | os.PathLike[str],
        is_writer: bool,
        state: Mapping[str, Tensor] | None,
        options: Mapping[str, Any],
    ) -> None:
        reshard(self)
        own = self.tensors()
        own = {k: own[k] for k in self.program.state_dict if k in own}
        mesh = next((m for t in own.values() if (m := mesh_of(t)) is not None), None)
        own = {k: gather(t) for k, t in own.items()} if state is None else dict(state)
        with is_first_process(mesh) as first:
            if first and (is_writer or mesh is not None):
                write_model(self.source, own, path, **options)
