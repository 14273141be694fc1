"""A pipeline of two stages next to one process: SmolLM2's sizes, rank 16 on all linear layers, 8 microbatches of a row.

Each process has one thread, on a core of its own. The process that runs alone adds up the gradients of the same
microbatches, one after the other. While it runs, the other process waits. Both sides take an AdamW step. The cut is
that of ``adaptc.split``, which balances the elements of weights that matmuls read: the head counts, embeddings do not.

``python -m tests.benchmarks.pipeline [rounds] [layers]`` prints the rows, with the load of the machine.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import adaptc
from adaptc.distributed import TrainingPipeline
from tests.benchmarks.harness import interleave, machine, markdown
from tests.benchmarks.model import RANK, smollm2, tokens

STAGES, MICROBATCHES, LENGTH = 2, 8, 64


def run(rank: int, folder: str, rounds: int, layers: int) -> None:
    """Run one of the two processes; the first one prints the rows."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=STAGES)
    base = smollm2()
    base.model.layers = base.model.layers[:layers]
    base.config.num_hidden_layers = layers
    config = adaptc.LoraConfig(r=RANK, target_modules="all-linear")
    program = adaptc.compile(base, config, training=True, generator=torch.Generator().manual_seed(0))
    batch = tokens(MICROBATCHES, LENGTH)
    batch["labels"] = batch["input_ids"]
    module = copy.deepcopy(program).module()
    own = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    pipe = TrainingPipeline(adaptc.split(program, STAGES).keep(rank), microbatches=MICROBATCHES)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-4)
    losses: dict[str, list[float]] = {"one process": [], "pipeline": []}

    def alone() -> None:
        dist.barrier()
        if rank == 0:
            total = 0.0
            for i in range(MICROBATCHES):
                loss = module(**{n: t[i : i + 1] for n, t in batch.items()}).loss / MICROBATCHES
                loss.backward()
                total += loss.item()
            own.step()
            own.zero_grad()
            losses["one process"].append(total)
        dist.barrier()

    def together() -> None:
        dist.barrier()
        losses["pipeline"].append(pipe.step(**batch).item())
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()

    rows = interleave(
        f"a step of {MICROBATCHES} microbatches of {LENGTH} tokens, {layers} layers",
        {"one process": alone, "two stages in two processes": together},
        "one process",
        rounds,
    )
    if rank == 0:
        torch.testing.assert_close(losses["pipeline"], losses["one process"], rtol=1e-4, atol=0)
        print(markdown(rows))
    dist.destroy_process_group()


def main(rounds: int = 5, layers: int = 30) -> None:
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (str(Path(folder)), rounds, layers), STAGES)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
