"""Run the stages of a program one after the other in one process, as a module whose stages FSDP2 shards one by one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adaptc.distributed.split_program import SplitProgram
from adaptc.distributed.stage_adapters import tensors_for_file
from adaptc.errors import AdaptcError
from adaptc.methods import AdapterConfig
from adaptc.state.adapter_output import prepare_for_file, write_file_tensors
from adaptc.training.program_module import ProgramModule
from adaptc.training.sharded_tensors import gather, is_first_process, mesh_of, reshard


class StagedModule(nn.Module):
    """The stages of a program as one module, which takes the program's inputs and returns its outputs.

    The module of a whole program is one unit to FSDP2, which gathers all of its parameters for a step. Here each stage
    is a unit: ``fully_shard`` each of ``stages``, and then the module. A process then holds its shards, and one stage.

    Args:
        split: the stages, all of them kept.

    Attributes:
        stages: the modules of the stages, in order. Names of parameters begin with ``stages.0.``, and so on.

    Raises:
        AdaptcError: the split does not keep all stages.

    Example:
        >>> module = adaptc.distributed.StagedModule(adaptc.split(prog, boundaries=["1"]))
        >>> module(x).shape
        torch.Size([2, 3])
    """

    def __init__(self, split: SplitProgram) -> None:
        super().__init__()
        if len(split.programs) < split.count:
            raise AdaptcError(
                f"a StagedModule has all {split.count} stages, and the split keeps {sorted(split.programs)}: use a "
                "TrainingPipeline, or split the program without keep()"
            )
        self.outputs = split.outputs
        self.stages = nn.ModuleList(split.programs[i].module() for i in range(split.count))

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Run all stages.

        Args:
            *args: the program's positional inputs.
            **inputs: its keyword inputs.

        Returns:
            the program's outputs.

        Raises:
            AdaptcError: an input does not fit the program.
        """
        values: Any = args
        for stage in self.stages:
            values = stage(*values, **inputs)
        return self.outputs.with_tensors(values)

    def save_adapter(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the adapter of all stages, as they are now, as one PEFT directory; every process calls it.

        Args:
            path: the directory.
            **options: ``safe_serialization`` and ``base_model`` of ``adaptc.save_adapter``.

        Returns:
            the path of the directory.

        Raises:
            CheckpointError: the files cannot be written.
        """
        modules: Any = self.stages
        reshard(self)
        mesh = next((m for p in self.parameters() if (m := mesh_of(p)) is not None), None)
        config, tensors = gathered_adapter(modules)
        with is_first_process(mesh) as first:
            if first:
                write_file_tensors(path, require_config(config), tensors, **options)
        return Path(path)


def gathered_adapter(modules: Iterable[ProgramModule]) -> tuple[AdapterConfig | None, dict[str, Tensor]]:
    """Return the config and the whole tensors of the adapter of these stages, under the bare keys of PEFT's files.

    Where a stage is sharded, all processes of its mesh call this. The config is None where no stage has an adapter.
    """
    config, tensors = None, dict[str, Tensor]()
    for module in modules:
        if module.program.current is not None:
            reshard(module)
            now = module.binding()
            binding = prepare_for_file(replace(now, values={k: gather(t) for k, t in now.values.items()}))
            config = binding.config
            tensors |= tensors_for_file(module.program, binding)
    return config, tensors


def require_config(config: AdapterConfig | None) -> AdapterConfig:
    """Return ``config``. Raises AdaptcError where it is None: no stage has an adapter to write."""
    if config is None:
        raise AdaptcError("the stages have no adapter to write: the program was merged or unloaded")
    return config
