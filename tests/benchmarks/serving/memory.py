"""Tell by how much a process grows that serves: the pools of keys and values, the bank, and what else there is."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import torch

import adaptc
from tests.benchmarks.model import smollm2
from tests.benchmarks.serving.work import CONFIG, SIZES, greedy, names, prompts, write_adapters


def memory_of_serving(dtype: torch.dtype, folder: Path) -> str:
    """Return a line about a process of its own, for what was freed before would hide what is taken."""
    command = [sys.executable, "-m", "tests.benchmarks.serving.memory", str(dtype).rpartition(".")[2], str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))


def main(dtype_name: str, folder: str) -> None:
    dtype = getattr(torch, dtype_name)
    model = smollm2().to(dtype)
    adapters = write_adapters(model, Path(folder))
    serving = adaptc.compile_for_serving(model, CONFIG, **SIZES)
    few = {"adapters": [None], "generation_config": greedy(serving)}
    serving.generate_batch(prompts()[:1], **few)  # what a process takes once
    gc.collect()
    before = resident()
    for name, path in adapters.items():
        serving.bank.add(name, str(path))
    manager = serving.init_continuous_batching(generation_config=greedy(serving))
    manager.start()
    waiting = {manager.add_request(t, adapter=n, max_new_tokens=32) for t, n in zip(prompts(), names(), strict=True)}
    while waiting:
        out = manager.get_result(timeout=1)
        if out is not None and out.is_finished():
            waiting.discard(out.request_id)
    gc.collect()
    grown = resident() - before
    config = model.config
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    pools = SIZES["num_blocks"] * SIZES["page_size"] * config.num_hidden_layers * 2 * width * dtype.itemsize
    bank = sum(t.nbytes for name in adapters for t in serving.bank[name].values.values())
    # The adapters themselves, and the stack of them that a step reads.
    print(
        f"Memory: pools of {pools >> 20} MB, five adapters of {bank >> 20} MB in all and their stack of as much; the "
        f"process grew by {grown >> 20} MB, {grown / (pools + 2 * bank):.2f} of these."
    )
    manager.stop(block=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
