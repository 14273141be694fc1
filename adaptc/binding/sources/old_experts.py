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
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.directory import AdapterFile
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError
from adaptc.methods import pattern_value
from adaptc.targets.expert_targets import PARTS, STACKED

_KEY = re.compile(rf"((.+)\.experts\.(\d+)\.({'|'.join(PARTS)}))\.lora_([AB])\.weight")
_OLD_NAME = ".block_sparse_moe."  # Mixtral's, now ``.mlp.``

Pieces = dict[tuple[int, str, str], Tensor]


def stack_old_experts(file: AdapterFile, weights: Mapping[str, Tensor]) -> AdapterFile:
    """Return ``file`` for the model with these weights, or the same object when no key in it is of the old kind.

    Raises CheckpointError when an expert or a projection of a stacked parameter is missing. Raises ConfigError when the
    file gives single experts ranks or alphas of their own.
    """
    homes: dict[str, Pieces] = {}
    rest: dict[str, Tensor] = {}
    old: list[str] = []
    for key, tensor in file.tensors.items():
        match = _KEY.fullmatch(key)
        home = _home(match[2], weights) if match else None
        if match and home is not None:
            homes.setdefault(home, {})[int(match[3]), PARTS[match[4]], match[5]] = tensor
            old.append(match[1])
        else:
            new = key.replace(_OLD_NAME, ".mlp.")
            known = _OLD_NAME in key and f"{new.partition('.lora_')[0]}.weight" in weights
            rest[new if known else key] = tensor
    if not homes:
        return file if rest.keys() == file.tensors.keys() else replace(file, tensors=rest)
    made = {name: {home for home, p in homes.items() if _has(p, parts)} for name, parts in STACKED.items()}
    for home, pieces in homes.items():
        mine = [name for name in STACKED if home in made[name]]
        for i, name in enumerate(mine):
            # In PEFT's models the first of two parameters has the inner wrapper.
            place = f"{home}.experts" + ".base_layer" * (len(mine) - 1 - i)
            a, b = _stack(pieces, STACKED[name], weights[f"{home}.{name}"].shape[0], f"{file.path}: {home}.experts")
            rest[f"{place}.lora_A.weight"], rest[f"{place}.lora_B.weight"] = a, b
    return replace(file, tensors=rest, config=_config(file.config, old, rest, made, weights))


def _home(path: str, weights: Mapping[str, Tensor]) -> str | None:
    """Return the path of the module that holds ``experts`` in the model, or None where the experts of ``path`` are not
    stacked."""
    candidates = (path, f"{path}.".replace(_OLD_NAME, ".mlp.")[:-1])
    return next((c for c in candidates if any(f"{c}.{n}" in weights for n in STACKED)), None)


def _has(pieces: Pieces, parts: Collection[str]) -> bool:
    return any(part in parts for _, part, _ in pieces)


def _stack(pieces: Pieces, parts: tuple[str, ...], experts: int, where: str) -> tuple[Tensor, Tensor]:
    """Return A (experts * r, in), ordered by expert, and B (out, r * experts), ordered by rank, as stacked parameters
    have."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for e in range(experts):
        for part in parts:
            if missing := [f"lora_{m}" for m in "AB" if (e, part, m) not in pieces]:
                raise CheckpointError(
                    f"{where}: {missing[0]} of the {part} projection of expert {e} is missing. An adapter fits a model "
                    f"that stacks its {experts} experts only if it has the {' and '.join(parts)} projection of each."
                )
        downs += [pieces[e, part, "A"] for part in parts]
        ups.append(torch.block_diag(*(pieces[e, part, "B"] for part in parts)))
    try:
        return torch.cat(downs), torch.stack(ups, -1).flatten(1)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: the experts have factors of different shapes ({error})") from error


def _config(
    config: Mapping[str, Any],
    old: Collection[str],
    rest: Collection[str],
    made: Mapping[str, Collection[str]],
    weights: Iterable[str],
) -> dict[str, Any]:
    new = dict(config)
    for option in ("rank_pattern", "alpha_pattern"):
        if any(pattern_value(config.get(option), name, None) is not None for name in old):
            raise ConfigError(
                f"{option}={config[option]!r} speaks of layers of single experts, which this model stacks in one "
                "parameter; such an adapter cannot be converted."
            )
    modules = {k.partition(".lora_")[0] for k in rest if ".lora_" in k and ".experts" not in k}
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        new["target_modules"] = sorted(modules)
    else:
        new["target_modules"] = [t for t in targets if any(f".{m}".endswith(f".{t}") for m in modules)]
    parameters = list(config.get("target_parameters") or [])
    for name, homes in made.items():
        chosen = [f"{home}.{name}" for home in homes]
        everywhere = len(chosen) == sum(w.endswith(f".{name}") for w in weights)
        parameters += [name] if everywhere else sorted(chosen)
    new["target_parameters"] = parameters
    if made["experts.gate_up_proj"]:
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
