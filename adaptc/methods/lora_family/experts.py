"""Join LoRA adapters as experts along one axis of ranks, and split them again.

:func:`side_by_side` takes configs and tensors of plain LoRA adapters, by PEFT's bare keys; their ranks may differ. For
each module it gives one A and one B with the ranks of all experts one after the other. For each rank it gives the
number of its expert (the owner) and the expert's scale. Errors name the adapter and the option or key. :func:`apart`
is the inverse.

So a site has one free size, the sum of the ranks, and nothing is padded. With h = A x, the experts together compute
B (w[owner] s h), where w is the router's weight of each expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError, listing, shown
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.method_parts import MethodPart
from adaptc.methods._shared.name_patterns import value_table
from adaptc.methods.lora_family.lora import Lora

#: the slots of an expert, by their names in files -> their axis of ranks
AXES = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
#: further slots of the joined experts: the number of each rank's expert, and the scale of that expert
OWNER, SCALES = "lora_owner", "lora_scaling"

#: options with which an adapter holds more than the A and B that are joined
_MORE = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "ensure_weight_tying")


@dataclass(frozen=True, eq=False)
class Experts:
    """The joined tensors of several LoRA adapters.

    ``tensors``: ``<module>.<slot>``, with ``ranks[module]`` entries along its axis of ranks; ``<module>.lora_owner``
    (ranks,), int64; ``<module>.lora_scaling`` (ranks,), float64. ``ranks[module]`` is the sum of the experts' ranks
    there. ``count``: the number of experts.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    ranks: Mapping[str, int]
    count: int


def side_by_side(experts: Sequence[MethodPart], what: str, *, alike: bool = False) -> Experts:
    """Join the experts in the given order.

    ``what``: the method that needs them, for messages. ``alike``: all must adapt the same modules. Raises ConfigError
    for no adapters and for adapters that are not plain LoRA, CheckpointError for tensors that do not fit together.
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
        own = [(i, e, one[module]) for i, (e, one) in enumerate(zip(experts, found, strict=True)) if module in one]
        ranks[module] = sum(s.rank for _, _, s in own)
        tensors |= _joined(module, own)
    return Experts(tensors, ranks, len(experts))


def apart(
    joined: Mapping[str, Tensor], config: TargetedConfig, count: int
) -> list[tuple[TargetedConfig, dict[str, Tensor]]]:
    """Split :attr:`Experts.tensors` into its ``count`` experts, each a config and tensors of its own.

    ``config``: a plain LoRA config with the options that the experts share; ranks and alphas are filled in. At a module
    all experts get the largest of their ranks, padded with zeros, since PEFT routes only between adapters of one rank.
    """
    owners = {k.removesuffix(f".{OWNER}"): t for k, t in joined.items() if k.endswith(f".{OWNER}")}
    most = {m: max(int((t == i).sum()) for i in range(count)) for m, t in owners.items()}
    out = []
    for i in range(count):
        tensors: dict[str, Tensor] = {}
        alphas: dict[str, float | int] = {}
        for module, owner in owners.items():
            mine = (owner == i).nonzero().flatten()
            if not len(mine):
                continue
            alphas[module] = _number(float(joined[f"{module}.{SCALES}"][mine[0]]) * most[module])
            for name, axis in AXES.items():
                if (t := joined.get(f"{module}.{name}")) is not None:
                    tensors[f"{module}.{name}"] = _lengthened(t.index_select(axis, mine), axis, most[module])
        r, ranks = value_table({m: most[m] for m in alphas})
        alpha, others = value_table(alphas)
        own: dict[str, Any] = {"r": r, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": others}
        out.append((config.replace(**own, use_rslora=False), tensors))
    return out


def _lengthened(t: Tensor, axis: int, size: int) -> Tensor:
    room = list(t.shape)
    room[axis] = size - t.shape[axis]
    return torch.cat([t, t.new_zeros(room)], axis).contiguous()


@dataclass(frozen=True, eq=False)
class _Site:
    slots: Mapping[str, Tensor]
    scale: float
    rank: int


def _modules(e: MethodPart, what: str) -> dict[str, _Site]:
    """Return the sites of one adapter by module; raise ConfigError or CheckpointError where it is not plain LoRA."""
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


def _site(e: MethodPart, module: str, slots: Mapping[str, Tensor]) -> _Site:
    method = _method(e.config, module)
    rank = method.r
    sizes = [t.shape[AXES[n]] if t.ndim > 1 else None for n, t in slots.items()]
    if len(slots) != 2 or sizes != [rank, rank]:
        told = ", ".join(f"{n} {tuple(t.shape)}" for n, t in slots.items())
        raise CheckpointError(f"{e.source}: {module!r} has {told}; expected an A and a B of rank {rank} by its config")
    return _Site(slots, method.scale(None), rank)  # type: ignore[arg-type]  # it does not look at the op


def _method(config: Any, module: str) -> Any:
    return config.method(module, "linear")


def _joined(module: str, own: Sequence[tuple[int, MethodPart, _Site]]) -> dict[str, Tensor]:
    _, first, like = own[0]
    out: dict[str, Tensor] = {}
    for name, reference in like.slots.items():
        axis = AXES[name]
        for _, e, site in own[1:]:
            value = site.slots.get(name)
            if value is None or _beside(value, axis) != _beside(reference, axis):
                raise CheckpointError(
                    f"'{module}.{name}' of {e.source}: expected the shape {tuple(reference.shape)} of "
                    f"{first.source} but for the rank, found {None if value is None else tuple(value.shape)}: they are "
                    "of different models"
                )
        parts = [site.slots[name].to(reference.device) for _, _, site in own]
        out[f"{module}.{name}"] = torch.cat(parts, axis)
    ranks = torch.tensor([s.rank for _, _, s in own])
    out[f"{module}.{OWNER}"] = torch.tensor([i for i, _, _ in own]).repeat_interleave(ranks)
    scales = torch.tensor([s.scale for _, _, s in own], dtype=torch.float64)
    out[f"{module}.{SCALES}"] = scales.repeat_interleave(ranks)
    return out


def _beside(t: Tensor, axis: int) -> list[int]:
    return [n for i, n in enumerate(t.shape) if i != axis]


def _number(alpha: float) -> float | int:
    """Return an alpha as an integer where only rounding makes it differ: most files have whole numbers."""
    near = round(alpha)
    return near if abs(alpha - near) <= 1e-6 * max(abs(alpha), 1) else alpha
