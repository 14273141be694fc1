"""Open the directory of a transformers model as a model whose weights stay in their files.

The files are mapped, so a weight takes memory while it is read, and the system may take that back. The model's modules
are made by transformers. Quantised weights are read by ``quantized_layers.stored_layers``: their codes stay in the
files, too, but for those of GPTQ and AWQ.

Which key of the files a parameter came from is told by its memory. So it is right whatever transformers renames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adaptc.adapters.model_tensors import safetensors_files
from adaptc.capture.model_files import QUANTIZATION_CONFIG, make_model_of, read_model_config
from adaptc.errors import CheckpointError, short_repr
from adaptc.quantized_layers.stored_layers import StoredWeight, find_stored_weights

#: the file of a model that has one file
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, eq=False)
class MappedModel:
    """A model whose weights lie in the files of a directory.

    Attributes:
        path: the directory.
        config: the content of its ``config.json``.
        files: the names of its safetensors files, in order, with the tensors of each by key.
        metadata: the metadata of each file.
        stored: the quantised weights, by the names that the files give them.
        model: the model, in eval mode.
        keys: the name of a parameter or a buffer in the model -> its key in the files, or the name of its quantised
            weight. Tensors that transformers made of others are missing.
        dtype: the dtype of plain weights, as the config says.
    """

    path: Path
    config: dict[str, Any]
    files: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, Mapping[str, str]]
    stored: Mapping[str, StoredWeight]
    model: nn.Module
    keys: Mapping[str, str]
    dtype: torch.dtype


@contextmanager
def open_mapped_model(path: Path) -> Iterator[MappedModel]:
    """Run the block with the model in the directory ``path``, whose files stay open as long.

    Raises CheckpointError where the directory has no such model, or a file or a quantised weight cannot be read.
    """
    config = read_model_config(path)
    with ExitStack() as stack:
        files: dict[str, dict[str, Tensor]] = {}
        metadata: dict[str, dict[str, str]] = {}
        for name in _weight_files(path):
            try:
                opened = stack.enter_context(safe_open(path / name, "pt"))
                files[name] = dict(zip(opened.keys(), map(opened.get_tensor, opened.keys()), strict=True))
                metadata[name] = dict(opened.metadata() or {})
            except (SafetensorError, OSError, RuntimeError) as error:
                reason = short_repr(str(error))
                raise CheckpointError(f"{path / name} is no readable safetensors file ({reason})") from error
        tensors = {key: t for held in files.values() for key, t in held.items()}
        dtype = _dtype_of(config, tensors)
        stored: dict[str, StoredWeight] = {}
        if config.get(QUANTIZATION_CONFIG) is not None:
            stored = find_stored_weights(config[QUANTIZATION_CONFIG], tensors, tensors.__getitem__, dtype)
        model, keys = _make_model(path, tensors, stored, dtype)
        yield MappedModel(path, config, files, metadata, stored, model, keys, dtype)


def _weight_files(path: Path) -> Sequence[str]:
    # Beside the files that transformers reads, a directory may hold those of another layout.
    names = [file.name for file in safetensors_files(path)]
    return [SINGLE_FILE] if SINGLE_FILE in names and not (path / f"{SINGLE_FILE}.index.json").is_file() else names


def _dtype_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype that the config names, or that of the first floating tensor."""
    named = config.get("dtype", config.get("torch_dtype"))
    found = getattr(torch, named, None) if isinstance(named, str) else None
    if isinstance(found, torch.dtype):
        return found
    return next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)


def _make_model(
    path: Path, tensors: Mapping[str, Tensor], stored: Mapping[str, StoredWeight], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, str]]:
    hidden = {key for weight in stored.values() for key in weight.keys}
    state = {key: t for key, t in tensors.items() if key not in hidden}
    # These stand for the quantised weights while transformers makes the model, and take no memory.
    state |= {name: torch.zeros((), dtype=dtype).expand(weight.shape) for name, weight in stored.items()}
    model: nn.Module = make_model_of(path, state)
    names_by_memory = {(t.data_ptr(), t.shape): key for key, t in state.items() if t.numel()}
    keys: dict[str, str] = {}
    held = dict(model.state_dict(keep_vars=True))
    for name, t in held.items():
        if (key := names_by_memory.get((t.data_ptr(), t.shape))) is not None:
            keys[name] = key
    made: dict[str, nn.Parameter] = {}
    for name, key in keys.items():
        if key in stored:
            if key not in made:
                made[key] = nn.Parameter(stored[key].read(), requires_grad=False)
            module, _, parameter = name.rpartition(".")
            setattr(model.get_submodule(module), parameter, made[key])
    if lost := [name for name in stored if name not in made]:
        raise CheckpointError(
            f"{path} holds the quantised weight {lost[0]!r}, and transformers makes another tensor of it: load the "
            "model with its library, and merge a program of it"
        )
    return model.eval(), keys
