"""Requests of several adapters under continuous batching: next to transformers' base alone, to requests one by one, and
to PEFT's mixed batches.

``python -m tests.benchmarks.serving [float32|bfloat16] [rounds]``. Sixteen requests over five adapters of rank 16 on
all linear layers and the base, prompts of 16 to 256 tokens, 32 new tokens each. All sides have the same weights. The
aims, in tokens a second of the mixed requests:

    over transformers' continuous batching of the base alone     0.90 in float32, 1.00 in bfloat16
    over adaptc's generate, one request after another            2.5
    over PEFT's generate with adapter_names, padded, by eight    1.5
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig

import adaptc
from tests.benchmarks.harness import Row, interleave, machine
from tests.benchmarks.model import RANK, smollm2

REQUESTS, ADAPTERS, NEW, LENGTHS = 16, 5, 32, (16, 256)
SIZES: dict[str, int] = {"max_batch_tokens": 256, "num_blocks": 256, "page_size": 32}


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.linspace(*LENGTHS, REQUESTS).int()[torch.randperm(REQUESTS, generator=draw)]
    return [torch.randint(3, 49152, (int(n),), generator=draw).tolist() for n in lengths]


def names() -> list[str | None]:
    return [None if i % (ADAPTERS + 1) == ADAPTERS else f"a{i % (ADAPTERS + 1)}" for i in range(REQUESTS)]


def greedy(model: Any) -> Any:
    made = copy.deepcopy(model.generation_config)
    made.update(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    return made


class Sides:
    """The same weights and adapters on each side."""

    def __init__(self, dtype: torch.dtype, folder: Path) -> None:
        self.texts, self.names, self.base = prompts(), names(), smollm2().to(dtype)
        config = adaptc.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
        program = adaptc.compile(self.base, config)
        self.adapters: dict[str, Path] = {}
        for i in range(ADAPTERS):
            for t in program.binding.values.values():
                if t.ndim > 1:
                    torch.nn.init.normal_(t, std=0.02)
            self.adapters[f"a{i}"] = adaptc.save_adapter(program, folder / f"a{i}")
        del program
        self.serving = adaptc.compile_for_serving(self.base, config, adapters=self.adapters, **SIZES)
        self.generator = adaptc.compile_for_generation(self.base, config, max_batch=1, max_length=512)
        self.bank = self.generator.bank(self.adapters)
        self.peft: Any = None
        for name, path in self.adapters.items():
            if self.peft is None:
                self.peft = peft.PeftModel.from_pretrained(copy.deepcopy(self.base), path, adapter_name=name)
            else:
                self.peft.load_adapter(path, adapter_name=name)
        self.peft = self.peft.eval()

    def served(self) -> Any:
        return self.serving.generate_batch(self.texts, adapters=self.names, generation_config=greedy(self.serving))

    def served_by_one(self) -> Any:
        one = ["a0"] * REQUESTS
        return self.serving.generate_batch(self.texts, adapters=one, generation_config=greedy(self.serving))

    def base_alone(self) -> Any:
        return self.base.generate_batch(
            self.texts,
            generation_config=greedy(self.base),
            continuous_batching_config=ContinuousBatchingConfig(**SIZES),
        )

    def one_by_one(self) -> Any:
        return [
            self.bank.generate(torch.tensor([t]), adapters=[n], generation_config=greedy(self.generator))
            for t, n in zip(self.texts, self.names, strict=True)
        ]

    def padded(self) -> Any:
        out: list[Any] = []
        for start in range(0, REQUESTS, 8):
            ids, mask = left_padded(self.texts[start : start + 8])
            chosen = [n or "__base__" for n in self.names[start : start + 8]]
            with torch.no_grad():
                out.append(
                    self.peft.generate(
                        input_ids=ids, attention_mask=mask, adapter_names=chosen, generation_config=greedy(self.base)
                    )
                )
        return out


def left_padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), longest, dtype=torch.int64), torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :], mask[row, longest - len(text) :] = torch.tensor(text), 1
    return ids, mask


def run(dtype: torch.dtype, folder: Path, rounds: int, with_peft: bool = True) -> list[Row]:
    sides = Sides(dtype, folder)
    calls: dict[str, Callable[[], object]] = {
        "transformers, continuous batching of the base": sides.base_alone,
        "adaptc, mixed requests": sides.served,
        "adaptc, all requests on one adapter": sides.served_by_one,
    }
    # These take minutes, and are far enough away to be told by one call.
    slow: dict[str, Callable[[], object]] = {"adaptc, generate one by one": sides.one_by_one}
    if with_peft:
        slow["PEFT, generate with adapter_names, padded by eight"] = sides.padded
    work = f"{REQUESTS} requests, {str(dtype).rpartition('.')[2]}"
    return interleave(work, calls, next(iter(calls)), rounds, 1) + interleave(work, slow, next(iter(slow)), 1, 0)


def in_tokens(rows: list[Row]) -> str:
    """The rows as tokens a second."""
    lines = ["| work | candidate | tokens a second | of the first |", "|---|---|---:|---:|"]
    first = rows[0].milliseconds
    for row in rows:
        rate = REQUESTS * NEW / row.milliseconds * 1e3
        lines.append(f"| {row.work} | {row.candidate} | {rate:.1f} | {first / row.milliseconds:.2f} |")
    return "\n".join(lines)


def delays(dtype: torch.dtype, folder: Path) -> str:
    """Times to the first token and between tokens of the mixed requests, all at once."""
    sides = Sides(dtype, folder)
    out = sides.serving.generate_batch(
        sides.texts, adapters=sides.names, generation_config=greedy(sides.serving), record_timestamps=True
    )
    first = [o.timestamps[0] - o.created_time for o in out.values()]
    gaps = [b - a for o in out.values() for a, b in zip(o.timestamps, o.timestamps[1:], strict=False)]

    def row(what: str, times: list[float]) -> str:
        cuts = statistics.quantiles(times, n=100, method="inclusive")
        return f"| {what} | {cuts[49] * 1e3:.0f} | {cuts[98] * 1e3:.0f} |"

    lines = ["| ms | p50 | p99 |", "|---|---:|---:|", row("to the first token", first), row("between tokens", gaps)]
    return "\n".join(lines)


if __name__ == "__main__":
    load = os.getloadavg()[0]
    chosen = getattr(torch, sys.argv[1]) if len(sys.argv) > 1 else torch.float32
    with tempfile.TemporaryDirectory() as made_in:
        start = time.perf_counter()
        print(f"Measured on {machine()}, load {load:.1f} before.\n")
        print(in_tokens(run(chosen, Path(made_in), int(sys.argv[2]) if len(sys.argv) > 2 else 3)), "\n")
        print(delays(chosen, Path(made_in)))
        print(f"\n{time.perf_counter() - start:.0f} s")
