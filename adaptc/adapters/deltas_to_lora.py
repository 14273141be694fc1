"""Turn changes of weights into a LoRA adapter: the factors, PEFT's keys and the config.

PEFT and adaptc can read the result, which has scale 1. Biases that change become LoRA's own (``lora_bias``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from adaptc.adapter_files.directory import all_finite
from adaptc.adapters.combining.truncated_svd import Cut, truncated
from adaptc.adapters.fit_report import FitReport, SiteFit
from adaptc.adapters.weight_deltas import Change
from adaptc.binding.binding import BindingSpec
from adaptc.errors import CheckpointError, ConfigError, shown
from adaptc.methods import TargetedConfig
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.low_rank import LowRank


@dataclass(frozen=True)
class Made:
    """A LoRA adapter before it is an object: config, tensors, and the report on its fit."""

    config: LoraConfig
    tensors: Mapping[str, Tensor]
    report: FitReport


def cut_of(rank: object) -> Cut:
    """Return the cut for ``rank``: an integer is a rank, a fraction the part of the energy to keep (PEFT's rule).

    Raises ConfigError for any other value.
    """
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return Cut(rank)
    if isinstance(rank, float) and 0 < rank <= 1:
        return Cut(energy=rank)
    raise ConfigError(
        f"rank={shown(rank)} must be an integer of at least 1, or a fraction above 0 and at most 1: the part of the "
        "energy (the sum of the squares of the singular values) to keep of each weight"
    )


@torch.no_grad()
def as_lora(
    config: TargetedConfig,
    spec: BindingSpec,
    sites: Iterable[tuple[Attachment, Callable[[], Change]]],
    cut: Cut,
    source: str,
    others: Mapping[str, Tensor],
) -> Made:
    """Return the LoRA adapter that has these changes, cut to a rank.

    ``sites`` pairs each attachment with a function that computes its change; one change is computed at a time.
    ``config`` is that of the original adapter and chooses the sites. ``others`` are tensors that the adapter has
    besides. Raises ConfigError where no weight changes or LoRA has no form for a change, and CheckpointError for values
    that are not finite.
    """
    parts: dict[str, tuple[Attachment, Op, LowRank]] = {}
    rows: list[SiteFit] = []
    ranks: dict[str, int] = {}
    for a, change_of in sites:
        op = spec.ops[a.id]
        if op.bound is not None:
            raise ConfigError(
                f"{a.fqn!r} is an embedding with max_norm, which LoRA's own rows would keep to as well, so that no "
                "LoRA is near the change; leave it out of the adapter"
            )
        change = change_of()
        _check(change, a, source)
        split = change.matrix.shape[0] if not op.experts else 1
        own = cut if cut.rank is None else replace(cut, rank=-(-cut.rank // split))
        part, error = truncated(change.matrix, own)
        ranks[a.name or a.module] = part.rank * split
        norm = float(torch.linalg.vector_norm(change.matrix, dtype=torch.float64))
        rows.append(SiteFit(a.fqn, part.rank * split, min(change.matrix.shape[1:]) * split, norm, error))
        parts[a.key] = a, op, replace(part, bias=change.bias)
    if not any(r.change for r in rows) and not any(p.bias is not None for _, _, p in parts.values()):
        raise ConfigError(f"{source} changes no weight, so LoRA of it would do nothing")
    biased = any(p.bias is not None for _, _, p in parts.values())
    if biased and (bare := [a.fqn for a, op, _ in parts.values() if not op.callable or op.kind == "embedding"]):
        raise ConfigError(
            f"{source} changes biases, for which LoRA has lora_bias=True at every layer, and {bare[0]!r} takes none: "
            "leave it out of the adapter"
        )
    lora = _config(config, [a for a, _, _ in parts.values()]).of_low_rank(ranks, biased)
    out: dict[str, Tensor] = {}
    for key, (a, op, part) in parts.items():
        out |= {f"{key}.{n}": t for n, t in _slots(lora, a, op, part, biased).items()}
    whole = tuple(dict.fromkeys(k.rpartition(".")[0] for k in others))
    return Made(lora, {**out, **others}, FitReport(source, tuple(rows), whole))


def _slots(lora: LoraConfig, a: Attachment, op: Op, part: LowRank, biased: bool) -> dict[str, Tensor]:
    method = lora.method(a.name or a.module, a.kind)
    if a.name not in ("", a.module, a.fqn):  # a layer that is nested in an adapted one
        method = method.nested()
    like = {n: torch.empty(s.shape, device="meta") for n, s in method.slots(op).items()}
    scale = method.scale(op)
    bias = part.bias
    if biased:
        bias = part.up.new_zeros(op.out_features) if bias is None else bias / scale
    new = method.with_low_rank(replace(part, up=part.up / scale, bias=bias), like)
    return {n: t.contiguous() for n, t in new.items()}


def _check(change: Change, a: Attachment, source: str) -> None:
    if not all_finite([change.matrix]) and not bool(change.matrix.isfinite().all()):
        raise CheckpointError(
            f"{source}: the change of {a.fqn!r} {tuple(change.matrix.shape)} holds values that are not finite; the "
            "adapter or the model is damaged"
        )


def _config(config: TargetedConfig, sites: Sequence[Attachment]) -> LoraConfig:
    """Return the config of LoRA at ``sites``, with the options of ``config`` that choose where an adapter is."""
    own = {f.name for f in fields(TargetedConfig)} | {"bias", "trainable_token_indices", "layer_replication"}
    values = {n: getattr(config, n) for n in own if n != "peft_version"}
    values["bias"] = "lora_only" if str(values["bias"]).endswith("_only") else values["bias"]
    values["fan_in_fan_out"] = any(a.kind == "addmm" for a in sites)
    return LoraConfig(**values)
