"""Give an adapter the layers of the model that an engine serves, exactly: q, k and v as one layer, or one as three.

An engine looks LoRA up by the names of the model's own layers. An adapter may have been trained on a copy of the model
in which ``qkv_proj`` was three layers, or three were one. The change of the fused layer has the changes of its parts as
blocks of rows: B is block-diagonal, A has the rows of all A, and the rank is the sum. Parts whose A is equal share it.
The parts of a fused layer each take their rows of B, and the same A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from adaptc.adapters.combining.adapter_sites import AdapterSite
from adaptc.engines.model_layers import ModelLayerSizes
from adaptc.errors import ConfigError, listing
from adaptc.passes.protocol.parts.low_rank import LowRank

#: fused layer -> its parts, in the order of their rows
PARTS: Mapping[str, Sequence[str]] = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
)
#: model type -> its fused layers whose rows are those of the parts one after another, as transformers computes them
FUSED_FAMILIES: Mapping[str, Sequence[str]] = MappingProxyType(
    {"phi3": ("qkv_proj", "gate_up_proj"), "glm": ("gate_up_proj",), "glm4": ("gate_up_proj",)}
)

#: the sites of an adapter, and their changes, by the prefix of their keys
Changes = tuple[dict[str, AdapterSite], dict[str, LowRank]]


def with_layers_of(
    source: str, sites: Mapping[str, AdapterSite], changes: Mapping[str, LowRank], model: ModelLayerSizes
) -> Changes:
    """Return the changes at the layers that the model has, where it has those of the adapter fused or split.

    Layers that the model has, and those that it has in neither form, stay. Raises ConfigError where sizes do not fit,
    or the model's fused layer is of another order.
    """
    new_sites, new_changes = dict(sites), dict(changes)
    for key, site in sites.items():
        parent, _, name = key.rpartition(".")
        if key in model.sizes or not site.is_module or key not in new_sites:
            continue
        fused = next((f for f, parts in PARTS.items() if name in parts), None)
        if fused is not None and _join(parent, fused) in model.sizes:
            keys = [_join(parent, part) for part in PARTS[fused]]
            target, made = _fuse(source, parent, fused, {k: changes[k] for k in keys if k in changes}, model)
            _replace(new_sites, new_changes, [k for k in keys if k in sites], {target: made}, site)
        elif name in PARTS and all(_join(parent, part) in model.sizes for part in PARTS[name]):
            made_by_part = _split(source, key, parent, changes[key], PARTS[name], model)
            _replace(new_sites, new_changes, [key], made_by_part, site)
    return new_sites, new_changes


def with_siblings(
    sites: Mapping[str, AdapterSite], changes: Mapping[str, LowRank], pairs: Mapping[str, str], model: ModelLayerSizes
) -> Changes:
    """Return the changes with one of zero at each layer that an engine wants beside another: layer -> the other."""
    new_sites, new_changes = dict(sites), dict(changes)
    for name, other in pairs.items():
        for key in list(new_sites):
            parent, _, last = key.rpartition(".")
            missing = _join(parent, other)
            if last != name or missing in new_sites or not new_sites[key].is_module:
                continue
            rows, columns = model.sizes.get(missing, (0, 0))
            rows = rows or model.part_rows(other)
            change = new_changes[key]
            if rows and columns in (0, change.shape[2]):
                zero = LowRank(change.down, change.up.new_zeros(1, rows, change.rank))
                _replace(new_sites, new_changes, [], {missing: zero}, new_sites[key])
    return new_sites, new_changes


def _fuse(
    source: str, parent: str, fused: str, parts: Mapping[str, LowRank], model: ModelLayerSizes
) -> tuple[str, LowRank]:
    target = _join(parent, fused)
    if fused not in FUSED_FAMILIES.get(model.model_type, ()):
        raise ConfigError(
            f"{source}: {next(iter(parts))!r} is a part of the model's {target!r}. The order of its rows is known for "
            f"{listing(FUSED_FAMILIES)}, and not for {model.model_type}: train the adapter on the model's own layers"
        )
    rows = {}
    for part in PARTS[fused]:
        change = parts.get(_join(parent, part))
        rows[part] = model.part_rows(part) if change is None else change.shape[1]
    expected, found = model.sizes[target][0], sum(rows.values())
    if not all(rows.values()) or (expected and found != expected):
        described = ", ".join(f"{part} {n or 'unknown'}" for part, n in rows.items())
        raise ConfigError(f"{source}: {target!r} has {expected} rows in the model, and its parts have {described}")
    downs: list[Tensor] = []
    blocks: list[tuple[int, int, Tensor]] = []  # first row, which A, B with its scale
    biases, start = [], 0
    for part, count in rows.items():
        change = parts.get(_join(parent, part))
        if change is not None:
            same = next((i for i, d in enumerate(downs) if torch.equal(d, change.down)), len(downs))
            downs += [change.down] if same == len(downs) else []
            blocks.append((start, same, change.up * change.scale))
        bias = None if change is None or change.bias is None else change.bias * change.scale
        biases.append(torch.zeros(count) if bias is None else bias)
        start += count
    offsets = [sum(d.shape[1] for d in downs[:i]) for i in range(len(downs) + 1)]
    up = blocks[0][2].new_zeros(1, start, offsets[-1])
    for first, which, block in blocks:
        up[:, first : first + block.shape[1], offsets[which] : offsets[which + 1]] = block
    has_bias = any(c.bias is not None for c in parts.values())
    return target, LowRank(torch.cat(downs, 1), up, bias=torch.cat(biases).to(up.dtype) if has_bias else None)


def _split(
    source: str, key: str, parent: str, change: LowRank, parts: Sequence[str], model: ModelLayerSizes
) -> dict[str, LowRank]:
    rows = [model.sizes[_join(parent, part)][0] or model.part_rows(part) for part in parts]
    if sum(rows) != change.shape[1] or not all(rows):
        described = ", ".join(f"{part} {n or 'unknown'}" for part, n in zip(parts, rows, strict=True))
        raise ConfigError(
            f"{source}: {key!r} changes {change.shape[1]} rows, and in the model its parts have {described}"
        )
    ups = change.up.split(rows, 1)
    biases = [None] * len(parts) if change.bias is None else change.bias.split(rows)
    return {
        _join(parent, part): replace(change, up=up, bias=bias)
        for part, up, bias in zip(parts, ups, biases, strict=True)
    }


def _replace(
    sites: dict[str, AdapterSite],
    changes: dict[str, LowRank],
    old_keys: Sequence[str],
    made: Mapping[str, LowRank],
    like: AdapterSite,
) -> None:
    """Put new changes in the place of old ones. Their sites have the method of ``like``."""
    for key in old_keys:
        del sites[key], changes[key]
    for key, change in made.items():
        tensors = {"lora_A.weight": change.down[0], "lora_B.weight": change.up[0]}
        sites[key] = AdapterSite(key, like.method, [key], True, tensors)
        changes[key] = change


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}".removeprefix(".")
