"""Combine adapters of one method into one, from their configs and tensors alone.

The result is the config and the tensors of an ordinary adapter of that method. Each site is made of the adapters that
have it.

``cat`` of low-rank changes is the exact sum. The rules on factors (``linear``, ``ties``, ...) are PEFT's. Each factor
takes the square root of the adapter's weight times its scale. The rules on changes (``svd``, ``ties_svd``, ...) are
applied to the multiplied factors, and cut to a rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from math import copysign, prod, sqrt
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.directory import check_finite
from adaptc.adapters.combining.adapter_sites import CONVERT_HINT, AdapterLike, AdapterSite, split_sites
from adaptc.adapters.combining.average_saved_modules import average_saved
from adaptc.adapters.combining.combine_options import CombineOptions
from adaptc.adapters.combining.combine_rules import combine_by_rule
from adaptc.adapters.combining.truncated_svd import Truncation, truncate, truncate_sum
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError, listing
from adaptc.methods import AdapterConfig, TargetedConfig
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.passes.protocol.parts.low_rank import LowRank

_ZERO_RESULT = (
    "the result is zero everywhere, so it would do nothing: the weights are zero, the adapters cancel, or density "
    "keeps none of their entries"
)


@torch.no_grad()
def combine_tensors(
    adapters: Sequence[AdapterLike], weights: Sequence[float], options: CombineOptions, default: str = "svd"
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Return the config and tensors of the weighted combination of ``adapters``.

    ``default`` is the method for low-rank adapters where the options name none. Raises ConfigError for options and
    adapters that do not go together, and CheckpointError for bad tensors.
    """
    check_same_method(adapters)
    device = next(iter(adapters[0].tensors.values())).device
    taken = [split_sites(a, device) for a in adapters]
    sites, others = [t[0] for t in taken], [t[1] for t in taken]
    for a in adapters:
        check_finite(a.tensors, a.source)
        _check_config(a)
    averages = average_saved(adapters, weights, others)
    groups = _group_by_site(sites)
    products = {key: [s.low_rank(adapters[i].source) for i, s in group] for key, group in groups.items()}
    if all(p is not None for found in products.values() for p in found) and groups:
        tensors, ranks, biased = _combine_low_ranks(adapters, weights, options.resolve(default), groups, products)
        config = _unite_configs(adapters, sites)
        assert isinstance(config, LoraConfig)
        config = config.as_plain_lora(ranks, biased)
    else:
        tensors = _combine_linear(adapters, weights, options, groups)
        config = _unite_configs(adapters, sites)
        _check_methods(config, groups)
        if tensors and not any(bool(t.any()) for t in tensors.values()):
            raise ConfigError(_ZERO_RESULT)
    check_finite(tensors, "the result of the combination")
    return config, {**tensors, **averages}


def check_same_method(adapters: Sequence[AdapterLike]) -> None:
    """Raise ConfigError where there are no adapters, or adapters of different methods; warn where they name different
    models."""
    if not adapters:
        raise ConfigError(
            "there are no adapters to combine: give a dict of directories and weights, or a list of pairs"
        )
    first = adapters[0]
    for a in adapters[1:]:
        if type(a.config) is not type(first.config):
            raise ConfigError(
                f"{first.source} is a {first.config.peft_type} adapter and {a.source} one of {a.config.peft_type}; to "
                f"combine adapters of different methods {CONVERT_HINT}"
            )
    warn_of_models(adapters)


def warn_of_models(adapters: Sequence[AdapterLike]) -> None:
    """Warn where the adapters name different base models."""
    names = dict.fromkeys(n for a in adapters if (n := a.config.base_model_name_or_path))
    if len(names) > 1:
        warnings.warn(
            f"the adapters name different models, {listing(map(repr, names), 3)}: what they make together has a "
            "meaning only where these are the same weights",
            AdaptcWarning,
            stacklevel=4,
        )


def _check_config(adapter: AdapterLike) -> None:
    config = adapter.config
    if getattr(config, "ensure_weight_tying", False):
        raise ConfigError(
            f"{adapter.source} has ensure_weight_tying=True, so that its files hold tensors twice, and the two would "
            f"not stay the same; {CONVERT_HINT}"
        )
    if isinstance(config, TargetedConfig) and config.method("", "linear").changes_base_at_init():
        raise ConfigError(
            f"{adapter.source}: its first values changed the base ({getattr(config, 'init_lora_weights', '')}), so "
            f"that its tensors alone do not say what it adds; {CONVERT_HINT}"
        )


