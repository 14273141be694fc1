"""Answer requests with llama.cpp, in an environment of its own that has the package ``xllamacpp`` and nothing of ours.

``python llama_cpp_peer.py MODEL LORA THREADS NEW TOKEN...``: LORA is a GGUF adapter, or "-" for none. For each line on
standard input the tokens are continued greedily by NEW tokens. A line of JSON has the text of these, and the
milliseconds that each took by llama.cpp's own clock.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import xllamacpp


def main(model: str, lora: str, threads: str, new: str, *tokens: str) -> None:
    params: Any = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = model, 512, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    if lora != "-":
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = lora, 1.0
        params.lora_adapters = [adapter]
    server: Any = xllamacpp.Server(params)
    request = {"prompt": [int(t) for t in tokens], "n_predict": int(new), "temperature": 0.0, "ignore_eos": True}
    request |= {"cache_prompt": False}
    print("ready", flush=True)
    for _ in sys.stdin:
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        found = {"text": answer["choices"][0]["text"], "ms": answer["timings"]["predicted_per_token_ms"]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
