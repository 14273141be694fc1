"""Several LoRA adapters side by side, as experts: tensors with an axis of experts in front.

Before: configs and tensors of plain LoRA adapters, by PEFT's bare keys, of ranks that may differ. After: for each
module one tensor of all its experts per slot, with smaller ranks filled up with zeros, which leaves an expert as it is,
and the scales of the experts; or an error that names the adapter and the option or key. :func:`apart` is the inverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError, listing, shown
from adaptc.methods._config import AdapterConfig, TargetedConfig
from adaptc.methods._name_patterns import value_table
from adaptc.methods.lora import Lora

#: the slots of an expert, by their names in files, and their axis of ranks
AXES = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
#: the scales of a module's experts, beside these
SCALES = "lora_scaling"

#: options with which an adapter is more than the products that are stacked
_MORE = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "ensure_weight_tying")


@dataclass(frozen=True, eq=False)
class Expert:
    """One adapter: its config, its tensors by bare keys, and what it is called in messages."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor] = field(repr=False)
    source: str


@dataclass(frozen=True, eq=False)
class Experts:
    """``tensors``: ``<module>.<slot>`` -> (experts, *slot), of rank ``ranks[module]``, and ``<module>.lora_scaling`` ->
    (experts,) in float64. Of a module that an expert lacks, its slots and its scale are zero."""

    tensors: Mapping[str, Tensor] = field(repr=False)
    ranks: Mapping[str, int]
    count: int


def side_by_side(experts: Sequence[Expert], what: str, *, alike: bool = False) -> Experts:
    """The experts, in their order. ``what``: who wants them, for messages. ``alike``: all must have the same modules.

    Raises ConfigError for adapters that are not plain LoRA, CheckpointError for tensors that do not go together.
    """
    if not experts:
        raise ConfigError(f"{what} needs the directory of at least one LoRA adapter, and there is none")
    found = [_modules(e, what) for e in experts]
    modules = dict.fromkeys(m for one in found for m in one)
    if alike:
        for e, one in zip(experts, found, strict=True):
            if lacking := [m for m in modules if m not in one]:
                other = next(o.source for o, has in zip(experts, found, strict=True) if lacking[0] in has)
                raise CheckpointError(
                    f"{what}: {e.source} has nothing at {listing(map(repr, lacking), 3)}, where {other} has an "
                    "adapter; all of them must be of the same modules"
                )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in modules:
        own = [one.get(module) for one in found]
        ranks[module] = max(s.rank for s in own if s is not None)
        tensors |= _stacked(module, experts, own, ranks[module])
    return Experts(tensors, ranks, len(experts))


def apart(stacked: Mapping[str, Tensor], config: TargetedConfig) -> list[tuple[TargetedConfig, dict[str, Tensor]]]:
    """The experts of a stack as adapters of their own, all of the rank of the stack. ``config``: plain LoRA with what
    they have in common: its targets and ranks; their alphas follow from the scales."""
    scales = {k.removesuffix(f".{SCALES}"): t for k, t in stacked.items() if k.endswith(f".{SCALES}")}
    out = []
    for i in range(len(next(iter(scales.values())))):
        tensors = {k: t[i].contiguous() for k, t in stacked.items() if not k.endswith(f".{SCALES}")}
        ranks = {m: _method(config, m).rank() or 1 for m in scales}
        alpha, others = value_table({m: _number(float(t[i]) * ranks[m]) for m, t in scales.items()})
        out.append((config.replace(lora_alpha=alpha, alpha_pattern=others, use_rslora=False), tensors))
    return out


@dataclass(frozen=True, eq=False)
class _Site:
    slots: Mapping[str, Tensor]
    scale: float
    rank: int


def _modules(e: Expert, what: str) -> dict[str, _Site]:
    """The sites of one adapter by module."""
    config = e.config
    if not isinstance(config, TargetedConfig) or type(method := _method(config, "")) is not Lora:
        kind = config.peft_type if not isinstance(config, TargetedConfig) else _method(config, "").name
        raise ConfigError(f"{what} is of plain LoRA adapters, and {e.source} is one of {kind!r}; leave it out")
    said = [o for o in _MORE if getattr(config, o)] + (["bias"] if config.bias != "none" else [])
    said += [o for o, on in (("lora_bias", method.with_bias), ("init_lora_weights", method.moves_base())) if on]
    if said:
        raise ConfigError(
            f"{what} is of plain LoRA adapters, and {e.source} has {said[0]}={shown(getattr(config, said[0]))}, which "
            "is more than what it adds at its layers; leave it out, or train it without"
        )
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in e.tensors.items():
        name = next((n for n in AXES if key.endswith(f".{n}")), None)
        if name is None:
            raise CheckpointError(f"{what}: {e.source} has {key!r}, which is no tensor of plain LoRA")
        slots.setdefault(key.removesuffix(f".{name}"), {})[name] = tensor.detach()
    if not slots:
        raise CheckpointError(f"{what}: {e.source} has no tensors")
    return {m: _site(e, m, own) for m, own in slots.items()}


def _site(e: Expert, module: str, slots: Mapping[str, Tensor]) -> _Site:
    method = _method(e.config, module)
    rank = method.r
    sizes = [t.shape[AXES[n]] if t.ndim > 1 else None for n, t in slots.items()]
    if len(slots) != 2 or sizes != [rank, rank]:
        told = ", ".join(f"{n} {tuple(t.shape)}" for n, t in slots.items())
        raise CheckpointError(f"{e.source}: {module!r} has {told}; expected an A and a B of rank {rank} by its config")
    return _Site(slots, method.scale(None), rank)  # type: ignore[arg-type]  # it does not look at the op


def _method(config: Any, module: str) -> Any:
    return config.method(module, "linear")


def _stacked(module: str, experts: Sequence[Expert], own: Sequence[_Site | None], rank: int) -> dict[str, Tensor]:
    first, like = next((e, s) for e, s in zip(experts, own, strict=True) if s is not None)
    out: dict[str, Tensor] = {}
    for name, reference in like.slots.items():
        axis = AXES[name]
        shape = [rank if i == axis else n for i, n in enumerate(reference.shape)]
        present = [s.slots.get(name) for s in own if s is not None]
        dtype = reference.dtype
        for t in present:
            dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
        made = torch.zeros(len(own), *shape, dtype=dtype, device=reference.device)
        for i, (e, site) in enumerate(zip(experts, own, strict=True)):
            if site is None:
                continue
            value = site.slots.get(name)
            if value is None or [n for j, n in enumerate(value.shape) if j != axis] != [
                n for j, n in enumerate(reference.shape) if j != axis
            ]:
                raise CheckpointError(
                    f"'{module}.{name}' of {e.source}: expected the shape {tuple(reference.shape)} of "
                    f"{first.source} but for the rank, found {None if value is None else tuple(value.shape)}: they are "
                    "of different models"
                )
            made[i].narrow(axis, 0, site.rank).copy_(value)
        out[f"{module}.{name}"] = made
    scales = [0.0 if s is None else s.scale for s in own]
    out[f"{module}.{SCALES}"] = torch.tensor(scales, dtype=torch.float64)
    return out


def _number(alpha: float) -> float | int:
    """As it was written, where rounding alone is between: files have whole numbers mostly."""
    near = round(alpha)
    return near if abs(alpha - near) <= 1e-6 * max(abs(alpha), 1) else alpha
