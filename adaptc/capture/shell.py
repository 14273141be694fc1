"""A model's modules without its tensors: what the same model can be captured from again, for other inputs.

Before: a model, and the names of tensors that somebody else keeps. After: a copy of its modules that holds none of
those tensors, so it takes no memory and nothing that happens to the model reaches it; :meth:`Shell.filled` gives a
model on whatever the tensors are by then.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Shell:
    """``modules``: the copy; ``places``: name -> the tensor on no device that stands for it there. Tied tensors have
    one. Tensors that nobody else keeps are in ``modules`` themselves."""

    modules: nn.Module
    places: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module, names: Collection[str]) -> Shell | None:
        """``names``: of the tensors that are kept elsewhere. None for a model that cannot be copied."""
        tensors = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        memo = {id(t): t for t in tensors.values()}
        memo |= {id(t): torch.empty_like(t, device="meta") for n, t in tensors.items() if n in names}
        places = {n: memo[id(t)] for n, t in tensors.items() if n in names}
        try:
            return cls(copy.deepcopy(model, memo), places)
        except Exception:  # whatever objects that somebody put into the model have to say
            return None

    def filled(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A model on these tensors, not on copies of them. Raises KeyError for a name that is missing."""
        memo = {id(place): tensors[name] for name, place in self.places.items()}
        memo |= {id(t): t for t in (*self.modules.parameters(), *self.modules.buffers()) if id(t) not in memo}
        return copy.deepcopy(self.modules, memo)
