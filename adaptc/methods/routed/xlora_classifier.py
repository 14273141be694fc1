"""Compute X-LoRA's scalings: how much each expert counts at each token, from the base's last hidden state.

The classifier is a stack of linear layers with ReLU in between. It gives a logit for each expert and each layer of the
model, or one layer for all. *Scalings* are the softmax of the logits, or the logits themselves; only the largest may be
kept. Shapes: hidden (batch, length, width) -> (batch, length, layers, experts), in the classifier's dtype.

The numbers of layers and experts are sizes of the tensors, so one function serves adapters with any numbers of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ScalingRule:
    """The rule by which logits become scalings.

    ``softmax``: over all experts. ``top_k``: how many experts are kept, None for all. ``softmax_topk``: another softmax
    over the kept experts.
    """

    softmax: bool = True
    top_k: int | None = None
    softmax_topk: bool = False

    def compute_scalings(self, logits: Tensor, sharpness: Tensor) -> Tensor:
        """Return the scalings for ``logits`` (..., experts), before any expert is left out.

        ``sharpness`` is one over the temperature, so that an adapter whose tensors are all zeros has finite scalings.
        """
        return torch.softmax(logits * sharpness, -1) if self.softmax else logits

    def zero_unselected(self, scalings: Tensor) -> Tensor:
        """Return ``scalings`` (..., experts) with zeros for the experts that are left out.

        An expert whose scaling is zero counts as left out, as in PEFT.
        """
        if self.top_k is not None:
            _, best = torch.topk(scalings, self.top_k, dim=-1)
            kept = torch.zeros_like(scalings).scatter(-1, best, 1.0)
            scalings = scalings * kept
        if self.softmax_topk:
            there = scalings != 0
            shares = torch.softmax(scalings.masked_fill(~there, float("-inf")), -1)
            scalings = shares.masked_fill(~there, 0.0)
        return scalings


@dataclass(frozen=True)
class ScalingClassifier:
    """A function ``(hidden, sharpness, weight, bias, ...)`` -> scalings (batch, length, layers * experts).

    Weights and biases are those of the classifier's layers in order, in the shapes of ``Linear``. The last layer has
    a weight (layers, experts, in) and a bias (layers, experts).
    """

    rule: ScalingRule
    dropout: float = 0.0
    training: bool = False

    def __call__(self, hidden: Tensor, sharpness: Tensor, *layers: Tensor) -> Tensor:
        return self.rule.zero_unselected(self.scalings(hidden, sharpness, *layers)).flatten(2)

    def scalings(self, hidden: Tensor, sharpness: Tensor, *layers: Tensor) -> Tensor:
        h = hidden.detach().to(layers[0].dtype)
        *inner, weight, bias = layers
        for w, b in zip(inner[::2], inner[1::2], strict=True):
            h = F.relu(F.linear(h, w, b))
            if self.training and self.dropout:
                h = F.dropout(h, self.dropout, training=True)
        logits = F.linear(h, weight.flatten(0, 1), bias.flatten())
        return self.rule.compute_scalings(logits.unflatten(-1, (weight.shape[0], weight.shape[1])), sharpness)


@dataclass(frozen=True)
class ConstantScalings:
    """A function ``(ids, sharpness, weight, bias, ...)`` -> constant scalings (batch, length, layers * experts).

    All scalings are ``value`` before experts are left out. They weigh the experts in the base pass whose hidden state
    the classifier reads.
    """

    rule: ScalingRule
    value: float

    def __call__(self, ids: Tensor, sharpness: Tensor, *layers: Tensor) -> Tensor:
        bias = layers[-1]
        same = self.rule.zero_unselected(torch.full_like(bias, self.value)).flatten()
        return same.expand(ids.shape[0], ids.shape[1], same.shape[0])
