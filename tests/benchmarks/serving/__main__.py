"""Serve sixteen requests of six adapters at once, and compare tokens a second.

``python -m tests.benchmarks.serving [float32|bfloat16] [rounds] [PYTHON]``. PYTHON is an interpreter of another
environment that has the package ``xllamacpp``; without it there is no row of llama.cpp. All sides have the same
weights, threads and requests (``work.py``). The aims, in tokens a second of the mixed requests:

    over transformers' continuous batching of the base alone     0.90 in float32, 1.00 in bfloat16
    over adaptc's generate, one request after another            2.5
    over PEFT's generate with adapter_names, padded, by eight    1.5
    over llama.cpp's server with six LoRAs, and with one         2.8, 1.15

An open loop at 70 % of the measured rate follows, for a minute; then the memory that serving takes.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import ContinuousBatchingConfig

import adaptc
from tests.benchmarks.harness import Row, interleave, machine
from tests.benchmarks.model import smollm2
from tests.benchmarks.serving.llama_cpp import LlamaServer
from tests.benchmarks.serving.memory import memory_of_serving
from tests.benchmarks.serving.open_loop import run_open_loop
from tests.benchmarks.serving.work import (
    CONFIG,
    NEW,
    REQUESTS,
    SIZES,
    greedy,
    left_padded,
    names,
    prompts,
    write_adapters,
)

#: the share of the measured rate at which requests come in the open loop, and its seconds
SHARE, SECONDS = 0.7, 60.0


class Sides:
    """The same weights and adapters on each side."""

    def __init__(self, dtype: torch.dtype, folder: Path) -> None:
        self.texts, self.names, self.base = prompts(), names(), smollm2().to(dtype)
        self.adapters = write_adapters(self.base, folder)
        self.serving = adaptc.compile_for_serving(self.base, CONFIG, adapters=self.adapters, **SIZES)
        self.half: Any = None
        if dtype != torch.float32:
            half = {"autocast_adapter_dtype": False, **SIZES}
            self.half = adaptc.compile_for_serving(self.base, CONFIG, adapters=self.adapters, **half)
        self.generator = adaptc.compile_for_generation(self.base, CONFIG, max_batch=1, max_length=512)
        self.bank = self.generator.bank(self.adapters)
        self.peft: Any = None
        for name, path in self.adapters.items():
            if self.peft is None:
                self.peft = peft.PeftModel.from_pretrained(copy.deepcopy(self.base), path, adapter_name=name)
            else:
                self.peft.load_adapter(path, adapter_name=name)
        self.peft = self.peft.eval()

    def serve(self, chosen: list[str | None], by: Any = None) -> Any:
        model = by or self.serving
        return model.generate_batch(self.texts, adapters=chosen, generation_config=greedy(model))

    def base_alone(self) -> Any:
        batching = ContinuousBatchingConfig(**SIZES)
        options = {"generation_config": greedy(self.base), "continuous_batching_config": batching}
        return self.base.generate_batch(self.texts, **options)

    def one_by_one(self) -> Any:
        return [
            self.bank.generate(torch.tensor([t]), adapters=[n], generation_config=greedy(self.generator))
            for t, n in zip(self.texts, self.names, strict=True)
        ]

    def padded(self) -> Any:
        for start in range(0, REQUESTS, 8):
            ids, mask = left_padded(self.texts[start : start + 8])
            chosen = [n or "__base__" for n in self.names[start : start + 8]]
            options = {"adapter_names": chosen, "generation_config": greedy(self.base)}
            with torch.no_grad():
                self.peft.generate(input_ids=ids, attention_mask=mask, **options)


def compare(sides: Sides, dtype: torch.dtype, rounds: int, llama: LlamaServer | None) -> list[Row]:
    calls: dict[str, Callable[[], object]] = {
        "transformers, continuous batching of the base": sides.base_alone,
        "adaptc, mixed requests": lambda: sides.serve(sides.names),
        "adaptc, all requests on one adapter": lambda: sides.serve(["a0"] * REQUESTS),
        "adaptc, generate one by one": sides.one_by_one,
    }
    if sides.half is not None:
        calls["adaptc, mixed requests, adapters in half precision"] = lambda: sides.serve(sides.names, sides.half)
    if llama is not None:
        calls["llama.cpp's server, six LoRAs"] = lambda: llama("mixed")
        calls["llama.cpp's server, one LoRA"] = lambda: llama("one")
    work, first = f"{REQUESTS} requests, {str(dtype).rpartition('.')[2]}", next(iter(calls))
    rows = interleave(work, calls, first, rounds, 1)
    # This one takes minutes, and is far enough away to be told by one call.
    padded = "PEFT, generate with adapter_names, padded by eight"
    return rows + interleave(work, {padded: sides.padded}, padded, 1, 0)


def in_tokens(rows: list[Row]) -> str:
    """The rows as tokens a second."""
    lines = ["| work | candidate | tokens a second | of the first |", "|---|---|---:|---:|"]
    first = rows[0].milliseconds
    for row in rows:
        rate = REQUESTS * NEW / row.milliseconds * 1e3
        lines.append(f"| {row.work} | {row.candidate} | {rate:.1f} | {first / row.milliseconds:.2f} |")
    return "\n".join(lines)


def main(dtype_name: str = "float32", rounds: str = "3", python: str = "") -> None:
    load, start, dtype = os.getloadavg()[0], time.perf_counter(), getattr(torch, dtype_name)
    with tempfile.TemporaryDirectory() as folder:
        print(f"Measured on {machine()}, load {load:.1f} before.\n")
        print(memory_of_serving(dtype, Path(folder) / "memory"), "\n", flush=True)
        sides = Sides(dtype, Path(folder))
        llama = LlamaServer(python, dtype, sides.adapters, Path(folder)) if python else None
        rows = compare(sides, dtype, int(rounds), llama)
        print(in_tokens(rows), "\n", flush=True)
        requests_a_second = REQUESTS / rows[1].milliseconds * 1e3
        print(run_open_loop(sides.serving, sides.adapters, SHARE * requests_a_second, SECONDS).table())
        if llama is not None:
            llama.close()
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
