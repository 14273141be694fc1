"""A segment of a training graph that is computed again in the backward, instead of keeping what the backward needs.

Before and after: a graph module whose results follow from its inputs and the random state, and that writes to nothing
that was there before it. Outputs and gradients are those of the graph, bit for bit: dropout draws the same masks again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """Runs ``body``, and again in the backward where ``on``, in training, with gradients; else once. The body holds no
    parameters: it is handed all it reads."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body
        self.on = True

    def forward(self, *inputs: Any) -> Any:
        if self.on and self.training and torch.is_grad_enabled():
            return checkpoint(self.body, *inputs, use_reentrant=False)
        return self.body(*inputs)
