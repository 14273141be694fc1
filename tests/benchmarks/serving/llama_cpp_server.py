"""Answer requests at once with llama.cpp's server, in an environment that has ``xllamacpp`` and nothing of ours.

``python llama_cpp_server.py WORK.json``. The file has ``model``, ``loras`` (GGUF files), ``threads``, ``new`` and
``calls``: name -> requests, each with the tokens of its prompt and the number of its LoRA, -1 for none. For each name
on standard input all of its requests are asked at once, by eight slots. A line of JSON has the seconds that they took.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xllamacpp

SLOTS = 8


def main(path: str) -> None:
    work = json.loads(Path(path).read_text())
    params: Any = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = work["model"], 512 * SLOTS, SLOTS, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = work["threads"]
    adapters = []
    for lora in work["loras"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = lora, 0.0
        adapters.append(adapter)
    params.lora_adapters = adapters
    server: Any = xllamacpp.Server(params)

    def ask(request: Any) -> int:
        tokens, lora = request
        scales = [{"id": i, "scale": float(i == lora)} for i in range(len(adapters))]
        body = {"prompt": tokens, "n_predict": work["new"], "temperature": 0.0, "ignore_eos": True, "lora": scales}
        answer = server.handle_completions(body | {"cache_prompt": False})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        return int(answer["usage"]["completion_tokens"])

    print("ready", flush=True)
    for line in sys.stdin:
        requests = work["calls"][line.strip()]
        start = time.perf_counter()
        with ThreadPoolExecutor(len(requests)) as pool:
            counts = list(pool.map(ask, requests))
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": sum(counts)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
