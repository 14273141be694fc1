"""Changes of one weight by several adapters, each a product of two factors, made into one such product.

The result has scale one. ``cat`` is the exact sum. The rules on factors (``linear``, ``ties``, ...) are PEFT's: half of
each weight and scale, as a square root, goes to either factor, so that products of one adapter's factor with another's
are in the result. The rules on changes (``svd``, ``ties_svd``, ...) are applied to the products, and cut to a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import copysign, sqrt

import torch
from torch import Tensor

from adaptc.adapters.options import Options
from adaptc.adapters.rules import mixed
from adaptc.adapters.truncated import Cut, truncated, truncated_sum
from adaptc.passes.ir.low_rank import LowRank


def summed(parts: Sequence[LowRank], weights: Sequence[float], options: Options, rank: int) -> LowRank:
    """``rank``: of a block, what the methods that decompose cut to."""
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
    """Biases are no factors: the rule is applied to what they add."""
    like = next((p.bias for p in parts if p.bias is not None), None)
    if like is None:
        return None
    return mixed([torch.zeros_like(like) if p.bias is None else p.bias * p.scale for p in parts], weights, options)
