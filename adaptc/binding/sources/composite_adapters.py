"""Make one adapter in memory of an adapter and the others that it names, such as X-LoRA's experts.

The config names the other adapters, and the adapter may have a file of its own. The result has the tensors of all, and
a config that lists them. An error names an expert that is missing or does not fit.

An expert of X-LoRA is looked for below the file that names it, in a directory called by its number, as PEFT writes it.
If none there can be read as an adapter of its own, the expert is read from the path in the config. The adapters between
which Arrow routes lie beside its router, and were loaded with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.adapter_data import AdapterData, LoadedAdapter
from adaptc.adapter_files.directory import check_finite, read_adapter
from adaptc.adapter_files.format import CONFIG_NAME
from adaptc.binding.binding import ResolvedAdapter
from adaptc.binding.file_keys import base_weight_name
from adaptc.binding.sources.configs import loaded_config
from adaptc.errors import CheckpointError, short_repr
from adaptc.methods import ExpertAdapter, make_arrow_adapter, routed_adapter_names
from adaptc.methods.lora_family.arrow import ArrowConfig

#: tensors that PEFT 0.21 writes into the directories of experts, with keys that it does not read
_WHOLE_MODEL_PREFIX = "lora_model."


def join_routed(data: LoadedAdapter) -> AdapterData[Any]:
    """Return ``data`` with the tensors of the adapters that it routes between, or unchanged where it routes none.

    General adapters are subtracted from the others where the config says so, as PEFT does each time it loads one.
    """
    if not data.experts or data.config is None:
        return data
    tasks, general = (
        [ExpertAdapter(loaded_config(e.config), e.tensors, e.source) for e in map(data.experts.__getitem__, names)]
        for names in routed_adapter_names(data.config)
    )
    if not tasks:
        return data  # binding it raises the error
    arrow = ArrowConfig.from_value(data.config["arrow_config"])
    config, tensors = make_arrow_adapter(arrow, tasks, general)
    return data.with_config(config, tensors=tensors, experts={})


def join_experts(data: ResolvedAdapter, paths: Mapping[str, str], weights: Mapping[str, Tensor]) -> ResolvedAdapter:
    """Return ``data`` with the experts at the ``paths`` that its config gives by name; ``weights`` are the model's."""
    experts: list[ExpertAdapter] = []
    for i, (name, path) in enumerate(paths.items()):
        one = _read_expert(data, i, name, path)
        check_finite(one.tensors, one.source)
        experts.append(
            ExpertAdapter(loaded_config(one.config), _drop_base_weights(one.tensors, weights, one.source), one.source)
        )
    own = None if data.is_new else data.tensors
    config, tensors = data.config.with_experts(experts, own, list(weights))
    source = str(Path(experts[0].source).parent) if data.is_new else data.source
    return data.with_config(config, tensors=tensors, source=source)


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


def _read_expert(data: ResolvedAdapter, index: int, name: str, path: str) -> AdapterData[dict[str, Any]]:
    subdirectory = None if data.path is None else data.path / str(index)
    if subdirectory is not None and (subdirectory / CONFIG_NAME).is_file():
        try:
            expert = read_adapter(subdirectory)
        except CheckpointError:
            if not Path(path).is_dir():
                raise
        else:
            if not any(k.startswith(_WHOLE_MODEL_PREFIX) for k in expert.tensors):
                return expert
    if not Path(path).is_dir():
        looked = short_repr(path) if subdirectory is None else f"{short_repr(str(subdirectory))} or {short_repr(path)}"
        raise CheckpointError(
            f"the adapter {name!r}, which this one is made of, is not in {looked}: write it there, or give a config "
            "whose paths are right"
        )
    return read_adapter(path)
