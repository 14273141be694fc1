"""Read the weights of a base by name, from whatever a user gives to complete a program that was saved by reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.adapter_files.safetensors_reader import load_tensors
from adaptc.adapter_files.stable_read import OpenedFile, retry_while_changing
from adaptc.capture.model_files import is_gguf, read_gguf, read_model
from adaptc.errors import CheckpointError, ConfigError, short_repr
from adaptc.state.core import ProgramCore
from adaptc.torch_typing import is_mapping, is_path


def tensors_of_base(base: Any) -> Mapping[str, Any]:
    """Return name -> tensor of ``base``: a module, a state dict, an exported program, a transformers directory, a
    ``.safetensors`` file or a GGUF file.

    Raises CheckpointError where a file cannot be read, and ConfigError for anything else.
    """
    if isinstance(base, nn.Module):
        found: dict[str, Any] = dict(base.named_parameters(remove_duplicate=False))
        return found | dict(base.named_buffers(remove_duplicate=False))
    if isinstance(base, ProgramCore):
        return base.base_tensors
    if isinstance(base, ExportedProgram):
        return base.state_dict
    if is_path(base):
        return _tensors_of_path(Path(base))
    if is_mapping(base) and base and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in base.items()):
        return base
    raise ConfigError(
        f"base={short_repr(base)} is no base: expected a model, its state dict, a program of it, a transformers "
        "directory or a .safetensors file"
    )


def _tensors_of_path(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        return tensors_of_base(read_model(path))
    if not path.is_file():
        raise CheckpointError(f"there is no base at {path}: expected a transformers directory or a .safetensors file")
    if is_gguf(path):
        return tensors_of_base(read_gguf(path))
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} cannot be read as a base: expected a transformers directory, a .safetensors file or a GGUF file; "
            "of a program's file give adaptc.load(path)"
        )

    def read() -> Mapping[str, Any]:
        with OpenedFile(path) as file:
            tensors, _ = load_tensors(file)
            file.check_unchanged()
            return tensors

    return retry_while_changing(read)