def _group_by_site(sites: Sequence[dict[str, AdapterSite]]) -> dict[str, list[tuple[int, AdapterSite]]]:
    """Return for each site's key the adapters that have it, as (index of the adapter, site)."""
    keys = dict.fromkeys(k for one in sites for k in one)
    return {k: [(i, one[k]) for i, one in enumerate(sites) if k in one] for k in keys}


def _combine_low_ranks(
    adapters: Sequence[AdapterLike],
    weights: Sequence[float],
    options: CombineOptions,
    groups: dict[str, list[tuple[int, AdapterSite]]],
    low_ranks: dict[str, list[Any]],
) -> tuple[dict[str, Tensor], dict[str, int], bool]:
    """Return the combined low-rank tensors by key, the ranks by module, and whether there is a bias."""
    largest = max(s.method.sizes.rank() or 1 for group in groups.values() for _, s in group)
    changes: dict[str, tuple[AdapterSite, LowRank, int]] = {}
    for key, group in groups.items():
        changes_at_site: list[LowRank] = _to_same_dtype(low_ranks[key])
        for (i, site), product in zip(group, changes_at_site, strict=True):
            if product.shape != changes_at_site[0].shape:
                j, first = group[0]
                raise CheckpointError(
                    f"{key!r}: {adapters[j].source} is for a weight of {_describe_size(changes_at_site[0])}, and "
                    f"{adapters[i].source} for one of {_describe_size(product)} (key {next(iter(site.tensors))!r}, "
                    f"expected {_describe_shapes(first)}, found {_describe_shapes(site)}): they are of different models"
                )
        site = group[0][1]
        # The groups of a convolution divide the rank among them. Experts each have the full rank.
        blocks_per_rank = max((site.method.sizes.rank() or 1) // max(changes_at_site[0].rank, 1), 1)
        rank = -(-(options.svd_rank or largest) // blocks_per_rank)
        changes[key] = (
            site,
            sum_low_ranks(changes_at_site, [weights[i] for i, _ in group], options, rank),
            blocks_per_rank,
        )
    has_bias = any(c.bias is not None for _, c, _ in changes.values())
    if not any(bool(c.down.any() and c.up.any()) or c.bias is not None for _, c, _ in changes.values()):
        raise ConfigError(_ZERO_RESULT)
    out: dict[str, Tensor] = {}
    for key, (site, change, _) in changes.items():
        if has_bias and change.bias is None:
            blocks, rows, _ = change.shape
            change = replace(change, bias=change.up.new_zeros(blocks * rows))
        tensors = site.method.files.with_low_rank(change, site.tensors)
        out |= {f"{key}.{n}".removeprefix("."): t.contiguous() for n, t in tensors.items()}
    ranks: dict[str, int] = {}
    for site, change, blocks_per_rank in changes.values():
        for name in site.target_names:
            if ranks.setdefault(name, change.rank * blocks_per_rank) != change.rank * blocks_per_rank:
                raise ConfigError(
                    f"{site.key!r} is one of the parameters {', '.join(site.target_names)}, whose ranks would differ, "
                    f"and which of them is known with the model alone; choose one svd_rank for all, or {CONVERT_HINT}"
                )
    return out, ranks, has_bias


def _to_same_dtype(changes: Sequence[LowRank]) -> list[LowRank]:
    dtype = torch.float64 if any(p.down.dtype == torch.float64 for p in changes) else torch.float32
    return [
        replace(p, down=p.down.to(dtype), up=p.up.to(dtype), bias=None if p.bias is None else p.bias.to(dtype))
        for p in changes
    ]


def _combine_linear(
    adapters: Sequence[AdapterLike],
    weights: Sequence[float],
    options: CombineOptions,
    groups: dict[str, list[tuple[int, AdapterSite]]],
) -> dict[str, Tensor]:
    """Return the combined tensors of methods whose change is linear in one tensor, as its weighted sum.

    All other tensors of a site must be equal. Raises ConfigError for other methods and options.
    """
    method_name = adapters[0].config.peft_type
    options = options.resolve("linear")
    out: dict[str, Tensor] = {}
    for key, group in groups.items():
        names = {s.method.files.summed() for _, s in group}
        if names == {""} or len(names) > 1:
            method_name = f"{method_name} ({group[0][1].method.name})"
            raise ConfigError(
                f"what {method_name} adapters do together does not follow from their tensors alone; {CONVERT_HINT}"
            )
        if options.method != "linear":
            raise ConfigError(
                f"method={options.method!r} is for LoRA; adapters of {method_name} without a model are combined by "
                f"their weighted sum, method='linear'. For the others {CONVERT_HINT}"
            )
        (name,) = names
        j, first = group[0]
        for i, site in group[1:]:
            if site.method != first.method:
                raise ConfigError(
                    f"{key!r}: {adapters[j].source} has {first.method} and {adapters[i].source} {site.method}: "
                    f"{method_name} adapters can be summed where their options are the same"
                )
            for n in dict.fromkeys((*first.tensors, *site.tensors)):
                one, other = first.tensors.get(n), site.tensors.get(n)
                fits = one is not None and other is not None and one.shape == other.shape
                if not fits or not (n == name or torch.equal(one, other)):  # type: ignore[arg-type]
                    raise CheckpointError(
                        f"'{key}.{n}' of {adapters[i].source}: expected {_describe_tensor(one, n == name)} as in "
                        f"{adapters[j].source}, found {_describe_tensor(other, n == name)}"
                    )
        values = [s.tensors[name] for _, s in group]
        new = {**first.tensors, name: combine_by_rule(values, [weights[i] for i, _ in group], options)}
        out |= {f"{key}.{n}".removeprefix("."): t for n, t in new.items()}
    return out


def _describe_tensor(t: Tensor | None, shape_only: bool) -> str:
    return (
        "no tensor"
        if t is None
        else f"shape {tuple(t.shape)}"
        if shape_only
        else f"shape {tuple(t.shape)}, the same values"
    )


def _unite_configs(adapters: Sequence[AdapterLike], sites: Sequence[dict[str, AdapterSite]]) -> TargetedConfig:
    first = adapters[0].config
    assert isinstance(first, TargetedConfig)
    return first.with_all_targets(
        [a.config for a in adapters], [[s.target_names[0] for s in one.values() if s.is_module] for one in sites]
    )


def _check_methods(config: TargetedConfig, groups: dict[str, list[tuple[int, AdapterSite]]]) -> None:
    """Raise ConfigError where the united config does not give a site the options that its adapters have."""
    for key, group in groups.items():
        _, site = group[0]
        if config.method(site.target_names[0], "linear") != site.method:
            raise ConfigError(
                f"{key!r}: the options of the adapters there, {site.method}, cannot be said in one config with those "
                "of other modules; combine adapters with the same options by module"
            )


def _describe_size(p: LowRank) -> str:
    blocks, rows, columns = p.shape
    return f"{rows} x {columns}" + (f", {blocks} times" if blocks > 1 else "")


def _describe_shapes(site: AdapterSite) -> str:
    return ", ".join(f"{n} {tuple(t.shape)}" for n, t in site.tensors.items() if prod(t.shape))


def sum_low_ranks(changes: Sequence[LowRank], weights: Sequence[float], options: CombineOptions, rank: int) -> LowRank:
    """Return the weighted combination of ``changes``. ``rank`` is the rank per block to which the svd methods cut."""
    if options.method == "cat":
        down = [p.down * (w * p.scale) for p, w in zip(changes, weights, strict=True)]
        change = LowRank(torch.cat(down, 1), torch.cat([p.up for p in changes], 2))
    elif options.is_dense:
        change = _sum_dense(changes, weights, options, rank)
    else:
        halves = [sqrt(abs(w * p.scale)) for p, w in zip(changes, weights, strict=True)]
        signed = [copysign(h, w * p.scale) for h, p, w in zip(halves, changes, weights, strict=True)]
        down = combine_by_rule([p.down for p in changes], signed, options)
        change = LowRank(down, combine_by_rule([p.up for p in changes], halves, options))
    return replace(change, bias=_combine_bias(changes, weights, options))


def _sum_dense(changes: Sequence[LowRank], weights: Sequence[float], options: CombineOptions, rank: int) -> LowRank:
    cut = Truncation(
        rank, clamp_quantile=options.svd_clamp, full_matrices=options.svd_full_matrices, driver=options.svd_driver
    )
    if options.method == "svd":
        return truncate_sum(changes, weights, replace(cut, rank=min(rank, sum(p.rank for p in changes))))[0]
    return truncate(combine_by_rule([p.matrix() for p in changes], weights, options), cut)[0]


def _combine_bias(changes: Sequence[LowRank], weights: Sequence[float], options: CombineOptions) -> Tensor | None:
    """Return the combined bias, or None where no part has one. The rule is applied to the scaled biases, which have no
    factors."""
    like = next((p.bias for p in changes if p.bias is not None), None)
    if like is None:
        return None
    return combine_by_rule(
        [torch.zeros_like(like) if p.bias is None else p.bias * p.scale for p in changes], weights, options
    )
