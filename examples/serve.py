"""Three adapters behind one server: `adaptc serve` answers four requests at once, each by an adapter of its own.

`make demo` runs it on the adapters that quickstart.py trained: python examples/serve.py PIRATE TELEGRAM
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import quickstart

#: what the requests ask for: an adapter is a model by its name, and "adapter" mixes
REQUESTS: list[dict[str, Any]] = [
    {"model": "pirate"},
    {"model": "telegram"},
    {"model": "smollm2"},
    {"model": "smollm2", "adapter": {"pirate": 0.6, "telegram": 0.4}},
]


@contextmanager
def server(*adapters: str) -> Iterator[str]:
    """The address of `adaptc serve` with these adapters, on a free port."""
    command = [sys.executable, "-m", "adaptc.cli", "serve", str(quickstart.gguf_path()), "--name", "smollm2"]
    for adapter in adapters:
        command += ["--adapter", f"{Path(adapter).name}={adapter}"]
    process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        print(line)
        yield line.rsplit(" ", 1)[-1]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def ask(address: str, request: dict[str, Any]) -> str:
    body = {
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": quickstart.QUESTION},
        ],
        "max_tokens": 32,
        "temperature": 0,
        **request,
    }
    asked = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def main(*adapters: str) -> None:
    with server(*adapters) as address, ThreadPoolExecutor(len(REQUESTS)) as clients:
        answers = list(clients.map(lambda request: ask(address, request), REQUESTS))
    for request, text in zip(REQUESTS, answers, strict=True):
        print(f"{json.dumps(request)}\n  {text}")
    if len({*answers[:3]}) < 3:
        sys.exit("two adapters gave the same answer")


if __name__ == "__main__":
    main(*sys.argv[1:])
