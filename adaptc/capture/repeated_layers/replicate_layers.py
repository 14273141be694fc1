"""Replicate layers: make a deeper model whose new layers share the weights of the layers that they repeat.

The new model's list holds the layers of the given ranges in order. Each layer is a module of its own over the same
parameters, so each can have its own adapter. The given model is untouched. This implements PEFT's
``LoraConfig.layer_replication`` (the depth up-scaling of SOLAR, https://arxiv.org/abs/2312.15166).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from adaptc.errors import ConfigError, short_repr

# Paths of the layer list, from the innermost backbone.
_LAYER_LISTS = ("layers", "h", "encoder.layer", "decoder.layers")


#: Attributes in which a layer's modules keep the layer's number, from 0 or 1; a KV cache is indexed by it.
LAYER_INDEX_NAMES = {
    "layer_idx",
    "layer_id",
    "layer_number",
    "layer_num",
    "layer_index",
    "block_idx",
    "block_id",
    "block_index",
}


#: the number of layers that any replicated model may have
MAX_LAYERS = 1024


def replicate_layers(model: nn.Module, ranges: Sequence[tuple[int, int]]) -> nn.Module:
    """Return a copy of ``model`` whose layer list is ``[layers[i] for start, end in ranges for i in range(start,
    end)]``.

    Parameters and buffers are the model's own objects; modules and the config are copies. ``layer_idx`` counts anew.
    The config's number of layers and its lists with an entry for each layer are adjusted.

    Raises :class:`ConfigError` when the list of layers is not found, or a range does not lie in it.
    """
    owner, name = _find_layer_list(model)
    layers = getattr(model.get_submodule(owner), name)
    count = len(layers)
    indices = _expand_ranges(ranges, count, f"{owner}.{name}".lstrip("."))

    memo = _tensor_sharing_memo(model)
    replica = copy.deepcopy(model, dict(memo))
    # Without this a copied layer would have a config of its own, which is not the new model's.
    configs = {id(c): c for m in replica.modules() if (c := getattr(m, "config", None)) is not None}
    stack = getattr(replica.get_submodule(owner), name)
    used: set[int] = set()
    restacked = []
    for i in indices:
        restacked.append(copy.deepcopy(stack[i], {**memo, **configs}) if i in used else stack[i])
        used.add(i)
    for position, (layer, source) in enumerate(zip(restacked, indices, strict=True)):
        for module in layer.modules():
            for name_of_index in LAYER_INDEX_NAMES & vars(module).keys():
                value = vars(module)[name_of_index]
                if type(value) is int:
                    setattr(module, name_of_index, value + position - source)
    setattr(replica.get_submodule(owner), name, nn.ModuleList(restacked))
    for config in configs.values():
        _update_layer_count(config, count, indices)
    return replica


def _find_layer_list(model: nn.Module) -> tuple[str, str]:
    """Return the path of the module that holds the layer list, and the list's name in it."""
    path: list[str] = []
    module = model
    while True:
        for candidate in _LAYER_LISTS:
            *parents, name = candidate.split(".")
            owner: Any = module
            for parent in parents:
                owner = getattr(owner, parent, None)
            if isinstance(getattr(owner, name, None), nn.ModuleList):
                return ".".join([*path, *parents]), name
        # A backbone is called `model`, or what its class says: `transformer`, `bert`, `gpt_neox`.
        prefixes = ("model", getattr(module, "base_model_prefix", ""), "bert")
        step = next((p for p in prefixes if p and isinstance(getattr(module, p, None), nn.Module)), None)
        if step is None or getattr(module, step) is module:
            break
        path.append(step)
        module = getattr(module, step)
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    where = ".".join(path) or "the model"
    raise ConfigError(
        f"layer_replication: no list of layers in {type(model).__name__}: looked for {', '.join(_LAYER_LISTS)} in "
        f"{where}. Its module lists are: {', '.join(lists) or 'none'}"
    )


def _expand_ranges(ranges: Sequence[tuple[int, int]], count: int, where: str) -> list[int]:
    indices: list[int] = []
    max_layers = max(MAX_LAYERS, 16 * count)
    for item in ranges:
        pair = tuple(item) if isinstance(item, (list, tuple)) else ()
        if len(pair) != 2 or not all(type(v) is int for v in pair) or not 0 <= pair[0] < pair[1] <= count:
            raise ConfigError(
                f"layer_replication: {short_repr(item)} is not a range (start, end) with 0 <= start < end <= {count}, "
                f"the number of layers in {where}"
            )
        indices.extend(range(*pair))
        if len(indices) > max_layers:
            raise ConfigError(
                f"layer_replication: {len(ranges)} ranges ask for more than {max_layers} layers, of a model with "
                f"{count}; each is a module of its own, which programs are not captured of in any useful time. Give "
                "fewer ranges."
            )
    if not indices:
        raise ConfigError("layer_replication: no range is given, so no layer would be left")
    return indices


def _tensor_sharing_memo(model: nn.Module) -> dict[int, Any]:
    """Return the memo by which ``copy.deepcopy`` shares every tensor of the model, registered or not."""
    tensors: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        tensors.update({id(v): v for v in vars(module).values() if isinstance(v, Tensor)})
    return tensors


def _update_layer_count(config: Any, count: int, indices: list[int]) -> None:
    if getattr(config, "num_hidden_layers", None) != count:
        return  # the config of another part, such as a vision tower
    for key, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == count and "layer" in key:
            setattr(config, key, type(value)(value[i] for i in indices))
    config.num_hidden_layers = len(indices)
