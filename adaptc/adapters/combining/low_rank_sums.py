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

from adaptc.adapters.combining.combine_options import Options
from adaptc.adapters.combining.combine_rules import mixed
from adaptc.adapters.combining.truncated_svd import Cut, truncated, truncated_sum
from adaptc.passes.protocol.low_rank import LowRank


def summed(parts: Sequence[LowRank], weights: Sequence[float], options: Options, rank: int) -> LowRank:
    """Return the weighted combination of ``parts``. ``rank`` is the rank per block to which the svd methods cut."""
    if options.method == "cat":
        down = [p.down * (w * p.scale) for p, w in zip(parts, weights, strict=True)]
        change = LowRank(torch.cat(down, 1), torch.cat([p.up for p in parts], 2))
    elif options.dense:
        change = _of_changes(parts, weights, options, rank)
    else:
        halves = [sqrt(abs(w * p.scale)) for p, w in zip(parts, weights, strict=True)]
        signed = [copysign(h, w * p.scale) for h, p, w in zip(halves, parts, weights, strict=True)]
        down = mixed([p.down for p in parts], signed, options)
        change = LowRank(down, mixed([p.up for p in parts], halves, options))
    return replace(change, bias=_bias(parts, weights, options))


def _of_changes(parts: Sequence[LowRank], weights: Sequence[float], options: Options, rank: int) -> LowRank:
    cut = Cut(rank, clamp=options.svd_clamp, full=options.svd_full_matrices, driver=options.svd_driver)
    if options.method == "svd":
        return truncated_sum(parts, weights, replace(cut, rank=min(rank, sum(p.rank for p in parts))))[0]
    return truncated(mixed([p.matrix() for p in parts], weights, options), cut)[0]


def _bias(parts: Sequence[LowRank], weights: Sequence[float], options: Options) -> Tensor | None:
    """Return the combined bias, or None where no part has one. The rule is applied to the scaled biases, which have no
    factors."""
    like = next((p.bias for p in parts if p.bias is not None), None)
    if like is None:
        return None
    return mixed([torch.zeros_like(like) if p.bias is None else p.bias * p.scale for p in parts], weights, options)
