"""Run llama.cpp's server on the requests of the benchmark, in a process of another environment."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.llama_cpp import write_lora, write_model
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
        script = Path(__file__).with_name("llama_cpp_server.py")
        self._process = subprocess.Popen(
            [python, str(script), str(folder / "work.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._read(lambda line: line == "ready")

    def _read(self, is_wanted: Callable[[str], bool]) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if is_wanted(line.strip()):
                return line
        raise RuntimeError("llama.cpp ended: is xllamacpp in that environment?")

    def __call__(self, name: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        found = json.loads(self._read(lambda line: line.startswith("{")))
        if found["tokens"] != REQUESTS * NEW:
            raise RuntimeError(f"llama.cpp gave {found['tokens']} tokens where {REQUESTS * NEW} were asked for")
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
