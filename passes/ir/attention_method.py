"""Methods that add to what an attention gives: tokens of their own that its queries attend to beside the others.

Such a method is attached at the projection behind an attention, the site that names its layer, and its slots are bound,
saved and swapped as all slots are. What it means is said by two functions instead of on the weight, pure and plain
PyTorch, which are traced for all sizes at once:

    tokens(slots) -> (count, width)                what the layer's own projections make keys and values of
    attend(query, keys, values, slots, scored)     what is added: (batch, heads, length, width of a value)

``query`` is that of the attention, (batch, heads, length, width), after whatever the model does to it; ``keys`` and
``values`` are (heads, count, width) of the tokens, as the projections make them; ``scored`` is what the attention makes
of products of queries and keys before it adds anything: its scale, its cap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.passes.ir.method import Initial, Method
from adaptc.passes.ir.method_hooks import Slots
from adaptc.passes.ir.ops import Op

#: products of queries and keys -> scores
Scored = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AttentionMethod(Method):
    """See the module docstring. ``op`` in the hooks is that of the projection behind the attention: the width of the
    model is ``op.out_features``."""

    exact_sizes: ClassVar[bool] = True

    def tokens(self, slots: Slots) -> Tensor:
        raise AssertionError(f"{type(self).__name__} must define tokens()")

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, slots: Slots, scored: Scored) -> Tensor:
        raise AssertionError(f"{type(self).__name__} must define attend()")

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Initial:
        raise AssertionError(f"{type(self).__name__} must define init()")

    def check_merge(self, op: Op) -> str | None:
        return f"{self.name} attends to tokens of its own, which no weight can hold"
