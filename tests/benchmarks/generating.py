"""Generating text next to PEFT, one interleaved run: SmolLM2's sizes, rank 16 on all linear layers, greedy, per token.

``python -m tests.benchmarks.generating`` prints these rows alone, with the load of the machine. All sides have a cache,
and all run transformers' own ``generate``. A row tells what its loop costs, and one the least that a step can take: the
bytes of weights and cache it reads over the bandwidth of the machine.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import adaptc
from tests.benchmarks.against_peft import Sides
from tests.benchmarks.harness import Row, interleave, machine, markdown
from tests.benchmarks.model import tokens

PROMPT, NEW = 16, 64


def run(sides: Sides, rounds: int = 5, inductor: bool = False) -> list[Row]:
    """Rows of the times per new token, and to the first one of a long prompt."""
    for model in (sides.base, sides.peft):
        model.generation_config.use_cache = model.config.use_cache = True  # type: ignore[union-attr]
    adapter = str(sides.dirs[0])
    gen = adaptc.compile_for_generation(sides.base, adapter, max_batch=8, max_length=1024)
    candidates: dict[str, Any] = {"transformers base": sides.base, "PEFT": sides.peft}
    candidates |= {"adaptc": gen, "gen.base": gen.base}
    if inductor:
        made = adaptc.compile_for_generation(sides.base, adapter, max_batch=8, max_length=1024, backend="inductor")
        candidates |= {"adaptc, inductor": made, "gen.base, inductor": made.base}
    rows: list[Row] = []
    for batch in (1, 8):
        calls = {name: _call(model, batch, PROMPT, NEW) for name, model in candidates.items()}
        rows += _each(interleave(f"generate, batch {batch}, per new token", calls, "PEFT", rounds, 1), NEW)
    calls = {name: _call(model, 1, 512, 1) for name, model in candidates.items()}
    rows += interleave("first token of a prompt of 512", calls, "PEFT", rounds, 1)
    loop = adaptc.compile_for_generation(_least(), adaptc.LoraConfig(target_modules=["q_proj"]), max_batch=8)
    rows += _each(
        interleave("transformers' loop (a model of width 8)", {"adaptc": _call(loop, 1, 4, NEW)}, "adaptc"), NEW
    )
    print(f"the least a step of one row can take: {_floor(sides, gen):.1f} ms", file=sys.stderr)
    return rows


def _call(model: Any, batch: int, length: int, new: int) -> Callable[[], None]:
    inputs = tokens(batch, length)
    inputs["input_ids"] %= model.config.vocab_size
    ends: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}

    def call() -> None:
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=new, do_sample=False, **ends)
        assert out.shape == (batch, length + new)

    return call


def _each(rows: list[Row], count: int) -> list[Row]:
    return [Row(r.work, r.candidate, r.milliseconds / count, r.ratio, r.rounds) for r in rows]


def _least() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, max_position_embeddings=128)).eval()


def _floor(sides: Sides, gen: Any) -> float:
    """Milliseconds to read the weights and a cache of one row, at the bandwidth of a sum over large memory."""
    memory = torch.ones(2**26)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - start)
    with torch.no_grad():
        cache = gen.prefill(tokens(1, PROMPT + NEW)["input_ids"])
    read = sum(p.nbytes for p in sides.base.parameters()) + cache.nbytes
    return read / (memory.nbytes / best) * 1e3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        made = run(Sides(Path(folder)), int(os.environ.get("ROUNDS", "5")), "--inductor" in sys.argv)
    print(f"Measured on {machine()}, load {load:.1f} before and {os.getloadavg()[0]:.1f} after.\n")
    print(markdown(made))
