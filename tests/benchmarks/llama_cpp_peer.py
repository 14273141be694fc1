"""Answer requests with llama.cpp, in an environment of its own that has the package ``xllamacpp`` and nothing of ours.

``python llama_cpp_peer.py MODEL LORA THREADS NEW TOKEN...``: LORA is a GGUF adapter, or "-" for none. For each line on
standard input the tokens are continued greedily by NEW tokens. A line of JSON has the text of these, and the
milliseconds that each took by llama.cpp's own clock.

``python llama_cpp_peer.py losses MODEL THREADS``: for each line of tokens on standard input, a line of JSON has the
mean of their negative log probabilities, without that of the first.
"""

from __future__ import annotations

import json
import sys
import urllib.request
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


def losses(model: str, threads: str) -> None:
    params: Any = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = model, 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    server: Any = xllamacpp.Server(params)
    print("ready", flush=True)
    for line in sys.stdin:
        tokens = [int(t) for t in line.split()]
        found = [_log_probability(server, tokens[:i], tokens[i]) for i in range(1, len(tokens))]
        print(json.dumps({"loss": -sum(found) / len(found)}), flush=True)


def _log_probability(server: Any, tokens: list[int], following: int) -> float:
    """Ask for all log probabilities: it gives none of tokens that were given, only of those that it makes."""
    body = {"prompt": tokens, "n_predict": 1, "temperature": 0.0, "n_probs": 1 << 20, "cache_prompt": True}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        (made,) = json.load(answer)["completion_probabilities"]
    return next(each["logprob"] for each in made["top_logprobs"] if each["id"] == following)


if __name__ == "__main__":
    if sys.argv[1] == "losses":
        losses(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
