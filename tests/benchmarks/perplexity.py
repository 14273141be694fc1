"""What quantised bases cost in quality: perplexity of SmolLM2 on a text, next to the libraries of the same schemes.

``python -m tests.benchmarks.perplexity [tokens] [PYTHON]``. The text is Python's own help, which ships with it. Head
and embeddings stay plain. The rows of a library have the same layers quantised by that library. With PYTHON, an
interpreter that has ``xllamacpp``, the rows are those of GGUF files instead, read by adaptc and by llama.cpp. It takes
half a second for a token.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

import adaptc
from examples.quickstart import load_model
from tests.benchmarks import llama_cpp
from tests.benchmarks.peer import Peer
from tests.benchmarks.quantized_bases import quantise_by_library

LENGTH = 512
SCHEMES = ("int8", "int8_dynamic", "int4", "nf4", "fp4")
LIBRARIES = ("bitsandbytes int8", "torchao int8", "bitsandbytes nf4")


def text_ids(tokenizer: Any, count: int) -> torch.Tensor:
    """Return ``count`` tokens of the text as rows (texts, LENGTH)."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return tokenizer(text[: 20 * count], return_tensors="pt").input_ids[0, : count - count % LENGTH].reshape(-1, LENGTH)


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in rows]
    return math.exp(sum(losses) / len(losses))


def run(count: int) -> str:
    """Measure all sides, and return a table."""
    plain, tokenizer = load_model()
    rows = text_ids(tokenizer, count)
    reference = perplexity(plain, rows)
    lines = ["| weights | perplexity | of float32 |", "|---|---:|---:|", f"| float32 | {reference:.3f} | 1.000 |"]

    def add(name: str, model: Any) -> None:
        found = perplexity(model, rows)
        lines.append(f"| {name} | {found:.3f} | {found / reference:.3f} |")
        print(lines[-1], file=sys.stderr, flush=True)

    add("bfloat16", load_model()[0].bfloat16())
    for scheme in SCHEMES:
        add(scheme, adaptc.quantize(load_model()[0], scheme))
    for library in LIBRARIES:
        add(library, quantise_by_library(load_model()[0].bfloat16(), library))
    return "\n".join(lines)


def run_files(count: int, python: str) -> str:
    """Measure SmolLM2's weights stored in each type of GGUF file, as adaptc and llama.cpp read it."""
    plain, tokenizer = load_model()
    rows = text_ids(tokenizer, count)
    lines = ["| file | adaptc | llama.cpp |", "|---|---:|---:|", f"| (float32) | {perplexity(plain, rows):.3f} | |"]
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("F32", "Q8_0", "Q4_0"):
            file = llama_cpp.write_model(Path(folder, f"{kind}.gguf"), kind)
            model = llama_cpp.load_model(file, torch.float32, keep_blocks=kind.startswith("Q"))
            peer = Peer(python, "llama_cpp_peer.py", "losses", file, torch.get_num_threads())
            losses = [peer(" ".join(map(str, row.tolist())))["loss"] for row in rows]
            peer.close()
            lines.append(f"| {kind} | {perplexity(model, rows):.3f} | {math.exp(sum(losses) / len(losses)):.3f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    tokens, *interpreter = sys.argv[1:] or ["8192"]
    print(run_files(int(tokens), *interpreter) if interpreter else run(int(tokens)))
