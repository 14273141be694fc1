"""Make one Arrow adapter of LoRA adapters, and split it into them again.

Everything here works on configs and tensors, with no model and no files. The LoRA adapters must be plain and adapt the
same modules; the Arrow adapter that routes between them is in the form that programs bind. With GenKnowSub
(aclanthology.org/2025.acl-short.54) the mean A and the mean B of general adapters are subtracted from the A and the B
of each adapter. The caller's tensors stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.method_parts import ExpertAdapter
from adaptc.methods._shared.name_patterns import default_and_pattern
from adaptc.methods.lora_family.arrow import ArrowConfig
from adaptc.methods.lora_family.experts import OWNER, RANK_AXES, SCALES, join_experts, split_experts

#: PEFT's names: prefixes of task adapters and of general adapters, and the name of the adapter that routes
TASK, GENERAL, ROUTER = "task_", "gks_", "arrow_router"

#: options of plain LoRA that have no meaning for an Arrow adapter, since each expert has its own: option -> default
_LORA_DEFAULTS: Mapping[str, Any] = {
    "lora_alpha": 8,
    "alpha_pattern": {},
    "lora_dropout": 0.0,
    "use_rslora": False,
    "init_lora_weights": True,
}


@torch.no_grad()
def make_arrow_adapter(
    arrow: ArrowConfig, tasks: Sequence[ExpertAdapter], general: Sequence[ExpertAdapter] = ()
) -> tuple[TargetedConfig, dict[str, Tensor]]:
    """Return the config and the tensors of an adapter that routes between ``tasks``.

    Raises ConfigError for adapters that are not plain LoRA, for ``general`` adapters without ``arrow.use_gks``, and for
    ``use_gks`` without general adapters. Raises CheckpointError where modules or shapes differ.
    """
    if arrow.use_gks and not general:
        raise ConfigError("use_gks=True takes the mean of general adapters away, and there are none: name at least one")
    if general and not arrow.use_gks:
        raise ConfigError(
            f"general adapters, {general[0].source} first, are for ArrowConfig(use_gks=True): set it, or leave them out"
        )
    if general:
        tasks = _subtract_general(tasks, general)
    joined = join_experts(tasks, "Arrow", same_modules=True)
    configs = [t.config for t in tasks]
    first = configs[0]
    assert isinstance(first, TargetedConfig)  # or it would not be plain LoRA
    r, ranks = default_and_pattern(joined.ranks)
    names = [f"{TASK}{i}" for i in range(len(tasks))]
    # The general adapters are subtracted above: with use_gks left on, they would be subtracted again on loading.
    own = replace(arrow, use_gks=False).with_names(names, [])
    config = first.with_all_targets(configs, [list(joined.ranks)] * len(configs))
    return config.replace(arrow_config=own, r=r, rank_pattern=ranks, **_LORA_DEFAULTS), dict(joined.tensors)


def _subtract_general(tasks: Sequence[ExpertAdapter], general: Sequence[ExpertAdapter]) -> list[ExpertAdapter]:
    join_experts([*tasks, *general], "GenKnowSub", same_modules=True)  # only for its errors where adapters do not fit
    means: dict[str, Tensor] = {}
    out: list[ExpertAdapter] = []
    for t in tasks:
        tensors: dict[str, Tensor] = {}
        for key, value in t.tensors.items():
            others = [g.tensors[key] for g in general]
            if odd := next((i for i, o in enumerate(others) if o.shape != value.shape), None):
                _raise_rank_mismatch(t, general[odd], key)
            if others[0].shape != value.shape:
                _raise_rank_mismatch(t, general[0], key)
            if key not in means:
                means[key] = torch.stack([_to_full_precision(o) for o in others]).mean(0)
            tensors[key] = _to_full_precision(value) - means[key]
        out.append(replace(t, tensors=tensors))
    return out


def _raise_rank_mismatch(task: ExpertAdapter, general: ExpertAdapter, key: str) -> None:
    raise ConfigError(
        f"GenKnowSub takes factors from factors, so all adapters must be of one rank: {key!r} has shape "
        f"{tuple(task.tensors[key].shape)} in {task.source} and {tuple(general.tensors[key].shape)} in {general.source}"
    )


def _to_full_precision(t: Tensor) -> Tensor:
    return t.detach() if t.dtype == torch.float64 else t.detach().float()


@torch.no_grad()
def split_arrow_adapter(
    config: Any, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[TargetedConfig, dict[str, Tensor]]]:
    """Split an Arrow adapter into its LoRA adapters and PEFT's router, by PEFT's names: the inverse of
    :func:`make_arrow_adapter`.

    The router comes last. Raises ConfigError for a tensor that belongs to none of the LoRA adapters.
    """
    arrow = ArrowConfig.from_value(config.arrow_config)
    names = arrow.task_adapter_names or []
    if more := next((k for k in tensors if not k.endswith((*RANK_AXES, OWNER, SCALES))), None):
        raise ConfigError(f"{more!r} is none of the adapters that Arrow routes between, and files have no place for it")
    plain = config.replace(arrow_config=None)
    parts = split_experts(tensors, plain, len(names))
    # PEFT's router is a LoRA adapter of its own, whose tensors it never reads.
    one, like = parts[0]
    router = one.replace(arrow_config=arrow, lora_alpha=8, alpha_pattern={})  # type: ignore[call-arg]
    unread = {k: torch.zeros_like(t) for k, t in like.items()}
    return {**dict(zip(names, parts, strict=True)), ROUTER: (router, unread)}


def routed_adapter_names(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the names of the task adapters and of the general adapters that ``config``, read from a file, refers to.

    Both are adapters beside the file. The second list is empty without ``use_gks``, and both are for a config whose
    ``arrow_config`` is no mapping.
    """
    found = config.get("arrow_config")
    if not isinstance(found, Mapping):
        return [], []
    arrow = ArrowConfig.from_value(found)
    return arrow.task_adapter_names or [], (arrow.gks_adapter_names or []) if arrow.use_gks else []
