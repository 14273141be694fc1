"""What the processes of a pipeline do together; see ``tests.ecosystem.two_processes``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import adaptc
from adaptc import AdaptcError, ConfigError
from adaptc.distributed import TrainingPipeline
from tests.distributed.models import (
    SEQ2SEQ_CUTS,
    batch,
    even_batch,
    exact_loss,
    mean_of_tokens,
    optimizer_of,
    own_program,
    program,
    seq2seq_batch,
    seq2seq_program,
    step_with,
    upper_program,
)

#: the modules that stages begin with, some of which are inside of a residual block
CUTS = {2: ["model.layers.1"], 4: ["model.layers.0.mlp", "model.layers.1", "model.layers.1.mlp"]}


def prepare() -> None:
    program()
    program(dtype=torch.float32)


def train(folder: Path, name: str, stages: int, schedule: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Three steps, and the adapter that they left."""
    whole = own_program(dtype=dtype)
    halves = adaptc.split(whole, boundaries=CUTS[stages])
    rank, size = dist.get_rank(), dist.get_world_size()
    exact, kept = dtype == torch.float64, halves.keep(*range(rank, stages, size))
    make = even_batch if exact else batch
    pipe = TrainingPipeline(
        kept, microbatches=max(2, size), schedule=schedule, loss=exact_loss if exact else None
    ).train()
    optimizer = optimizer_of(pipe.parameters())
    losses = [step_with(pipe, optimizer, seed, exact) for seed in range(3)]
    evaluated = pipe.eval().evaluate(**make(seed=5)).item()
    longer = pipe.train().step(**make(rows=8, tokens=9, seed=7)).item()  # in other buffers
    pipe.save_adapter(folder / name)
    return {"losses": losses, "evaluated": evaluated, "longer": longer}


def gpipe(folder: Path) -> Any:
    return train(folder, "gpipe", dist.get_world_size(), "GPipe")


def one_f_one_b(folder: Path) -> Any:
    return train(folder, "one_f_one_b", dist.get_world_size(), "1F1B")


def single(folder: Path) -> Any:
    return train(folder, "single", dist.get_world_size(), "1F1B", torch.float32)


def interleaved(folder: Path) -> Any:
    return train(folder, "interleaved", 4, "Interleaved1F1B")


def looped(folder: Path) -> Any:
    return train(folder, "looped", 4, "LoopedBFS")


def gathered_gradients(pipe: TrainingPipeline) -> dict[str, torch.Tensor]:
    own = {n: p.grad for m in pipe.modules.values() for n, p in m.named_parameters() if p.requires_grad}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {n: g for part in parts for n, g in part.items()}


def upper(folder: Path) -> Any:
    """The first stage trains nothing, and nothing is sent back to it."""
    pipe = TrainingPipeline(adaptc.split(upper_program(), boundaries=CUTS[2]), microbatches=3, loss=exact_loss).train()
    assert bool(list(pipe.parameters())) is (dist.get_rank() == 1)
    pipe.step(**even_batch())
    return gathered_gradients(pipe)


def seq2seq(folder: Path) -> Any:
    """What the encoder gave goes through a stage that only passes it on."""
    split = adaptc.split(seq2seq_program(), boundaries=SEQ2SEQ_CUTS)
    pipe = TrainingPipeline(split, microbatches=2, schedule="Interleaved1F1B", loss=mean_of_tokens).train()
    pipe.step(**seq2seq_batch())
    return gathered_gradients(pipe)


def refused(folder: Path) -> Any:
    """What is refused, in all processes alike, before anything is sent."""
    halves = adaptc.split(own_program(), boundaries=CUTS[2])
    for options, said in (
        ({"schedule": "ZBVZeroBubble"}, "not one of 'GPipe'"),
        ({"schedule": "Interleaved1F1B", "microbatches": 0}, "must be a number from 1"),
        ({"microbatches": 1}, r"'1F1B' does not take 1 microbatches.*greater than or equal to the number of stages"),
    ):
        with pytest.raises(ConfigError, match=said):
            TrainingPipeline(halves, **{"microbatches": 2, **options})
    with pytest.raises(ConfigError, match=r"4 stages in 2 processes: the schedule '1F1B' needs 2 stages"):
        TrainingPipeline(adaptc.split(own_program(), boundaries=CUTS[4]), microbatches=2)
    rank = dist.get_rank()
    with pytest.raises(ConfigError, match=rf"process {rank} runs stage {rank}, which the split does not keep"):
        TrainingPipeline(halves.keep(1 - rank), microbatches=2)
    pipe = TrainingPipeline(halves, microbatches=5)
    with pytest.raises(ConfigError, match="12 rows cannot be cut into 5 equal microbatches"):
        pipe.step(**batch())
    with pytest.raises(ConfigError, match="'labels' has 5 rows, and the batch has 12"):
        pipe.step(**batch() | {"labels": batch()["labels"][:5]})
    with pytest.raises(AdaptcError, match="needs all 2 stages"):
        halves.keep(rank).save_adapter(folder / "none")
    return {}
