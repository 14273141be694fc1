"""What processes do together with a base that is sharded, or streamed; see ``tests.ecosystem.two_processes``."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard

import adaptc
from adaptc import CheckpointError, LoraConfig
from adaptc.distributed import StagedModule, TrainingPipeline, compile_from_config, load_base, load_state, save_state
from tests.distributed.models import (
    CONFIG,
    even_batch,
    exact_loss,
    optimizer_of,
    own_program,
    program,
    step_with,
)

#: a base whose blocks are nearly all of it
BLOCKS = 8


def prepare() -> None:
    program()


def sharded(whole: adaptc.AdaptedProgram, stages: int) -> StagedModule:
    module = StagedModule(adaptc.split(whole, stages))
    for stage in module.stages:
        fully_shard(stage)
    return fully_shard(module)


def own_rows(seed: int) -> dict[str, torch.Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    return {k: t.chunk(size)[rank] for k, t in even_batch(seed=seed).items()}


def step_sharded(module: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """One step on this process's rows; the loss is that of all."""
    optimizer.zero_grad()
    rows = own_rows(seed)
    loss = exact_loss(module(**rows), rows["labels"])
    loss.backward()
    optimizer.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).item()


def meta_fsdp(folder: Path) -> Any:
    """A base from files straight into shards, which trains."""
    generator = torch.Generator().manual_seed(1)
    whole = compile_from_config(folder / "base", LoraConfig(**CONFIG), generator=generator)
    module = sharded(whole, 2)
    load_base(module, folder / "base")
    optimizer = optimizer_of([p for p in module.parameters() if p.requires_grad])
    losses = [step_sharded(module, optimizer, seed) for seed in range(3)]
    module.save_adapter(folder / "meta_fsdp")
    return {"losses": losses}


def meta_pipeline(folder: Path) -> Any:
    """The base of each stage from files, and no other part of it."""
    generator = torch.Generator().manual_seed(1)
    whole = compile_from_config(folder / "base", LoraConfig(**CONFIG), generator=generator)
    pipe = load_base(TrainingPipeline(adaptc.split(whole, 2), microbatches=2, loss=exact_loss), folder / "base")
    held = sum(t.numel() for m in pipe.modules.values() for t in m.parameters() if not t.requires_grad)
    optimizer = optimizer_of(pipe.parameters())
    losses = [step_with(pipe, optimizer, seed, exact=True) for seed in range(3)]
    pipe.save_adapter(folder / "meta_pipeline")
    return {"losses": losses, "held": held}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """How many bytes of memory of its own the process has at most in the block, beyond what it begins with."""
    found, done = [0], threading.Event()

    def memory() -> int:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        match = re.search(r"RssAnon:\s+(\d+) kB", text)
        assert match is not None
        return int(match[1]) * 1024

    before = memory()

    def watch() -> None:
        while not done.is_set():
            found[0] = max(found[0], memory() - before)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def large_config() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
    return transformers.LlamaConfig(**sizes, num_hidden_layers=BLOCKS, tie_word_embeddings=True, dtype="float32")


def memory_of_start(folder: Path) -> Any:
    """What compiling takes, then the base, and then one step of which no process has all of the base."""
    with peak_memory() as compiling:
        whole = compile_from_config(folder / "large", LoraConfig(r=2, target_modules=["q_proj"]))
    with peak_memory() as found:
        module = load_base(sharded(whole, BLOCKS), folder / "large")
        start = found[0]
        rows = {k: t[:, :3] for k, t in own_rows(0).items()}
        module(**rows).loss.backward()
    peaks = torch.tensor([compiling[0], start, found[0]])
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return dict(zip(("compile", "start", "step"), peaks.tolist(), strict=True))


# -- a process is killed -----------------------------------------------------------------------------------------------


def go_on(folder: Path, trained: Any, optimizer: Any, step: Callable[[int], float], killed: int | None) -> Any:
    """Six steps, or those that are left, with a state after every second; the process ``killed`` ends in the fifth."""
    first, extra = load_state(folder, trained, optimizer) or (0, {"losses": []})
    losses = list(extra["losses"])
    for i in range(first, 6):
        losses.append(step(i))
        if i % 2:
            save_state(folder, trained, optimizer, i + 1, extra={"losses": losses})
        if i == 4 and dist.get_rank() == killed:
            os.kill(os.getpid(), signal.SIGKILL)
    return {"first": first, "losses": losses}


def train_pipeline(folder: Path, stages: int, kill: bool) -> Any:
    from tests.distributed.pipeline_jobs import CUTS

    size = dist.get_world_size()
    halves = adaptc.split(own_program(), boundaries=CUTS[stages])
    pipe = TrainingPipeline(halves, microbatches=max(2, size), loss=exact_loss)
    optimizer = optimizer_of(pipe.parameters())
    found = go_on(
        folder / "states", pipe, optimizer, lambda i: step_with(pipe, optimizer, i, exact=True), 1 if kill else None
    )
    pipe.save_adapter(folder / "pipeline")
    return found


def pipeline_killed(folder: Path) -> Any:
    return train_pipeline(folder, 2, True)


def pipeline_goes_on(folder: Path) -> Any:
    return train_pipeline(folder, 4, False)


def state_in_a_file(folder: Path) -> Any:
    module = own_program().module()
    optimizer = optimizer_of([p for p in module.parameters() if p.requires_grad])
    with pytest.raises(CheckpointError) as raised:
        save_state(folder / "file", module, optimizer, 1)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, str(raised.value))
    return found


def train_sharded(folder: Path, kill: bool) -> Any:
    module = sharded(own_program(), 2)
    optimizer = optimizer_of([p for p in module.parameters() if p.requires_grad])
    found = go_on(
        folder / "shards", module, optimizer, lambda i: step_sharded(module, optimizer, i), 0 if kill else None
    )
    module.save_adapter(folder / "sharded")
    return found


def sharded_killed(folder: Path) -> Any:
    return train_sharded(folder, True)


def sharded_goes_on(folder: Path) -> Any:
    return train_sharded(folder, False)
