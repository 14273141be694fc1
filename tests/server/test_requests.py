"""Requests over HTTP, as OpenAI's client makes them: each gets the answer of its adapters."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from adaptc.server import build_app
from adaptc.server.served import Metrics
from adaptc.serving.request_adapter import RequestAdapter
from tests.server.conftest import KEY, Running

MESSAGES: list[Any] = [{"role": "user", "content": "w11 w12 w30"}]
NAMES: list[tuple[str, str | None]] = [("base", None), ("one", "one"), ("two", "two")]


def ask(running: Running, model: str, messages: Any = MESSAGES, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 5, **options}
    return running.client.chat.completions.create(model=model, messages=messages, **options)


@pytest.mark.long
def test_a_model_s_name_says_which_adapter_answers(running: Running) -> None:
    ids = running.ids(MESSAGES)
    answers = {}
    for name, adapter in NAMES:
        out = ask(running, name)
        answers[name] = out.choices[0].message.content
        assert answers[name] == running.expected_text(adapter, ids, 5)
        assert (out.model, out.usage.prompt_tokens, out.usage.completion_tokens) == (name, len(ids), 5)
        assert out.choices[0].finish_reason == "length"
    assert len(set(answers.values())) == 3


def test_answers_are_streamed(running: Running) -> None:
    ids = running.ids(MESSAGES)
    for name, adapter in NAMES:
        parts = [c.choices[0].delta.content for c in ask(running, name, stream=True) if c.choices]
        assert "".join(p for p in parts if p) == running.expected_text(adapter, ids, 5)
        assert sum(bool(p) for p in parts) >= 2


def test_completions_and_responses(running: Running) -> None:
    text = "w11 w12 w30"
    ids = running.served.tokenizer(text)["input_ids"]
    out = running.client.completions.create(model="two", prompt=text, temperature=0, max_tokens=4)
    assert out.choices[0].text == running.expected_text("two", ids, 4)
    answer = running.client.responses.create(model="one", input=MESSAGES, temperature=0, max_output_tokens=4)
    assert answer.output_text == running.expected_text("one", running.ids(MESSAGES), 4)


@pytest.mark.long
def test_the_body_mixes_adapters(running: Running) -> None:
    answers = {}
    for mix in ({"one": 1.0}, {"one": 0.0}, {"one": 0.4, "two": 1.2}, {"two": 1.2, "one": 0.4}, None, "two"):
        out = ask(running, "base", extra_body={"adapter": mix})
        answers[json.dumps(mix)] = out.choices[0].message.content
    ids = running.ids(MESSAGES)
    assert answers['{"one": 1.0}'] == running.expected_text("one", ids, 5)
    assert answers['{"one": 0.0}'] == answers["null"] == running.expected_text(None, ids, 5)
    assert answers['"two"'] == running.expected_text("two", ids, 5)
    assert answers['{"one": 0.4, "two": 1.2}'] == answers['{"two": 1.2, "one": 0.4}']


def test_models_are_listed(running: Running) -> None:
    found = {m.id: m for m in running.client.models.list()}
    assert found.keys() == {"base", "one", "two"}
    assert found["one"].model_dump()["parent"] == "base"
    assert found["base"].model_dump()["parent"] is None


def test_each_request_draws_as_it_asks(running: Running) -> None:
    """One that samples before others does not decide for them."""
    ask(running, "one", temperature=1.7, top_p=0.9, max_tokens=3)
    drawn = {ask(running, "one", temperature=1.9).choices[0].message.content for _ in range(8)}
    assert len(drawn) > 1
    greedy = {ask(running, "one", temperature=0).choices[0].message.content for _ in range(3)}
    assert greedy == {running.expected_text("one", running.ids(MESSAGES), 5)}


def test_a_seed_repeats_what_is_drawn(running: Running) -> None:
    drawn = [ask(running, "one", temperature=1.9, seed=s).choices[0].message.content for s in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_request_that_fails_says_so(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a status, or as the last event of a stream; and the next one is answered."""
    manager = running.served.manager()
    add = type(manager).add_request

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        callback, loop = self.output_router.result_handlers[kwargs["request_id"]]
        failed = GenerationOutput(kwargs["request_id"], error="no block", status=RequestStatus.FAILED)
        loop.call_soon(callback, failed)
        return kwargs["request_id"]

    monkeypatch.setattr(type(manager), "add_request", fail)
    with pytest.raises(openai.InternalServerError, match="the request failed: no block"):
        ask(running, "one")
    body = {"model": "one", "messages": MESSAGES, "stream": True}
    url, key = f"{running.address}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    last = [line for line in httpx.post(url, json=body, headers=key).text.splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: ")) == {"error": "the request failed: no block"}
    monkeypatch.setattr(type(manager), "add_request", add)
    assert ask(running, "one").choices[0].message.content == running.expected_text("one", running.ids(MESSAGES), 5)
    assert not manager.output_router.result_handlers


