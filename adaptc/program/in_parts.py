"""Tensors of which each of several processes holds a part (FSDP2), as the whole, and back.

Before and after: a ``DTensor`` on a mesh of processes is in parts; every other tensor is whole. What is in parts is put
together by all processes of its mesh: each must make the same calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from adaptc.errors import CheckpointError


def mesh_of(t: Tensor) -> Any:
    """The processes that hold parts of a tensor, None for one that is whole."""
    return getattr(t, "device_mesh", None) if dist.is_available() and dist.is_initialized() else None


def whole(t: Tensor) -> Tensor:
    """All of a tensor."""
    return t if mesh_of(t) is None else t.full_tensor()  # type: ignore[attr-defined]


def take_apart(module: Any) -> None:
    """Have FSDP hold its parameters in parts again, which are whole for a while after a forward pass."""
    module.state_dict()  # before which it does


def as_held(t: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, which every process has, as ``own`` is held."""
    if mesh_of(own) is None:
        return t
    from torch.distributed.tensor import distribute_tensor

    held: Any = own
    return distribute_tensor(t.to(own.device), held.device_mesh, held.placements, src_data_rank=None)


@contextmanager
def first_of(mesh: Any) -> Iterator[bool]:
    """Whether this process is the first of a mesh; True for None. All processes leave together, and raise
    CheckpointError where one of them raises."""
    if mesh is None:
        yield True
        return
    failed = torch.ones((), device=mesh.device_type)
    try:
        yield not any(mesh.get_coordinate())
        failed.zero_()
    finally:
        for group in mesh.get_all_groups():
            dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if failed:
        raise CheckpointError("the first process could not write: its error says why")
