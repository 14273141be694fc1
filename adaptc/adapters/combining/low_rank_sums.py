"""Combine several adapters' low-rank changes of one weight into one low-rank change, of scale 1.

``cat`` is the exact sum. The rules on factors (``linear``, ``ties``, ...) are PEFT's. Each factor takes the square root
of the adapter's weight times its scale. So the result has matmuls of one adapter's factor with another's. The rules on
changes (``svd``, ``ties_svd``, ...) are applied to the multiplied factors, and cut to a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import copysign, sqrt

import torch
from torch import Tensor

from adaptc.adapters.combining.combine_options import CombineOptions
from adaptc.adapters.combining.combine_rules import combine_by_rule
from adaptc.adapters.combining.truncated_svd import Truncation, truncate, truncate_sum
from adaptc.passes.protocol.parts.low_rank import LowRank


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