@pytest.mark.long
def test_many_clients_at_once(running: Running) -> None:
    """Each gets its own answer, whatever runs beside it."""
    wrong: list[Any] = []
    texts = [
        [{"role": "user", "content": " ".join(f"w{10 + (i * j) % 40}" for j in range(1, 2 + i))}] for i in range(8)
    ]
    expected = {(i, n): running.expected_text(a, running.ids(t), 6) for i, t in enumerate(texts) for n, a in NAMES}

    def client(number: int) -> None:
        for i in range(6):
            text, (name, _) = (number + i) % 8, NAMES[(number * i) % 3]
            found = ask(running, name, texts[text], max_tokens=6).choices[0].message.content
            if found != expected[text, name]:
                wrong.append((text, name, found))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "three"}, 404, "there is no model 'three'"),
    ({"model": 7}, 404, "there is no model 7"),
    ({"adapter": {"three": 1.0}}, 404, "the bank has no adapter 'three'"),
    ({"adapter": {"one": "much"}}, 422, "weights numbers"),
    ({"adapter": ["one"]}, 422, r"adapters\[0\] is"),
    ({"max_tokens": 5000}, 400, "the model has positions for"),
    ({"max_tokens": 5000, "stream": True}, 400, "the model has positions for"),
    ({"n": 3}, 422, "'n' is not supported"),
    ({"logprobs": True}, 422, "'logprobs' is not supported"),
    ({"response_format": {"type": "json_object"}}, 422, "'response_format' is not supported"),
    ({"unheard_of": 1}, 422, "unheard_of"),
    ({"stop": ["."]}, 422, "'stop' is not supported"),
    ({"frequency_penalty": 0.5}, 422, "'frequency_penalty' is not supported"),
    ({"presence_penalty": 0.5}, 422, "'presence_penalty' is not supported"),
    ({"logit_bias": {"5": 100}}, 422, "'logit_bias' is not supported"),
    ({"reasoning_effort": "high"}, 422, "'reasoning_effort' is not supported"),
    ({"previous_response_id": "resp_1"}, 422, "'previous_response_id' is not supported"),
    ({"text": {"format": {"type": "json_object"}}}, 422, "'text' is not supported"),
    ({"generation_config": '{"num_beams": 3}'}, 422, "'generation_config' has 'num_beams'"),
    ({"generation_config": "[]"}, 422, "'generation_config' is no JSON object"),
    ({"generation_config": {"top_k": 3}}, 422, "'generation_config' is no JSON object"),
    ({"tool_choice": "required"}, 422, "'tool_choice' is not supported"),
    ({"max_tokens": "many"}, 422, "cannot be read|max_new_tokens is"),
    ({"max_tokens": 0}, 400, "max_new_tokens is 0"),
    ({"messages": None}, 422, "cannot be read"),
]


