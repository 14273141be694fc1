"""An Arrow adapter made of LoRA adapters, and taken apart again: configs and tensors, no model and no files.

Before: plain LoRA adapters at the same modules. After: one adapter that routes between them, as programs bind it. With
GenKnowSub (aclanthology.org/2025.acl-short.54) the mean A and the mean B of general adapters are taken from the A and
the B of each; the caller's tensors stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.methods._config import TargetedConfig
from adaptc.methods._experts import AXES, OWNER, SCALES, apart, side_by_side
from adaptc.methods._name_patterns import value_table
from adaptc.methods._parts import Part
from adaptc.methods.arrow import ArrowConfig

#: how PEFT calls the adapters, and the one that routes between them
TASK, GENERAL, ROUTER = "task_", "gks_", "arrow_router"

#: options of plain LoRA that mean nothing where several are routed between: each expert has its own
_OWN: Mapping[str, Any] = {
    "lora_alpha": 8,
    "alpha_pattern": {},
    "lora_dropout": 0.0,
    "use_rslora": False,
    "init_lora_weights": True,
}


@torch.no_grad()
def routing(
    arrow: ArrowConfig, tasks: Sequence[Part], general: Sequence[Part] = ()
) -> tuple[TargetedConfig, dict[str, Tensor]]:
    """The config and the tensors of an adapter that routes between ``tasks``.

    Raises ConfigError for adapters that are not plain LoRA, or general ones without ``use_gks`` or the other way round,
    CheckpointError where modules or shapes differ.
    """
    if arrow.use_gks and not general:
        raise ConfigError("use_gks=True takes the mean of general adapters away, and there are none: name at least one")
    if general and not arrow.use_gks:
        raise ConfigError(
            f"general adapters, {general[0].source} first, are for ArrowConfig(use_gks=True): set it, or leave them out"
        )
    if general:
        tasks = _without_general(tasks, general)
    made = side_by_side(tasks, "Arrow", alike=True)
    configs = [t.config for t in tasks]
    first = configs[0]
    assert isinstance(first, TargetedConfig)  # or it would not be plain LoRA
    r, ranks = value_table(made.ranks)
    names = [f"{TASK}{i}" for i in range(len(tasks))]
    # What was taken away is gone: the adapter that there is now routes between what is left.
    own = replace(arrow, use_gks=False).naming(names, [])
    config = first.united(configs, [list(made.ranks)] * len(configs))
    return config.replace(arrow_config=own, r=r, rank_pattern=ranks, **_OWN), dict(made.tensors)


def _without_general(tasks: Sequence[Part], general: Sequence[Part]) -> list[Part]:
    side_by_side([*tasks, *general], "GenKnowSub", alike=True)  # which says what does not go together
    means: dict[str, Tensor] = {}
    out: list[Part] = []
    for t in tasks:
        tensors: dict[str, Tensor] = {}
        for key, value in t.tensors.items():
            others = [g.tensors[key] for g in general]
            if odd := next((i for i, o in enumerate(others) if o.shape != value.shape), None):
                _refuse_ranks(t, general[odd], key)
            if others[0].shape != value.shape:
                _refuse_ranks(t, general[0], key)
            if key not in means:
                means[key] = torch.stack([_full(o) for o in others]).mean(0)
            tensors[key] = _full(value) - means[key]
        out.append(replace(t, tensors=tensors))
    return out


def _refuse_ranks(task: Part, general: Part, key: str) -> None:
    raise ConfigError(
        f"GenKnowSub takes factors from factors, so all adapters must be of one rank: {key!r} has shape "
        f"{tuple(task.tensors[key].shape)} in {task.source} and {tuple(general.tensors[key].shape)} in {general.source}"
    )


def _full(t: Tensor) -> Tensor:
    return t.detach() if t.dtype == torch.float64 else t.detach().float()


@torch.no_grad()
def routed_apart(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, tuple[TargetedConfig, dict[str, Tensor]]]:
    """Inverse of :func:`routing`, by the names that PEFT knows them by: the adapters, and last the one that routes."""
    arrow = ArrowConfig.of(config.arrow_config)
    names = arrow.task_adapter_names or []
    if more := next((k for k in tensors if not k.endswith((*AXES, OWNER, SCALES))), None):
        raise ConfigError(f"{more!r} is none of the adapters that Arrow routes between, and files have no place for it")
    plain = config.replace(arrow_config=None)
    parts = apart(tensors, plain, len(names))
    # PEFT's router is a LoRA adapter of its own, whose tensors it never reads.
    one, like = parts[0]
    router = one.replace(arrow_config=arrow, lora_alpha=8, alpha_pattern={})  # type: ignore[call-arg]
    unread = {k: torch.zeros_like(t) for k, t in like.items()}
    return {**dict(zip(names, parts, strict=True)), ROUTER: (router, unread)}


def names_in(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Of a config as files have it: the names of the adapters beside it that it routes between, and of the general
    ones that are taken away from these. None of a config of another method, or of one that says itself what it is."""
    found = config.get("arrow_config")
    if not isinstance(found, Mapping):
        return [], []
    arrow = ArrowConfig.of(found)
    return arrow.task_adapter_names or [], (arrow.gks_adapter_names or []) if arrow.use_gks else []
