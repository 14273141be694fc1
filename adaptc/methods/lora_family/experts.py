"""Join LoRA adapters as experts along one axis of ranks, and split them again.

:func:`join_experts` takes configs and tensors of plain LoRA adapters, by PEFT's bare keys; their ranks may differ. For
each module it gives one A and one B with the ranks of all experts one after the other. For each rank it gives the
number of its expert (the owner) and the expert's scale. Errors name the adapter and the option or key.
:func:`split_experts` is the inverse.

So a site has one free size, the sum of the ranks, and nothing is padded. With h = A x, the experts together compute
B (w[owner] s h), where w is the router's weight of each expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError, listing, short_repr
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.method_parts import ExpertAdapter
from adaptc.methods._shared.name_patterns import default_and_pattern
from adaptc.methods.lora_family.lora import Lora

#: the slots of an expert, by their names in files -> their axis of ranks
RANK_AXES = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
#: further slots of the joined experts: the number of each rank's expert, and the scale of that expert
OWNER, SCALES = "lora_owner", "lora_scaling"

#: options with which an adapter holds more than the A and B that are joined
_UNSUPPORTED_OPTIONS = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "ensure_weight_tying",
    "use_bdlora",
)


@dataclass(frozen=True, eq=False)
class JoinedExperts:
    """The joined tensors of several LoRA adapters.

    ``tensors``: ``<module>.<slot>``, with ``ranks[module]`` entries along its axis of ranks; ``<module>.lora_owner``
    (ranks,), int64; ``<module>.lora_scaling`` (ranks,), float64. ``ranks[module]`` is the sum of the experts' ranks
    there. ``count``: the number of experts.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    ranks: Mapping[str, int]
    count: int


def join_experts(experts: Sequence[ExpertAdapter], method_name: str, *, same_modules: bool = False) -> JoinedExperts:
    """Join the experts in the given order.

    ``method_name``: the method that needs them, for messages. ``same_modules``: all must adapt the same modules. Raises
    ConfigError for no adapters and for adapters that are not plain LoRA, CheckpointError for tensors that do not fit
    together.
    """
    if not experts:
        raise ConfigError(f"{method_name} needs the directory of at least one LoRA adapter, and there is none")
    sites_by_expert = [_sites_by_module(e, method_name) for e in experts]
    modules = dict.fromkeys(m for one in sites_by_expert for m in one)
    if same_modules:
        for e, one in zip(experts, sites_by_expert, strict=True):
            if lacking := [m for m in modules if m not in one]:
                other = next(o.source for o, has in zip(experts, sites_by_expert, strict=True) if lacking[0] in has)
                raise CheckpointError(
                    f"{method_name}: {e.source} has nothing at {listing(map(repr, lacking), 3)}, where {other} has an "
                    "adapter; all of them must be of the same modules"
                )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in modules:
        own = [
            (i, e, one[module])
            for i, (e, one) in enumerate(zip(experts, sites_by_expert, strict=True))
            if module in one
        ]
        ranks[module] = sum(s.rank for _, _, s in own)
        tensors |= _join_module(module, own)
    return JoinedExperts(tensors, ranks, len(experts))


