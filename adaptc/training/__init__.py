"""Train a program as a module: Trainer, TRL, FSDP2, checkpoints, and schedules of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptc.public_names import lazy_names

if TYPE_CHECKING:
    from adaptc.training._rooms_above import (  # pyright: ignore[reportMissingModuleSource]  # it is a stub
        AdamParams,
        Datum,
        SamplingParams,
        Service,
        connect,
        sweep,
    )
    from adaptc.training.checkpoints import last_checkpoint
    from adaptc.training.lorafa import lorafa_optimizer
    from adaptc.training.losses.kasa_loss import kasa_loss
    from adaptc.training.losses.monteclora_loss import monteclora_loss
    from adaptc.training.rank_allocator import RankAllocator, orthogonal_loss
    from adaptc.training.subspace_allocator import SubspaceAllocator
    from adaptc.training.trainer_callbacks import check_gradients, trainer_callback

#: public name -> the module that defines it
PUBLIC = {
    "RankAllocator": "adaptc.training.rank_allocator",
    "orthogonal_loss": "adaptc.training.rank_allocator",
    "kasa_loss": "adaptc.training.losses.kasa_loss",
    "monteclora_loss": "adaptc.training.losses.monteclora_loss",
    "SubspaceAllocator": "adaptc.training.subspace_allocator",
    "lorafa_optimizer": "adaptc.training.lorafa",
    "trainer_callback": "adaptc.training.trainer_callbacks",
    "check_gradients": "adaptc.training.trainer_callbacks",
    "last_checkpoint": "adaptc.training.checkpoints",
    "Service": "adaptc.joint_training.service",
    "Datum": "adaptc.joint_training.datum",
    "AdamParams": "adaptc.joint_training.datum",
    "SamplingParams": "adaptc.joint_training.sampling",
    "sweep": "adaptc.joint_training.sweep",
    "connect": "adaptc.joint_training.remote_service",
}

__all__ = [*PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, PUBLIC)
