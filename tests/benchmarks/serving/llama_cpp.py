"""Run llama.cpp's server on the requests of the benchmark, in a process of another environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.llama_cpp import write_lora, write_model
from tests.benchmarks.peer import Peer
from tests.benchmarks.serving.work import ADAPTERS, NEW, REQUESTS, names, prompts

#: the type of GGUF that stores weights of a dtype as they are
KINDS = {torch.float32: "F32", torch.bfloat16: "BF16"}


class LlamaServer:
    """A process of llama.cpp that answers all requests of a call at once.

    ``python`` is an interpreter that has ``xllamacpp``. ``adapters`` are PEFT directories, by name.
    """

    def __init__(self, python: str, dtype: torch.dtype, adapters: Mapping[str, Path], folder: Path) -> None:
        loras = [write_lora(folder / f"{name}.gguf", path) for name, path in adapters.items()]
        own = [-1 if name is None else [*adapters].index(name) for name in names()]
        work = {
            "model": str(write_model(folder / "model.gguf", KINDS[dtype])),
            # The sixth stands for the base, whose requests llama.cpp serves beside the others as it does adapters.
            "loras": [str(path) for path in loras],
            "threads": torch.get_num_threads(),
            "new": NEW,
            "calls": {
                "mixed": [*zip(prompts(), own, strict=True)],
                "one": [*zip(prompts(), [0] * REQUESTS, strict=True)],
            },
        }
        assert len(loras) == ADAPTERS
        (folder / "work.json").write_text(json.dumps(work))
        self._peer = Peer(python, "serving/llama_cpp_server.py", folder / "work.json")

    def __call__(self, name: str) -> Any:
        found = self._peer(name)
        if found["tokens"] != REQUESTS * NEW:
            raise RuntimeError(f"llama.cpp gave {found['tokens']} tokens where {REQUESTS * NEW} were asked for")
        return found

    def close(self) -> None:
        self._peer.close()