def split_experts(
    joined_tensors: Mapping[str, Tensor], config: TargetedConfig, count: int
) -> list[tuple[TargetedConfig, dict[str, Tensor]]]:
    """Split :attr:`Experts.tensors` into its ``count`` experts, each a config and tensors of its own.

    ``config``: a plain LoRA config with the options that the experts share; ranks and alphas are filled in. At a module
    all experts get the largest of their ranks, padded with zeros, since PEFT routes only between adapters of one rank.
    """
    owners = {k.removesuffix(f".{OWNER}"): t for k, t in joined_tensors.items() if k.endswith(f".{OWNER}")}
    max_ranks = {m: max(int((t == i).sum()) for i in range(count)) for m, t in owners.items()}
    out = []
    for i in range(count):
        tensors: dict[str, Tensor] = {}
        alphas: dict[str, float | int] = {}
        for module, owner in owners.items():
            mine = (owner == i).nonzero().flatten()
            if not len(mine):
                continue
            alphas[module] = _round_alpha(float(joined_tensors[f"{module}.{SCALES}"][mine[0]]) * max_ranks[module])
            for name, axis in RANK_AXES.items():
                if (t := joined_tensors.get(f"{module}.{name}")) is not None:
                    tensors[f"{module}.{name}"] = _pad_axis(t.index_select(axis, mine), axis, max_ranks[module])
        r, ranks = default_and_pattern({m: max_ranks[m] for m in alphas})
        alpha, others = default_and_pattern(alphas)
        own: dict[str, Any] = {"r": r, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": others}
        out.append((config.replace(**own, use_rslora=False), tensors))
    return out


def _pad_axis(t: Tensor, axis: int, size: int) -> Tensor:
    room = list(t.shape)
    room[axis] = size - t.shape[axis]
    return torch.cat([t, t.new_zeros(room)], axis).contiguous()


@dataclass(frozen=True, eq=False)
class _ExpertSite:
    slots: Mapping[str, Tensor]
    scale: float
    rank: int


def _sites_by_module(expert: ExpertAdapter, method_name: str) -> dict[str, _ExpertSite]:
    """Return the sites of one adapter by module; raise ConfigError or CheckpointError where it is not plain LoRA."""
    config = expert.config
    if not isinstance(config, TargetedConfig) or type(method := _method_at(config, "")) is not Lora:
        kind = config.peft_type if not isinstance(config, TargetedConfig) else _method_at(config, "").name
        raise ConfigError(
            f"{method_name} is of plain LoRA adapters, and {expert.source} is one of {kind!r}; leave it out"
        )
    said = [o for o in _UNSUPPORTED_OPTIONS if getattr(config, o)] + (["bias"] if config.bias != "none" else [])
    said += [
        o for o, on in (("lora_bias", method.with_bias), ("init_lora_weights", method.changes_base_at_init())) if on
    ]
    if said:
        raise ConfigError(
            f"{method_name} is of plain LoRA adapters, and {expert.source} has "
            f"{said[0]}={short_repr(getattr(config, said[0]))}, which is more than what it adds at its layers; leave "
            "it out, or train it without"
        )
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in expert.tensors.items():
        name = next((n for n in RANK_AXES if key.endswith(f".{n}")), None)
        if name is None:
            raise CheckpointError(f"{method_name}: {expert.source} has {key!r}, which is no tensor of plain LoRA")
        slots.setdefault(key.removesuffix(f".{name}"), {})[name] = tensor.detach()
    if not slots:
        raise CheckpointError(f"{method_name}: {expert.source} has no tensors")
    return {m: _make_site(expert, m, own) for m, own in slots.items()}


def _make_site(expert: ExpertAdapter, module: str, slots: Mapping[str, Tensor]) -> _ExpertSite:
    method = _method_at(expert.config, module)
    rank = method.r
    sizes = [t.shape[RANK_AXES[n]] if t.ndim > 1 else None for n, t in slots.items()]
    if len(slots) != 2 or sizes != [rank, rank]:
        told = ", ".join(f"{n} {tuple(t.shape)}" for n, t in slots.items())
        raise CheckpointError(
            f"{expert.source}: {module!r} has {told}; expected an A and a B of rank {rank} by its config"
        )
    return _ExpertSite(slots, method.scale(None), rank)  # type: ignore[arg-type]  # it does not look at the op


def _method_at(config: Any, module: str) -> Any:
    return config.method(module, "linear")


def _join_module(module: str, expert_sites: Sequence[tuple[int, ExpertAdapter, _ExpertSite]]) -> dict[str, Tensor]:
    _, first, like = expert_sites[0]
    out: dict[str, Tensor] = {}
    for name, reference in like.slots.items():
        axis = RANK_AXES[name]
        for _, e, site in expert_sites[1:]:
            value = site.slots.get(name)
            if value is None or _other_sizes(value, axis) != _other_sizes(reference, axis):
                raise CheckpointError(
                    f"'{module}.{name}' of {e.source}: expected the shape {tuple(reference.shape)} of "
                    f"{first.source} but for the rank, found {None if value is None else tuple(value.shape)}: they are "
                    "of different models"
                )
        parts = [site.slots[name].to(reference.device) for _, _, site in expert_sites]
        out[f"{module}.{name}"] = torch.cat(parts, axis)
    ranks = torch.tensor([s.rank for _, _, s in expert_sites])
    out[f"{module}.{OWNER}"] = torch.tensor([i for i, _, _ in expert_sites]).repeat_interleave(ranks)
    scales = torch.tensor([s.scale for _, _, s in expert_sites], dtype=torch.float64)
    out[f"{module}.{SCALES}"] = scales.repeat_interleave(ranks)
    return out


def _other_sizes(t: Tensor, axis: int) -> list[int]:
    return [n for i, n in enumerate(t.shape) if i != axis]


def _round_alpha(alpha: float) -> float | int:
    """Return an alpha as an integer where only rounding makes it differ: most files have whole numbers."""
    near = round(alpha)
    return near if abs(alpha - near) <= 1e-6 * max(abs(alpha), 1) else alpha
