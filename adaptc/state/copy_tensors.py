"""Copy a program's tensors, so that what was one tensor stays one.

``clone_tensors`` gives a program that was opened for editing tensors of its own, as ``copy.deepcopy`` would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.storage import storage_key


def clone_tensors(lifted: LiftedProgram, memo: dict[int, Any]) -> None:
    """Replace the tensors of ``lifted`` by clones. ``memo``: that of the ``copy.deepcopy`` that this is part of."""
    for tensors in (lifted.state_dict, lifted.constants):
        clones: dict[Any, Any] = {}
        for name, t in tensors.items():
            if isinstance(t, Tensor):
                key = storage_key(t)
                clones[key] = tensors[name] = clones.get(key, memo.get(id(t), map_tensor(t, Tensor.clone)))
                memo[id(t)] = clones[key]


def map_tensor(t: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``function`` of a tensor, as a parameter if the tensor is one."""
    new = function(t.detach())
    return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
