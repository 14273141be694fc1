"""Convert adapter files in which every expert is a module of its own, for models that stack all experts in one
parameter.

transformers 5 keeps the experts of a mixture in two 3-D parameters, ``experts.gate_up_proj`` and ``experts.down_proj``.
Before, each expert had linear layers ``w1``, ``w3``, ``w2`` (Mixtral) or ``gate_proj``, ``up_proj``, ``down_proj``.
LoRA tensors of such layers become LoRA on the stacked parameters, exactly. The factors of gate and up become one of
twice the rank, with their B factors in diagonal blocks. PEFT converts such files, too.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.binding import ResolvedAdapter
from adaptc.binding.sources.configs import config_from_dict
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError
from adaptc.patterns import pattern_value
from adaptc.targets.expert_targets import EXPERT_LAYER_PARTS, STACKED_PARAMETERS
from adaptc.torch_typing import block_diag

_KEY = re.compile(rf"((.+)\.experts\.(\d+)\.({'|'.join(EXPERT_LAYER_PARTS)}))\.lora_([AB])\.weight")
_MIXTRAL_MOE = ".block_sparse_moe."  # Mixtral's, now ``.mlp.``

ExpertTensors = dict[tuple[int, str, str], Tensor]


def is_expert_key(key: str) -> bool:
    """Return whether ``key`` is that of a layer in a mixture of experts, of the old kind or the new."""
    return _MIXTRAL_MOE in key or ".experts." in key


def stack_old_experts(data: ResolvedAdapter, weights: Mapping[str, Tensor]) -> ResolvedAdapter:
    """Return ``data``, which has keys of experts, for the model with these weights.

    It is the same object when no key in it is of the old kind.

    Raises CheckpointError when an expert or a projection of a stacked parameter is missing. Raises ConfigError when the
    config gives single experts ranks or alphas of their own.
    """
    moe_modules: dict[str, ExpertTensors] = {}
    new_tensors: dict[str, Tensor] = {}
    old_modules: list[str] = []
    for key, tensor in data.tensors.items():
        match = _KEY.fullmatch(key)
        moe_module = _find_moe_module(match[2], weights) if match else None
        if match and moe_module is not None:
            moe_modules.setdefault(moe_module, {})[int(match[3]), EXPERT_LAYER_PARTS[match[4]], match[5]] = tensor
            old_modules.append(match[1])
        else:
            new = key.replace(_MIXTRAL_MOE, ".mlp.")
            known = _MIXTRAL_MOE in key and f"{new.partition('.lora_')[0]}.weight" in weights
            new_tensors[new if known else key] = tensor
    if not moe_modules:
        return data if new_tensors.keys() == data.tensors.keys() else data.with_config(data.config, tensors=new_tensors)
    converted = {
        name: {home for home, p in moe_modules.items() if _has_projection(p, parts)}
        for name, parts in STACKED_PARAMETERS.items()
    }
    for moe_module, pieces in moe_modules.items():
        mine = [name for name in STACKED_PARAMETERS if moe_module in converted[name]]
        for i, name in enumerate(mine):
            # In PEFT's models the first of two parameters has the inner wrapper.
            place = f"{moe_module}.experts" + ".base_layer" * (len(mine) - 1 - i)
            a, b = _stack_factors(
                pieces,
                STACKED_PARAMETERS[name],
                weights[f"{moe_module}.{name}"].shape[0],
                f"{data.source}: {moe_module}.experts",
            )
            new_tensors[f"{place}.lora_A.weight"], new_tensors[f"{place}.lora_B.weight"] = a, b
    config = _convert_config(data.config.to_dict(), old_modules, new_tensors, converted, weights)
    return data.with_config(config_from_dict(config), tensors=new_tensors)


def _find_moe_module(path: str, weights: Mapping[str, Tensor]) -> str | None:
    """Return the path of the module that holds ``experts`` in the model, or None where the experts of ``path`` are not
    stacked."""
    candidates = (path, f"{path}.".replace(_MIXTRAL_MOE, ".mlp.")[:-1])
    return next((c for c in candidates if any(f"{c}.{n}" in weights for n in STACKED_PARAMETERS)), None)


def _has_projection(tensors: ExpertTensors, projections: Collection[str]) -> bool:
    return any(part in projections for _, part, _ in tensors)


def _stack_factors(
    tensors: ExpertTensors, projections: tuple[str, ...], experts: int, location: str
) -> tuple[Tensor, Tensor]:
    """Return A (experts * r, in), ordered by expert, and B (out, r * experts), ordered by rank, as stacked parameters
    have."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for e in range(experts):
        for part in projections:
            if missing := [f"lora_{m}" for m in "AB" if (e, part, m) not in tensors]:
                raise CheckpointError(
                    f"{location}: {missing[0]} of the {part} projection of expert {e} is missing. An adapter fits a "
                    f"model that stacks its {experts} experts only if it has the {' and '.join(projections)} "
                    "projection of each."
                )
        downs += [tensors[e, part, "A"] for part in projections]
        ups.append(block_diag(*(tensors[e, part, "B"] for part in projections)))
    try:
        return torch.cat(downs), torch.stack(ups, -1).flatten(1)
    except RuntimeError as error:
        raise CheckpointError(f"{location}: the experts have factors of different shapes ({error})") from error


def _convert_config(
    config: Mapping[str, Any],
    old_modules: Collection[str],
    new_keys: Collection[str],
    converted: Mapping[str, Collection[str]],
    weights: Iterable[str],
) -> dict[str, Any]:
    new = dict(config)
    for option in ("rank_pattern", "alpha_pattern"):
        if any(pattern_value(config.get(option), name, None) is not None for name in old_modules):
            raise ConfigError(
                f"{option}={config[option]!r} speaks of layers of single experts, which this model stacks in one "
                "parameter; such an adapter cannot be converted."
            )
    modules = {k.partition(".lora_")[0] for k in new_keys if ".lora_" in k and ".experts" not in k}
    targets: Any = config.get("target_modules") or []
    if isinstance(targets, str):
        new["target_modules"] = sorted(modules)
    else:
        new["target_modules"] = [t for t in targets if any(f".{m}".endswith(f".{t}") for m in modules)]
    parameters = list(config.get("target_parameters") or [])
    for name, homes in converted.items():
        chosen = [f"{home}.{name}" for home in homes]
        everywhere = len(chosen) == sum(w.endswith(f".{name}") for w in weights)
        parameters += [name] if everywhere else sorted(chosen)
    new["target_parameters"] = parameters
    if converted["experts.gate_up_proj"]:
        rank, alpha = int(config.get("r", 8)), config.get("lora_alpha", 8)
        factor = sqrt(2) if config.get("use_rslora") else 2
        new["rank_pattern"] = {"experts.gate_up_proj": 2 * rank, **(config.get("rank_pattern") or {})}
        new["alpha_pattern"] = {"experts.gate_up_proj": factor * alpha, **(config.get("alpha_pattern") or {})}
    if config.get("lora_dropout"):
        warnings.warn(
            f"lora_dropout={config['lora_dropout']} of the file is dropped: stacked experts have no input to drop",
            AdaptcWarning,
            stacklevel=4,
        )
        new["lora_dropout"] = 0.0
    return new
