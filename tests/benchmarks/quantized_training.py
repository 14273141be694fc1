"""Peak memory and time of a step of training, on a base in bfloat16 and on the same base in NF4.

``python -m tests.benchmarks.quantized_training [size]``, for a size of ``SIZES``. Each side runs in a process of its
own. The peak is the most memory that the process has during a step, as Linux counts it, less what it had before there
was a model. The aim is a ratio of 0.45 at most, on "1.1b".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASES = ("bfloat16", "nf4")
#: name -> sizes of a llama; "1.1b" has those of TinyLlama
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8},
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
#: rows and tokens of a step
BATCH = (1, 128)
MIB = 2**20


def run(size: str) -> str:
    """Measure both bases, and return a table in Markdown."""
    found = {base: _measure(size, base) for base in BASES}
    lines = [
        "| base | weights | peak of a step | of it over the forward's start | step |",
        "|---|---:|---:|---:|---:|",
    ]
    for base, m in found.items():
        step = f"{m['seconds'] * 1e3:.0f} ms"
        lines.append(f"| {base} | {_mib(m['weights'])} | {_mib(m['peak'])} | {_mib(m['step'])} | {step} |")
    ratio = found["nf4"]["peak"] / found["bfloat16"]["peak"]
    return "\n".join([*lines, "", f"The peak in NF4 is {ratio:.2f} of that in bfloat16 (llama, {size})."])


def _mib(count: float) -> str:
    return f"{count / MIB:.0f} MiB"


def _measure(size: str, base: str) -> dict[str, float]:
    """Return the bytes and seconds of one side, from a process of its own."""
    # A weight that is freed goes back to Linux at once, so that the peak is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(4 * MIB), "MALLOC_TRIM_THRESHOLD_": str(4 * MIB)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.quantized_training", size, base]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def _status(name: str) -> int:
    """Return a number of bytes from Linux's description of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def _train(size: str, base: str) -> dict[str, float]:
    import torch

    import adaptc

    config = adaptc.LoraConfig(r=16, target_modules="all-linear")
    _step(_module(SIZES["tiny"], base, config))  # imports what a step needs
    before = _status("VmRSS")
    module = _module(SIZES[size], base, config)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    weights = sum(getattr(t, "stored_bytes", t.nbytes) for t in module.parameters())
    times = []
    start = 0
    for _ in range(3):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is counted anew
        start, began = _status("VmRSS"), time.perf_counter()
        _step(module)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    peak = _status("VmHWM")
    return {"weights": weights, "peak": peak - before, "step": peak - start, "seconds": min(times)}


def _module(sizes: dict[str, int], base: str, config: Any) -> Any:
    import gc

    import torch
    import transformers

    import adaptc

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{"vocab_size": 1024, **sizes}))
    finally:
        torch.set_default_dtype(torch.float32)
    if base != "bfloat16":
        adaptc.quantize(model, base)
    made = adaptc.compile(model, config, training=True).module(gradient_checkpointing="auto").train()
    del model
    gc.collect()
    return made


def _step(module: Any) -> None:
    import torch

    ids = torch.randint(3, 1000, BATCH, generator=torch.Generator().manual_seed(0))
    module(input_ids=ids, labels=ids).loss.backward()


if __name__ == "__main__":
    chosen, *side = sys.argv[1:] or ["1.1b"]
    print(json.dumps(_train(chosen, *side)) if side else run(chosen))
