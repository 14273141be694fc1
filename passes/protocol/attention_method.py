"""Methods that add to the output of an attention: virtual tokens to which its queries attend beside the model's tokens.

Such a method is attached to the projection behind an attention, which names its layer. Its slots are bound, saved and
swapped as all slots are. It defines two pure functions in plain PyTorch, and none on the weight. They are traced for
all sizes at once:

    tokens(slots) -> (count, width)                virtual tokens, of which the layer's projections make keys and values
    attend(query, keys, values, slots, scored)     the change of the output: (batch, heads, length, value width)

``query`` is that of the attention, (batch, heads, length, width), after all that the model does to it. ``keys`` and
``values`` are (heads, count, width), of the virtual tokens, as the projections make them. ``to_scores`` turns the
matmul of queries and keys into scores as the attention does, by its scale and its cap, before anything is added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import InitialValues, Method
from adaptc.passes.protocol.parts.method_part import Slots
from adaptc.passes.protocol.parts.size_rule import SizeRule

#: matmul of queries and keys -> scores
ScoreFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AttentionMethod(Method):
    """A method that adds to an attention's output; the module docstring lists its functions.

    ``op`` in the hooks is that of the projection behind the attention. The width of the model is ``op.out_features``.
    """

    sizes = SizeRule(exact=True)

    def tokens(self, slots: Slots) -> Tensor:
        """Return the virtual tokens (count, width)."""
        raise AssertionError(f"{type(self).__name__} must define tokens()")

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, slots: Slots, to_scores: ScoreFunction) -> Tensor:
        """Return the change of the attention's output, (batch, heads, length, value width)."""
        raise AssertionError(f"{type(self).__name__} must define attend()")

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        raise AssertionError(f"{type(self).__name__} must define init()")

    def check_merge(self, op: Op) -> str | None:
        return f"{self.name} attends to tokens of its own, which no weight can hold"
