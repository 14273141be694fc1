"""Gather adapters that are made of others with files of their own, such as X-LoRA's experts, into one file in memory.

The config names the other adapters, and the adapter may have a file of its own. The result has the tensors of all, and
a config that lists them. An error names an expert that is missing or does not fit.

An expert is looked for below the file that names it, in a directory called by its number, as PEFT writes it. If none
there can be read as an adapter of its own, the expert is read from the path in the config.
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
from adaptc.binding.file_keys import base_weight_name
from adaptc.errors import CheckpointError, short_repr
from adaptc.methods import AdapterConfig, ExpertAdapter

#: tensors that PEFT 0.21 writes into the directories of experts, with keys that it does not read
_WHOLE_MODEL_PREFIX = "lora_model."


def may_have_experts(config_class: type[AdapterConfig]) -> bool:
    """Return whether adapters with a config of this class may have experts."""
    return config_class.expert_paths is not AdapterConfig.expert_paths


def read_experts(
    config: AdapterConfig,
    file: AdapterFile | None,
    weights: Mapping[str, Tensor],
    read_config: Callable[[AdapterFile], AdapterConfig],
) -> tuple[AdapterConfig, AdapterFile | None]:
    """Return ``config`` and ``file`` with the experts that ``config`` names, or unchanged where it names none.

    ``file`` is the adapter's own, None for a new adapter. ``weights`` are the model's, by name.
    """
    names = config.expert_paths()
    if not names:
        return config, file
    experts: list[ExpertAdapter] = []
    for i, (name, path) in enumerate(names.items()):
        part, source = _read_expert(file, i, name, path)
        check_finite(part.tensors, source)
        experts.append(ExpertAdapter(read_config(part), _drop_base_weights(part.tensors, weights, source), source))
    own = None if file is None else file.tensors
    new, tensors = config.with_experts(experts, own, list(weights))
    made: dict[str, Any] = new.to_dict()
    if file is None:
        return new, AdapterFile(made, tensors, Path(experts[0].source).parent, is_new=True)
    return new, replace(file, config=made, tensors=tensors, flat_tensors=())


def _drop_base_weights(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str
) -> Mapping[str, Tensor]:
    """Return ``tensors`` without the base weights that PEFT writes beside adapted embeddings.

    Raises CheckpointError where they differ from the model's weights, since all experts share one base.
    """
    kept = dict(tensors)
    for key, tensor in tensors.items():
        base = weights.get(base_weight_name(key))
        if base is not None:
            if base.shape != tensor.shape or not torch.equal(base.detach(), tensor.to(base)):
                raise CheckpointError(
                    f"{source}: {key!r} is not the model's weight, and an adapter made of several has one base. "
                    "Write it without base weights (save_embedding_layers=False)"
                )
            del kept[key]
    return kept


def _read_expert(file: AdapterFile | None, index: int, name: str, path: str) -> tuple[AdapterFile, str]:
    subdirectory = None if file is None else file.path / str(index)
    if subdirectory is not None and (subdirectory / CONFIG_NAME).is_file():
        try:
            part = read_adapter(subdirectory)
        except CheckpointError:
            if not Path(path).is_dir():
                raise
        else:
            if not any(k.startswith(_WHOLE_MODEL_PREFIX) for k in part.tensors):
                return part, str(subdirectory)
    if not Path(path).is_dir():
        looked = short_repr(path) if subdirectory is None else f"{short_repr(str(subdirectory))} or {short_repr(path)}"
        raise CheckpointError(
            f"the adapter {name!r}, which this one is made of, is not in {looked}: write it there, or give a config "
            "whose paths are right"
        )
    return read_adapter(path), str(path)
