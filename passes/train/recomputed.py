"""Run a segment of a training graph again in the backward, instead of keeping what the backward needs.

The results of the segment must depend on its inputs and the random state alone. It must not write to memory that was
there before, but for inputs that get the same value each time. Outputs and gradients are those of the graph, bit for
bit: dropout draws the same masks again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import checkpoint as checkpointing

#: torch gives its arguments no types
checkpoint: Callable[..., Any] = cast(Any, checkpointing).checkpoint


class RecomputedSegment(nn.Module):
    """A segment ``body`` that runs in the forward, and again in the backward.

    It runs only once where ``is_enabled`` is False, in evaluation mode, and without gradients. The body holds no
    parameters: it gets all that it reads as inputs. ``written``: the positions of inputs that it writes to.
    """

    def __init__(self, body: fx.GraphModule, written: Collection[int] = ()) -> None:
        super().__init__()
        self.body, self.written = body, frozenset(written)
        self.is_enabled = True

    def forward(self, *inputs: Any) -> Any:
        if self.is_enabled and self.training and torch.is_grad_enabled():
            # torch refuses arguments that were written to since, and so these are no arguments.
            body, own = self.body, {i: inputs[i] for i in self.written}

            def run(*others: Any) -> Any:
                rest = iter(others)
                return body(*(own[i] if i in own else next(rest) for i in range(len(inputs))))

            return checkpoint(run, *(t for i, t in enumerate(inputs) if i not in own), use_reentrant=False)
        return self.body(*inputs)
