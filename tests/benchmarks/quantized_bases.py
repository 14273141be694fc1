"""Files, decode and prefill of quantised bases: next to bfloat16, and to PEFT on bitsandbytes and torchao.

``python -m tests.benchmarks.quantized_bases [size] [rounds]``, for a size of ``quantized_training.SIZES``. All sides
have the same weights and the same adapter: rank 16 on all linear layers, over weights in bfloat16. The aims, on "1.1b":

    a program's file, int8 and nf4 over bfloat16             0.56 and 0.34 at most
    decode with the adapter over the base alone, int8        1.08
    decode, int8 and int4 over bfloat16                      0.60 and 0.45
    prefill of 128 tokens, int8_dynamic over bfloat16        0.65 with AMX, else 0.80
    decode, int8 and nf4 over PEFT on the libraries          0.70
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import adaptc
from adaptc.tables import format_bytes
from tests.benchmarks.generating import decode_call, per_token
from tests.benchmarks.harness import Row, interleave, machine, markdown
from tests.benchmarks.quantized_training import SIZES

PROMPT, NEW, PREFILL, LENGTH = 8, 12, 128, 192
SCHEMES = ("bfloat16", "int8", "int8_dynamic", "int4", "nf4")


def model_of(size: str, scheme: str = "bfloat16") -> Any:
    """Return a random llama in bfloat16, the same in each call, stored by ``scheme``."""
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = transformers.LlamaConfig(**{"vocab_size": 32000, **SIZES[size]})
        model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return model if scheme == "bfloat16" else adaptc.quantize(model, scheme)


def write_adapter(size: str, folder: Path) -> Path:
    """Write an adapter whose B is not zero, in bfloat16, and return its directory."""
    config = adaptc.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    return adaptc.save_adapter(adaptc.compile(model_of(size), config), folder / "adapter")


def quantise_by_library(model: Any, library: str) -> Any:
    """Quantise the linear layers of ``model`` but its head, in place, and return it.

    ``library`` is "bitsandbytes nf4", "bitsandbytes int8" or "torchao int8".
    """
    import bitsandbytes as bnb
    import torchao.quantization as ao
    from torch import nn

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        if library == "torchao int8":
            ao.quantize_(layer, ao.Int8WeightOnlyConfig())
            continue
        if library == "bitsandbytes nf4":
            options = {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}
            new: Any = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, **options)
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to("cpu"))
    return model


def peft_side(size: str, library: str, adapter: Path) -> Any:
    """Return PEFT's model on a base that ``library`` quantised."""
    import peft

    return peft.PeftModel.from_pretrained(quantise_by_library(model_of(size), library), adapter).eval()


def files(generators: dict[str, Any], folder: Path) -> str:
    """Return a table of the bytes of programs' files."""
    sizes = {name: adaptc.save(gen.program, folder / f"{name}.pt2").stat().st_size for name, gen in generators.items()}
    lines = ["| a program's file | bytes | of bfloat16 |", "|---|---:|---:|"]
    whole = sizes["bfloat16"]
    return "\n".join([*lines, *(f"| {n} | {format_bytes(s)} | {s / whole:.2f} |" for n, s in sizes.items())])


def prefill_call(gen: Any) -> Callable[[], object]:
    ids = torch.randint(3, 1000, (1, PREFILL), generator=torch.Generator().manual_seed(0))

    def call() -> object:
        with torch.no_grad():
            return gen.prefill(ids)

    return call


def run(size: str, rounds: int, folder: Path) -> tuple[str, str]:
    """Measure all sides, and return the table of files and that of times."""
    adapter = write_adapter(size, folder)
    gens: dict[str, Any] = {
        scheme: adaptc.compile_for_generation(model_of(size, scheme), str(adapter), max_batch=1, max_length=LENGTH)
        for scheme in SCHEMES
    }
    table = files(gens, folder)
    rows: list[Row] = []
    for scheme in SCHEMES:
        pair = {"base alone": gens[scheme].base, "adapter": gens[scheme]}
        calls = {name: decode_call(side, 1, PROMPT, NEW) for name, side in pair.items()}
        rows += per_token(interleave(f"decode, {scheme}", calls, "base alone", rounds, 1), NEW)
    calls = {name: decode_call(gen, 1, PROMPT, NEW) for name, gen in gens.items()}
    rows += per_token(interleave("decode", calls, "bfloat16", rounds, 1), NEW)
    rows += interleave(f"prefill of {PREFILL}", {n: prefill_call(g) for n, g in gens.items()}, "bfloat16", rounds, 1)
    for library, scheme in (("bitsandbytes nf4", "nf4"), ("bitsandbytes int8", "int8"), ("torchao int8", "int8")):
        peer = f"PEFT, {library}"
        calls = {peer: decode_call(peft_side(size, library, adapter), 1, PROMPT, NEW)}
        calls["adaptc"] = decode_call(gens[scheme], 1, PROMPT, NEW)
        rows += per_token(interleave(f"decode next to {library}", calls, peer, rounds, 1), NEW)
    return table, markdown(rows)


if __name__ == "__main__":
    load = os.getloadavg()[0]
    chosen, count = [*sys.argv[1:], *("1.1b", "5")[len(sys.argv) - 1 :]][:2]
    with tempfile.TemporaryDirectory() as made_in:
        tables = run(chosen, int(count), Path(made_in))
    print(f"A llama of size {chosen}, measured on {machine()}, load {load:.1f} before.\n")
    print("\n\n".join(tables))
