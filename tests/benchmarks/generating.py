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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch

import adaptc
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.cache.step_cache import StepCache, as_transformers_cache
from adaptc.tables import format_bytes
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
        packaged = adaptc.load_package(adaptc.package(gen, sides.dirs[0].parent / "generator.pt2"))
        candidates |= {"adaptc, AOTInductor": packaged}
    rows: list[Row] = []
    for batch in (1, 8):
        calls = {name: decode_call(model, batch, PROMPT, NEW) for name, model in candidates.items()}
        with _peft_compiled(sides.peft) if inductor else nullcontext() as compiled:
            if compiled is not None:
                static = {"cache_implementation": "static", "disable_compile": True}
                calls["PEFT, torch.compile, static cache"] = decode_call(compiled, batch, PROMPT, NEW, **static)
            rows += per_token(interleave(f"generate, batch {batch}, per new token", calls, "PEFT", rounds, 1), NEW)
    calls = {name: decode_call(model, 1, 512, 1) for name, model in candidates.items()}
    rows += interleave("first token of a prompt of 512", calls, "PEFT", rounds, 1)
    loop = adaptc.compile_for_generation(_least(), adaptc.LoraConfig(target_modules=["q_proj"]), max_batch=8)
    rows += per_token(
        interleave("transformers' loop (a model of width 8)", {"adaptc": decode_call(loop, 1, 4, NEW)}, "adaptc"), NEW
    )
    print(f"the least a step of one row can take: {_floor(sides, gen):.1f} ms", file=sys.stderr)
    return rows


@contextmanager
def _peft_compiled(model: Any) -> Iterator[Any]:
    """PEFT's model, whose steps are compiled when a cache of fixed length is passed: others go on as they were."""
    inner = model.base_model.model
    plain, code = inner.forward, torch.compile(inner.forward)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        static = type(kwargs.get("past_key_values")).__name__ == "StaticCache"
        return (code if static else plain)(*args, **kwargs)

    inner.forward = forward
    try:
        yield model
    finally:
        inner.forward = plain


def decode_call(model: Any, batch: int, length: int, new: int, **more: Any) -> Callable[[], None]:
    """Return a call that generates ``new`` tokens after a prompt of ``length``, greedily."""
    inputs = tokens(batch, length)
    inputs["input_ids"] %= model.config.vocab_size
    ends: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}

    def call() -> None:
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=new, do_sample=False, **ends, **more)
        assert out.shape == (batch, length + new)

    return call


def per_token(rows: list[Row], count: int) -> list[Row]:
    """Return the rows of calls that make ``count`` tokens as rows of one token."""
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


#: attention of models: (class, sizes of the cache, as their configs have them)
_CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3.2 1B": ("Llama", {"num_hidden_layers": 16, "num_key_value_heads": 8, "head_dim": 64}),
    "mistral 7B v0.1": (
        "Mistral",
        {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 4096},
    ),
    "gemma 2 2B": (
        "Gemma2",
        {"num_hidden_layers": 26, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
    ),
    "gemma 3 1B": (
        "Gemma3Text",
        {"num_hidden_layers": 26, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512},
    ),
}


def memory(positions: int = 8192) -> str:
    """A table of the bytes of one row's cache in bfloat16: of every position, as transformers' static cache has them,
    and as this one has. Nothing of the models but their caches has its size."""
    import transformers

    lines = [f"| a row of {positions} positions | all kept | StaticCache | adaptc |", "|---|---:|---:|---:|"]
    for name, (family, cache) in _CACHES.items():
        small: dict[str, Any] = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 8}
        config = getattr(transformers, f"{family}Config")(**small, **cache, max_position_embeddings=positions)
        model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).to(torch.bfloat16)
        layout = CacheLayout.from_model(model)
        theirs = transformers.StaticCache(config=config, max_cache_len=positions)
        heads, dim = cache["num_key_value_heads"], cache["head_dim"]
        theirs.early_initialization(1, heads, dim, torch.bfloat16, torch.device("cpu"))
        ours = as_transformers_cache(StepCache)(layout, None, positions, torch.device("cpu"), layout.sliding_window)
        ours.reserve(1, positions)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in theirs.layers)
        lines.append(
            f"| {name} | {format_bytes(layout.nbytes(1, positions))} | {format_bytes(held)} | "
            f"{format_bytes(ours.nbytes)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        made = run(Sides(Path(folder)), int(os.environ.get("ROUNDS", "5")), "--inductor" in sys.argv)
    print(f"Measured on {machine()}, load {load:.1f} before and {os.getloadavg()[0]:.1f} after.\n")
    print(markdown(made), "\n\n", memory(), sep="")