@pytest.mark.parametrize(("change", "status", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_wrong_requests_get_a_status_and_a_message(
    running: Running, change: dict[str, Any], status: int, message: str
) -> None:
    body = {"model": "one", "messages": MESSAGES, "max_tokens": 3, **change}
    answer = httpx.post(
        f"{running.address}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    )
    assert answer.status_code == status, answer.text
    assert re.search(message, answer.text), answer.text
    assert str(running.chat.folder) not in answer.text


def test_keys_sizes_and_bodies_are_checked(running: Running) -> None:
    url, key = f"{running.address}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    body = {"model": "one", "messages": MESSAGES}
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": KEY}):
        assert httpx.post(url, json=body, headers=headers).status_code == 401
    assert httpx.get(f"{running.address}/v1/models").status_code == 401
    assert httpx.get(f"{running.address}/health").json() == {"status": "ok"}
    assert httpx.post(url, content=b"{", headers=key).status_code == 422
    assert httpx.post(url, content=b" " * (9 << 20), headers=key).status_code == 413
    for path in ("/reset", "/v1/systemone"):
        assert httpx.post(f"{running.address}{path}", json={}, headers=key).status_code == 404


def test_a_request_without_a_length_gets_as_many_tokens_as_there_is_room_for(running: Running) -> None:
    out = running.client.chat.completions.create(model="one", messages=MESSAGES, temperature=0)
    count, room = out.usage.completion_tokens, running.served.serving.spec.position_count
    text = running.expected_text("one", running.ids(MESSAGES), count)
    assert out.choices[0].message.content == text
    full = count == room - out.usage.prompt_tokens
    assert out.choices[0].finish_reason == ("length" if full else "stop")


def test_a_generation_config_says_how_tokens_are_chosen(running: Running) -> None:
    url, key = f"{running.address}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    config = {"do_sample": False, "max_new_tokens": 4, "transformers_version": "5.0"}
    body = {"model": "two", "messages": MESSAGES, "generation_config": json.dumps(config)}
    answer = httpx.post(url, json=body, headers=key, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == running.expected_text("two", running.ids(MESSAGES), 4)


def test_an_app_inside_of_another_asks_for_the_key_alike(running: Running) -> None:
    parent = FastAPI()
    parent.mount("/llm", build_app(running.served))
    client = TestClient(parent)
    assert client.get("/llm/health").json() == {"status": "ok"}
    for path in ("/llm/v1/models", "/llm/llm/health", "/llm/metrics"):
        assert client.get(path).status_code == 401
    assert client.get("/llm/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_requests_with_one_request_id_are_told_apart(running: Running) -> None:
    """A client may send one X-Request-ID twice, and each request still gets its own answer."""
    headers, ids = {"Authorization": f"Bearer {KEY}", "X-Request-ID": "same"}, running.ids(MESSAGES)

    def answer(name: str) -> str:
        body = {"model": name, "messages": MESSAGES, "max_tokens": 5}
        url = f"{running.address}/v1/chat/completions"
        return httpx.post(url, json=body, headers=headers, timeout=60).json()["choices"][0]["message"]["content"]

    names = ["one", "two"] * 3
    with ThreadPoolExecutor(6) as threads:
        assert [*threads.map(answer, names)] == [running.expected_text(name, ids, 5) for name in names]


def test_a_client_that_is_gone_frees_its_blocks(running: Running) -> None:
    """Of a stream, and of one that waits for a whole answer."""
    key = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "one", "messages": MESSAGES, "max_tokens": 50, "temperature": 1.5}
    url = f"{running.address}/v1/chat/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}, headers=key, timeout=60) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, headers=key, timeout=0.02)
    end = time.monotonic() + 30
    while running.served.queue_lengths != (0, 0):
        assert time.monotonic() < end
        time.sleep(0.05)
    ids = running.ids(MESSAGES)
    assert ask(running, "one").choices[0].message.content == running.expected_text("one", ids, 5)


def test_metrics_count_by_adapter(running: Running) -> None:
    def value(name: str) -> float:
        text = httpx.get(f"{running.address}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        lines = [line for line in text.splitlines() if line.startswith(name + " ")]
        return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0

    names = [
        'adaptc_requests_total{adapter="two",status="ok"}',
        'adaptc_generated_tokens_total{adapter="two"}',
        'adaptc_time_to_first_token_seconds_count{adapter="two"}',
    ]
    before = [value(n) for n in names]
    ask(running, "two", max_tokens=4)
    assert [value(n) - b for n, b in zip(names, before, strict=True)] == [1, 4, 1]
    assert value("adaptc_requests_running") == 0


def test_an_adapter_may_be_called_base() -> None:
    class Empty:
        queue_lengths = (0, 0)

    metrics = Metrics(Empty(), "smol")
    for name in ("", "base", "base"):
        metrics.count_cancelled(RequestAdapter(name, {}, {}))
    text = metrics.text().decode()
    assert 'adaptc_requests_total{adapter="smol",status="cancelled"} 1.0' in text
    assert 'adaptc_requests_total{adapter="base",status="cancelled"} 2.0' in text


def test_adapters_are_loaded_and_unloaded(running: Running) -> None:
    """Below the root alone; requests that run keep what was unloaded."""
    key = {"Authorization": f"Bearer {KEY}"}

    def post(what: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{running.address}/v1/{what}_lora_adapter", json=body, headers=key, timeout=60)

    assert post("load", lora_name="new", lora_path="two").status_code == 200
    ids = running.ids(MESSAGES)
    assert ask(running, "new").choices[0].message.content == running.expected_text("two", ids, 5)
    for body, status, message in (
        ({"lora_name": "new", "lora_path": "one"}, 409, "already"),
        ({"lora_name": "base", "lora_path": "one"}, 409, "the name of the base"),
        ({"lora_name": "x", "lora_path": "../../etc"}, 403, "is not below"),
        ({"lora_name": "x", "lora_path": "/etc/passwd"}, 403, "is not below"),
        ({"lora_name": "x", "lora_path": "."}, 403, "is not below"),
        ({"lora_name": "x", "lora_path": "absent"}, 404, "there is nothing at 'absent'"),
        ({"lora_name": "x", "lora_path": "a\0b"}, 422, "is no path"),
        ({"lora_name": "x", "lora_path": "model"}, 400, ""),
        ({"lora_name": "x", "lora_path": "ia3"}, 400, ""),
        ({"lora_name": "x"}, 422, "lora_path"),
        ({"lora_name": 5, "lora_path": "one"}, 422, "strings"),
    ):
        answer = post("load", **body)
        assert (answer.status_code, message in answer.text) == (status, True), (body, answer.text)
        assert str(running.chat.folder.resolve()) not in answer.text
    assert post("load", lora_name="new", lora_path="one", load_inplace=True).status_code == 200
    assert ask(running, "new").choices[0].message.content == running.expected_text("one", ids, 5)
    assert post("unload", lora_name="new").status_code == 200
    assert post("unload", lora_name="new").status_code == 404
    with pytest.raises(openai.NotFoundError, match="there is no model 'new'"):
        ask(running, "new")
