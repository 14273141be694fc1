"""Many clients of one server come and go while adapters change: nobody gets a wrong answer, and nothing is left."""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import quantiles
from typing import Any

import httpx
import pytest

from tests.server.conftest import KEY, Running
from tests.server.test_requests import ask
from tests.serving.models import free_blocks

NEW = 5
HEADERS = {"Authorization": f"Bearer {KEY}"}
#: names that the server has from its start, and one whose adapter is replaced again and again
STEADY: list[tuple[str, str | None]] = [("base", None), ("one", "one"), ("two", "two")]


class Clients:
    """The clients of a server, what they may be answered, and what they were answered wrongly."""

    def __init__(self, running: Running) -> None:
        self.running = running
        texts = [" ".join(f"w{10 + (i * j) % 40}" for j in range(1, 3 + i)) for i in range(6)]
        self.messages = [[{"role": "user", "content": text}] for text in texts]
        ids = [running.ids(m) for m in self.messages]
        answers = {a: [running.expected_text(a, one, NEW) for one in ids] for _, a in STEADY}
        self.allowed = {name: [{text} for text in answers[a]] for name, a in STEADY}
        self.allowed["hot"] = [{*pair} for pair in zip(answers["one"], answers["two"], strict=True)]
        self.wrong, self.seconds, self.gone = list[Any](), list[float](), 0

    def ask(self, seed: int) -> None:
        """Make one request, as one of the clients would."""
        draw = random.Random(seed)
        name, text = draw.choice([*self.allowed]), draw.randrange(len(self.messages))
        body: dict[str, Any] = {"model": name, "messages": self.messages[text], "max_tokens": NEW, "temperature": 0}
        url, kind = f"{self.running.address}/v1/chat/completions", draw.random()
        begin = time.monotonic()
        if kind < 0.15:  # goes in the middle of a stream
            with httpx.stream("POST", url, json={**body, "stream": True}, headers=HEADERS, timeout=120) as stream:
                for _ in itertools.islice(stream.iter_lines(), draw.randrange(3)):
                    pass
            self.gone += 1
        elif kind < 0.3:  # gives up
            try:
                httpx.post(url, json=body, headers=HEADERS, timeout=draw.uniform(0.01, 0.2))
            except httpx.TimeoutException:
                self.gone += 1
        else:
            answer = httpx.post(url, json=body, headers=HEADERS, timeout=120)
            found = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
            self.seconds.append(time.monotonic() - begin)
            if found not in self.allowed[name][text]:
                self.wrong.append((name, text, found))

    def change_adapters(self, is_over: threading.Event) -> int:
        """Replace one adapter, and load and unload others, until the clients have ended; return how often."""
        for count in itertools.count():
            if is_over.wait(0.05):
                return count
            self.post("load", lora_name="hot", lora_path=("one", "two")[count % 2], load_inplace=True)
            self.post("load", lora_name=f"brief {count}", lora_path="two")
            self.post("unload", lora_name=f"brief {count}")
        raise AssertionError

    def post(self, what: str, **body: Any) -> None:
        answer = httpx.post(f"{self.running.address}/v1/{what}_lora_adapter", json=body, headers=HEADERS, timeout=120)
        if answer.status_code != 200:
            self.wrong.append((what, body, answer.text))


@pytest.mark.long
@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_sixteen_clients(running: Running, count: int) -> None:
    clients, is_over = Clients(running), threading.Event()
    clients.post("load", lora_name="hot", lora_path="one")
    before = {*running.served.serving.bank}
    with ThreadPoolExecutor(17) as threads:
        changes = threads.submit(clients.change_adapters, is_over)
        try:
            for done in [threads.submit(clients.ask, seed) for seed in range(count)]:
                done.result()
        finally:
            is_over.set()
        assert changes.result() > 2
    clients.post("unload", lora_name="hot")
    assert not clients.wrong
    assert clients.gone > count // 20
    assert len(clients.seconds) > count // 2
    middle, late = (quantiles(clients.seconds, n=100)[i] for i in (49, 98))
    print(f"{len(clients.seconds)} answers, {clients.gone} clients gone; p50 {middle:.2f} s, p99 {late:.2f} s")
    end = time.monotonic() + 60
    while running.served.queue_lengths != (0, 0):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert free_blocks(running.served.manager())
    assert {*running.served.serving.bank} == before - {"hot"}
    ask(running, "one")
    assert not running.served.manager().output_router.result_handlers
    assert running.served.manager().output_router.output_queue.empty()
