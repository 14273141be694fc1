"""Rewrite an adapter as plain LoRA of one rank and scale 1, exactly where its tensors alone tell what it adds.

Scales are folded into B, and smaller ranks are filled up with zeros. Other methods are cut by singular values, with the
model. The report has the error of each weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from adaptc.adapters.adapter import Adapter
from adaptc.adapters.combining.adapter_sites import NEED_MODEL, AdapterSite, exact_changes
from adaptc.adapters.combining.truncated_svd import Truncation, truncate_sum
from adaptc.adapters.fit_report import FitReport, SiteFit
from adaptc.adapters.to_lora import convert_to_lora
from adaptc.engines.fused_layers import Changes
from adaptc.errors import ConfigError, short_repr
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.passes.protocol.parts.low_rank import LowRank

#: the way out of everything that no adapter file can hold
MERGE_HINT = "or merge it into the model, adaptc merge MODEL ADAPTER -o DIR, and serve that"


@torch.no_grad()
def as_plain_lora(
    adapter: Adapter,
    rank: int | None,
    max_rank: int | None,
    max_error: float,
    read_model: Callable[[], Any] | None,
    regroup: Callable[[Mapping[str, AdapterSite], Mapping[str, LowRank]], Changes] | None = None,
) -> tuple[Adapter, FitReport]:
    """Return ``adapter`` as LoRA whose modules have one rank and a scale of 1, and the error of each weight.

    ``rank``: the rank of all modules, None for the largest that is needed, which is to be at most ``max_rank``.
    ``read_model`` returns the model, and is called where it is needed. ``regroup`` gives the changes other layers.
    Raises ConfigError where an error is above ``max_error``, where a model is needed and not given, and where there is
    no LoRA of the method.
    """
    found, source, svd_errors = exact_changes(adapter), adapter.source, dict[str, float]()
    if found is None:
        if read_model is None:
            raise ConfigError(
                f"{adapter.source}: {_describe_method(adapter)}, and what that adds to a weight is known with the "
                f"model alone: give it with model= (--model), {MERGE_HINT}"
            )
        # The least rank that keeps the error is found for each weight; the largest of them counts for all.
        converted = _convert(adapter, read_model(), rank or 1 - max_error**2)
        adapter = Adapter(converted.config, converted.tensors, source)
        svd_errors = {s.site.removesuffix(".weight"): s.error for s in converted.report.sites}
        found = exact_changes(adapter)
        assert found is not None
    if not found[0]:
        raise ConfigError(f"{source} has no factors of LoRA, only tensors that are trained whole: {MERGE_HINT[3:]}")
    sites, changes, others = found
    if regroup is not None:
        sites, changes = regroup(sites, changes)
    plain, report = _to_one_rank(adapter, sites, changes, others, rank)
    # The second step cuts nothing that the first one has left.
    fits = [replace(s, error=max(s.error, svd_errors.get(s.site, 0.0))) for s in report.sites]
    report = FitReport(source, tuple(fits), report.saved_modules)
    _check_errors(report, max_error)
    needed = max((s.rank for s in fits), default=0)
    if max_rank is not None and needed > max_rank:
        raise ConfigError(
            f"{source}: within max_error={max_error:g} the adapter needs rank {needed}, and {max_rank} is the most "
            f"that is taken: give rank={max_rank} (--rank) with the error that may be made, max_error= (--max-error), "
            f"{MERGE_HINT}"
        )
    return plain, report


def _describe_method(adapter: Adapter) -> str:
    config = adapter.config
    if isinstance(config, LoraConfig):
        scheme = config.init_lora_weights
        for option in NEED_MODEL:
            if getattr(config, option):
                return f"it is LoRA with {option}"
        return f"its first values changed the base (init_lora_weights={scheme!r})"
    return f"it is of {config.peft_type}"


def _convert(adapter: Adapter, model: Any, rank: float) -> Adapter:
    try:
        return convert_to_lora(adapter, model, rank=rank)
    except ConfigError as error:
        raise ConfigError(f"{error}; {MERGE_HINT}") from error


def _to_one_rank(
    adapter: Adapter,
    sites: Mapping[str, AdapterSite],
    changes: Mapping[str, LowRank],
    others: Mapping[str, Tensor],
    rank: int | None,
) -> tuple[Adapter, FitReport]:
    original = adapter.config
    assert isinstance(original, LoraConfig)
    # The groups of a convolution divide the rank among them.
    blocks = {key: max((sites[key].method.sizes.rank() or 1) // max(c.rank, 1), 1) for key, c in changes.items()}
    rank = rank or max([c.rank * blocks[key] for key, c in changes.items()], default=1)
    has_bias = any(c.bias is not None for c in changes.values())
    tensors: dict[str, Tensor] = {k: adapter.tensors[k] for k in others}
    usual = {n: t for k, t in adapter.tensors.items() for n in ("lora_A.weight", "lora_B.weight") if k.endswith(n)}
    fits: list[SiteFit] = []
    for key, change in changes.items():
        if rank % blocks[key]:
            raise ConfigError(
                f"{key!r} is a convolution with {blocks[key]} groups, which divide the rank: rank={rank} is no "
                f"multiple, and {-(-rank // blocks[key]) * blocks[key]} is"
            )
        cut, error = _fit_rank(change, rank // blocks[key])
        names = sites[key].method.files.with_low_rank(cut, sites[key].tensors)
        for name, value in names.items():
            # A layer that the adapter did not have was made of others, whose dtype it has.
            old = adapter.tensors.get(f"{key}.{name}".removeprefix("."), usual.get(name))
            tensors[f"{key}.{name}".removeprefix(".")] = _to_stored_dtype(value, old)
        size = min(change.shape[1:]) * blocks[key]
        fits.append(SiteFit(key, rank, size, _norm(change), error))
    config = original.as_plain_lora(dict.fromkeys((n for s in sites.values() for n in s.target_names), rank), has_bias)
    modules = [s.target_names[0] for s in sites.values() if s.is_module]
    # Names of modules say the same to every engine, which expressions do not.
    config = config.replace(target_modules=sorted(modules) or None)
    whole = tuple(dict.fromkeys(k.rpartition(".")[0] for k in others))
    return Adapter(config, tensors, adapter.source), FitReport(adapter.source, tuple(fits), whole)


def _fit_rank(change: LowRank, rank: int) -> tuple[LowRank, float]:
    """Return the change with this rank per block and a scale of 1, and the relative error."""
    error = 0.0
    if change.rank > rank:
        cut, error = truncate_sum([change], [1.0], Truncation(rank))
        change = replace(cut, bias=None if change.bias is None else change.bias * change.scale)
    else:
        up = change.up if change.scale == 1 else change.up * change.scale
        bias = None if change.bias is None else change.bias * change.scale
        change = LowRank(change.down, up, bias=bias)
    more = rank - change.rank
    if more:
        change = replace(change, down=pad(change.down, (0, 0, 0, more)), up=pad(change.up, (0, more)))
    return change, error


def _to_stored_dtype(value: Tensor, old: Tensor | None) -> Tensor:
    """Return ``value`` in the dtype of the original tensor, where that changes no number."""
    value = value.contiguous()
    if old is None or not old.is_floating_point():
        return value
    narrow = value.to(old.dtype)
    return narrow if torch.equal(narrow.to(value.dtype), value) else value


def _norm(change: LowRank) -> float:
    """Return the Frobenius norm of the change, without multiplying the factors out."""
    up, down = change.up.double(), change.down.double()
    square = float(((up.mT @ up) * (down @ down.mT)).sum())
    return abs(change.scale) * max(square, 0.0) ** 0.5


def _check_errors(report: FitReport, max_error: float) -> None:
    over = [s for s in report.sites if s.error > max_error]
    if over:
        worst = max(over, key=lambda s: s.error)
        raise ConfigError(
            f"{report.source}: LoRA of rank {worst.rank} leaves out {worst.error:.3g} of the change of {worst.site!r}, "
            f"and of {len(over)} weights more than max_error={short_repr(max_error)}. Allow it with max_error= "
            f"(--max-error), give a larger rank= (--rank), {MERGE_HINT}"
        )
