"""Gather tensors that FSDP2 shards over several processes, and shard them again.

A ``DTensor`` on a device mesh is a sharded tensor; every other tensor is whole. Gathering one is a collective
operation: all processes of its mesh must make the same calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from adaptc.errors import AdaptcError, CheckpointError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor


def mesh_of(t: Tensor) -> Any:
    """Return the device mesh over which ``t`` is sharded; None for a whole tensor, and outside of torch.distributed."""
    return getattr(t, "device_mesh", None) if dist.is_available() and dist.is_initialized() else None


def gather(t: Tensor) -> Tensor:
    """Return ``t`` gathered from all processes of its mesh, or ``t`` itself where it is whole."""
    return t if mesh_of(t) is None else t.full_tensor()  # type: ignore[attr-defined]


def check_not_sharded(module: nn.Module, names: Collection[str]) -> None:
    """Raise AdaptcError where FSDP2 has replaced one of the quantised weights ``names`` by a shard of its values."""
    if not any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
        return
    for name in names:
        if not isinstance(module.get_parameter(name), QuantizedTensor):
            raise AdaptcError(
                f"fully_shard made plain values of the quantised weight {name!r}, and shards those, which takes more "
                "memory than the weight did. Keep frozen weights whole in each process: fully_shard(module, "
                "ignored_params={p for p in module.parameters() if not p.requires_grad}) of a new module"
            )


def reshard(module: Any) -> None:
    """Have FSDP2 shard the parameters of ``module`` again, which a forward pass leaves gathered for a while."""
    module.state_dict()  # FSDP2 shards them in its hook that runs before this


def shard_like(t: Tensor, like: Tensor) -> Tensor:
    """Return ``t``, a whole tensor that every process has, sharded as ``like`` is. Each process cuts its shard from its
    own copy."""
    if mesh_of(like) is None:
        return t
    from torch.distributed.tensor import distribute_tensor

    held: Any = like
    return distribute_tensor(t.to(like.device), held.device_mesh, held.placements, src_data_rank=None)


@contextmanager
def is_first_process(mesh: Any) -> Iterator[bool]:
    """Run the block with whether this process is the first of ``mesh``; True where ``mesh`` is None.

    All processes of the mesh leave the block together. Where the block raises in one of them, the others raise
    CheckpointError.
    """
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
