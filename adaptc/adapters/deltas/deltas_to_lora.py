"""Turn changes of weights into a LoRA adapter: the factors, PEFT's keys and the config.

PEFT and adaptc can read the result, which has scale 1. Biases that change become LoRA's own (``lora_bias``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from adaptc.adapter_files.directory import all_finite
from adaptc.adapters.combining.truncated_svd import Truncation, truncate
from adaptc.adapters.deltas.weight_deltas import WeightDelta
from adaptc.adapters.fit_report import FitReport, SiteFit
from adaptc.binding.binding import BindingSpec
from adaptc.errors import CheckpointError, ConfigError, short_repr
from adaptc.methods import TargetedConfig
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.parts.low_rank import LowRank


@dataclass(frozen=True)
class LoraResult:
    """A LoRA adapter before it is an object: config, tensors, and the report on its fit."""

    config: LoraConfig
    tensors: Mapping[str, Tensor]
    report: FitReport


def parse_rank(rank: object) -> Truncation:
    """Return the cut for ``rank``: an integer is a rank, a fraction the part of the energy to keep (PEFT's rule).

    Raises ConfigError for any other value.
    """
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return Truncation(rank)
    if isinstance(rank, float) and 0 < rank <= 1:
        return Truncation(energy=rank)
    raise ConfigError(
        f"rank={short_repr(rank)} must be an integer of at least 1, or a fraction above 0 and at most 1: the part of "
        "the energy (the sum of the squares of the singular values) to keep of each weight"
    )


@torch.no_grad()
def make_lora(
    config: TargetedConfig,
    spec: BindingSpec,
    sites: Iterable[tuple[Attachment, Callable[[], WeightDelta]]],
    truncation: Truncation,
    source: str,
    saved_tensors: Mapping[str, Tensor],
) -> LoraResult:
    """Return the LoRA adapter that has these changes, cut to a rank.

    ``sites`` pairs each attachment with a function that computes its change; one change is computed at a time.
    ``config`` is that of the original adapter and chooses the sites. ``saved_tensors`` are tensors that the adapter has
    besides. Raises ConfigError where no weight changes or LoRA has no form for a change, and CheckpointError for values
    that are not finite.
    """
    changes: dict[str, tuple[Attachment, Op, LowRank]] = {}
    fits: list[SiteFit] = []
    ranks: dict[str, int] = {}
    for a, change_of in sites:
        op = spec.ops[a.id]
        if op.max_norm is not None:
            raise ConfigError(
                f"{a.fqn!r} is an embedding with max_norm, which LoRA's own rows would keep to as well, so that no "
                "LoRA is near the change; leave it out of the adapter"
            )
        delta = change_of()
        _check_finite_delta(delta, a, source)
        split = delta.matrix.shape[0] if not op.experts else 1
        own = truncation if truncation.rank is None else replace(truncation, rank=-(-truncation.rank // split))
        low_rank, error = truncate(delta.matrix, own)
        ranks[a.name or a.module] = low_rank.rank * split
        norm = float(torch.linalg.vector_norm(delta.matrix, dtype=torch.float64))
        fits.append(SiteFit(a.fqn, low_rank.rank * split, min(delta.matrix.shape[1:]) * split, norm, error))
        changes[a.key] = a, op, replace(low_rank, bias=delta.bias)
    if not any(r.change for r in fits) and not any(p.bias is not None for _, _, p in changes.values()):
        raise ConfigError(f"{source} changes no weight, so LoRA of it would do nothing")
    has_bias = any(p.bias is not None for _, _, p in changes.values())
    if has_bias and (bare := [a.fqn for a, op, _ in changes.values() if not op.callable or op.kind == "embedding"]):
        raise ConfigError(
            f"{source} changes biases, for which LoRA has lora_bias=True at every layer, and {bare[0]!r} takes none: "
            "leave it out of the adapter"
        )
    lora = _lora_config(config, [a for a, _, _ in changes.values()]).as_plain_lora(ranks, has_bias)
    out: dict[str, Tensor] = {}
    for key, (a, op, low_rank) in changes.items():
        out |= {f"{key}.{n}": t for n, t in _lora_tensors(lora, a, op, low_rank, has_bias).items()}
    whole = tuple(dict.fromkeys(k.rpartition(".")[0] for k in saved_tensors))
    return LoraResult(lora, {**out, **saved_tensors}, FitReport(source, tuple(fits), whole))


def _lora_tensors(lora: LoraConfig, a: Attachment, op: Op, low_rank: LowRank, has_bias: bool) -> dict[str, Tensor]:
    method = lora.method(a.name or a.module, a.kind)
    if a.name not in ("", a.module, a.fqn):  # a layer that is nested in an adapted one
        method = method.inside_multihead_attention()
    like = {n: torch.empty(s.shape, device="meta") for n, s in method.slots(op).items()}
    scale = method.scale(op)
    bias = low_rank.bias
    if has_bias:
        bias = low_rank.up.new_zeros(op.out_features) if bias is None else bias / scale
    new = method.files.with_low_rank(replace(low_rank, up=low_rank.up / scale, bias=bias), like)
    return {n: t.contiguous() for n, t in new.items()}


def _check_finite_delta(delta: WeightDelta, a: Attachment, source: str) -> None:
    if not all_finite([delta.matrix]) and not bool(delta.matrix.isfinite().all()):
        raise CheckpointError(
            f"{source}: the change of {a.fqn!r} {tuple(delta.matrix.shape)} holds values that are not finite; the "
            "adapter or the model is damaged"
        )


def _lora_config(config: TargetedConfig, sites: Sequence[Attachment]) -> LoraConfig:
    """Return the config of LoRA at ``sites``, with the options of ``config`` that choose where an adapter is."""
    own = {f.name for f in fields(TargetedConfig)} | {"bias", "trainable_token_indices", "layer_replication"}
    values = {n: getattr(config, n) for n in own if n != "peft_version"}
    values["bias"] = "lora_only" if str(values["bias"]).endswith("_only") else values["bias"]
    values["fan_in_fan_out"] = any(a.kind == "addmm" for a in sites)
    return LoraConfig(**values)
