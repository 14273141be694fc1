"""Copies of a program's tensors, in which what was one tensor stays one.

Before: a program opened for editing. After ``clone_tensors``: tensors of its own, as ``copy.deepcopy`` would make them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.storage import storage_key


def clone_tensors(lifted: Lifted, memo: dict[int, Any]) -> None:
    """Give ``lifted`` clones in the place of its tensors; ``memo`` is that of the copy."""
    for tensors in (lifted.state_dict, lifted.constants):
        clones: dict[Any, Any] = {}
        for name, t in tensors.items():
            if isinstance(t, Tensor):
                key = storage_key(t)
                clones[key] = tensors[name] = clones.get(key, memo.get(id(t), mapped(t, Tensor.clone)))
                memo[id(t)] = clones[key]


def mapped(t: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` of a tensor, as a parameter if it is one."""
    new = function(t.detach())
    return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
