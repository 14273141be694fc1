"""X-LoRA's classifier: how much each expert counts at each token, of the last hidden state of the base.

A stack of linear layers with ReLU in between gives a number for each layer of the model (or one for all) and expert.
These are *scalings*, by a softmax or as they are; of them the largest alone may count. Shapes: hidden (batch, length,
width) -> (batch, length, layers, experts), in the dtype of the classifier. Where layers, experts and sharpness come
from is in the tensors, so that one function serves adapters of any number of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Choice:
    """What follows from the scalings: ``softmax`` over all experts, ``top_k`` of them (None: all), ``softmax_topk``
    over those chosen."""

    softmax: bool = True
    top_k: int | None = None
    softmax_topk: bool = False

    def scaled(self, logits: Tensor, sharpness: Tensor) -> Tensor:
        """``sharpness``: one over the temperature, so that an adapter that is all zeros has scalings, too."""
        return torch.softmax(logits * sharpness, -1) if self.softmax else logits

    def chosen(self, scalings: Tensor) -> Tensor:
        """Scalings of the same shape, of which those that do not count are zero. A scaling of zero counts as not
        chosen, as in PEFT."""
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
class Classify:
    """``(hidden, sharpness, weight, bias, ...)`` -> (batch, length, layers * experts). The weights of all layers but
    the last are as those of ``Linear``; the last has (layers, experts, in) and (layers, experts)."""

    choice: Choice
    dropout: float = 0.0
    training: bool = False

    def __call__(self, hidden: Tensor, sharpness: Tensor, *layers: Tensor) -> Tensor:
        return self.choice.chosen(self.scalings(hidden, sharpness, *layers)).flatten(2)

    def scalings(self, hidden: Tensor, sharpness: Tensor, *layers: Tensor) -> Tensor:
        h = hidden.detach().to(layers[0].dtype)
        *inner, weight, bias = layers
        for w, b in zip(inner[::2], inner[1::2], strict=True):
            h = F.relu(F.linear(h, w, b))
            if self.training and self.dropout:
                h = F.dropout(h, self.dropout, training=True)
        logits = F.linear(h, weight.flatten(0, 1), bias.flatten())
        return self.choice.scaled(logits.unflatten(-1, (weight.shape[0], weight.shape[1])), sharpness)


@dataclass(frozen=True)
class Constant:
    """``(ids, sharpness, weight, bias, ...)`` -> (batch, length, layers * experts), all of one value that the choice
    is then made of: how experts count in the pass that the classifier reads."""

    choice: Choice
    value: float

    def __call__(self, ids: Tensor, sharpness: Tensor, *layers: Tensor) -> Tensor:
        bias = layers[-1]
        same = self.choice.chosen(torch.full_like(bias, self.value)).flatten()
        return same.expand(ids.shape[0], ids.shape[1], same.shape[0])
