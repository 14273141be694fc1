"""Copy a model's modules without its tensors, so that the same model can be captured again for other inputs.

The copy holds none of the tensors that somebody else keeps. So it takes no memory, and later changes to the model do
not reach it. :meth:`ModelSkeleton.with_tensors` makes a model on the tensors as they are by then.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ModelSkeleton:
    """A copy of a model's modules, in which meta tensors stand for the tensors that are kept elsewhere.

    ``modules`` is the copy. ``meta_tensors`` maps a tensor's name to its meta tensor; tied tensors share one. Tensors
    that nobody else keeps are in ``modules`` themselves.
    """

    modules: nn.Module
    meta_tensors: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def from_model(cls, model: nn.Module, names: Collection[str]) -> ModelSkeleton | None:
        """Return a skeleton of ``model``, or None for a model that cannot be copied.

        ``names`` are the names of the tensors that are kept elsewhere.
        """
        tensors = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        memo = {id(t): t for t in tensors.values()}
        memo |= {id(t): torch.empty_like(t, device="meta") for n, t in tensors.items() if n in names}
        places = {n: memo[id(t)] for n, t in tensors.items() if n in names}
        try:
            return cls(copy.deepcopy(model, memo), places)
        except Exception:  # any error that a foreign object in the model may raise when it is copied
            return None

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return a model on these tensors themselves, not on copies. Raises KeyError for a missing name."""
        memo = {id(place): tensors[name] for name, place in self.meta_tensors.items()}
        memo |= {id(t): t for t in (*self.modules.parameters(), *self.modules.buffers()) if id(t) not in memo}
        return copy.deepcopy(self.modules, memo)
