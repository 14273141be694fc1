"""Threads that load and save different programs at once: torch's own code for that works for one at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import nn

import adaptc
from adaptc import LoraConfig

THREADS, ROUNDS = 8, 2


@pytest.mark.long
def test_loads_and_saves_of_different_files(tmp_path: Path) -> None:
    programs, inputs = [], torch.randn(4, 5)
    for n in range(THREADS):
        torch.manual_seed(n)
        config = LoraConfig(r=n + 1, target_modules=["0"], init_lora_weights=False)
        model = nn.Sequential(nn.Linear(5, 7 + n), nn.Tanh(), nn.Linear(7 + n, 3))
        programs.append(adaptc.compile(model, config, example_inputs=inputs))
        adaptc.save(programs[-1], tmp_path / f"{n}.pt2")
    wants = [p(inputs).detach() for p in programs]
    start = Barrier(THREADS)

    def work(n: int) -> None:
        start.wait()
        for turn in range(ROUNDS):
            loaded = adaptc.load(tmp_path / f"{n}.pt2")
            assert torch.equal(loaded(inputs), wants[n])
            adaptc.save(loaded if turn % 2 else programs[n], tmp_path / f"{n}.pt2")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    for n, want in enumerate(wants):
        assert torch.equal(adaptc.load(tmp_path / f"{n}.pt2")(inputs), want)
