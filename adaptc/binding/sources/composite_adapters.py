"""Gather adapters that are made of others with files of their own, such as X-LoRA's experts, into one file in memory.

The config names the other adapters, and the adapter may have a file of its own. The result has the tensors of all, and
a config that lists them. An error names a part that is missing or does not fit.

A part is looked for below the file that names it, in a directory called by its number, as PEFT writes it. If none there
can be read as an adapter of its own, the part is read from the path in the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.directory import AdapterFile, check_finite, read_adapter
from adaptc.adapter_files.format import CONFIG_NAME
from adaptc.binding.file_keys import base_name
from adaptc.errors import CheckpointError, shown
from adaptc.methods import AdapterConfig, MethodPart

#: tensors that PEFT 0.21 writes into the directories of experts, with keys that it does not read
_OF_WHOLE_MODEL = "lora_model."


def has_parts(kind: type[AdapterConfig]) -> bool:
    """Return whether adapters with a config of this class may have parts."""
    return kind.parts is not AdapterConfig.parts


def read_experts(
    config: AdapterConfig,
    file: AdapterFile | None,
    weights: Mapping[str, Tensor],
    config_of: Callable[[AdapterFile], AdapterConfig],
) -> tuple[AdapterConfig, AdapterFile | None]:
    """Return ``config`` and ``file`` with the parts that ``config`` names, or unchanged where it names none.

    ``file`` is the adapter's own, None for a new adapter. ``weights`` are the model's, by name.
    """
    names = config.parts()
    if not names:
        return config, file
    parts: list[MethodPart] = []
    for i, (name, path) in enumerate(names.items()):
        part, source = _read(file, i, name, path)
        check_finite(part.tensors, source)
        parts.append(MethodPart(config_of(part), _without_base(part.tensors, weights, source), source))
    own = None if file is None else file.tensors
    new, tensors = config.with_parts(parts, own, list(weights))
    made: dict[str, Any] = new.to_dict()
    if file is None:
        return new, AdapterFile(made, tensors, Path(parts[0].source).parent, fresh=True)
    return new, replace(file, config=made, tensors=tensors, runs=())


def _without_base(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """Return ``tensors`` without the base weights that PEFT writes beside adapted embeddings.

    Raises CheckpointError where they differ from the model's weights, since all parts share one base.
    """
    out = dict(tensors)
    for key, tensor in tensors.items():
        base = weights.get(base_name(key))
        if base is not None:
            if base.shape != tensor.shape or not torch.equal(base.detach(), tensor.to(base)):
                raise CheckpointError(
                    f"{source}: {key!r} is not the model's weight, and an adapter made of several has one base. "
                    "Write it without base weights (save_embedding_layers=False)"
                )
            del out[key]
    return out


def _read(file: AdapterFile | None, i: int, name: str, path: str) -> tuple[AdapterFile, str]:
    below = None if file is None else file.path / str(i)
    if below is not None and (below / CONFIG_NAME).is_file():
        try:
            part = read_adapter(below)
        except CheckpointError:
            if not Path(path).is_dir():
                raise
        else:
            if not any(k.startswith(_OF_WHOLE_MODEL) for k in part.tensors):
                return part, str(below)
    if not Path(path).is_dir():
        looked = shown(path) if below is None else f"{shown(str(below))} or {shown(path)}"
        raise CheckpointError(
            f"the adapter {name!r}, which this one is made of, is not in {looked}: write it there, or give a config "
            "whose paths are right"
        )
    return read_adapter(path), str(path)
