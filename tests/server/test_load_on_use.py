"""Adapters that a server loads when a request names them first, and gives up when others need the room."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from adaptc import ConfigError
from adaptc.server import ServerOptions, open_server
from adaptc.server.run import server_in_thread
from tests.server.conftest import KEY, Running
from tests.server.test_requests import MESSAGES, ask
from tests.support.chats import ChatModel

SIZES = {"max_batch_tokens": 16, "num_blocks": 48, "page_size": 4}


@pytest.fixture(scope="module")
def loading(chat_model: ChatModel) -> Iterator[Running]:
    """A server with room for two adapters, that begins with one."""
    folder, first = chat_model.folder, {"one": chat_model.folder / "one"}
    options = ServerOptions("base", folder, KEY, max_adapters=2, load_on_use=True, adapters=first, **SIZES)
    served = open_server(folder / "model", options)
    with server_in_thread(served) as address:
        yield Running(address, served, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0), chat_model)


def answer(running: Running, model: str, **options: Any) -> str:
    return ask(running, model, **options).choices[0].message.content


@pytest.mark.long
def test_the_first_request_loads_and_the_least_recently_used_make_room(loading: Running) -> None:
    folder, ids = loading.chat.folder, loading.ids(MESSAGES)
    one, two = (loading.expected_text(name, ids, 5) for name in ("one", "two"))
    assert [answer(loading, n) for n in ("one", "two")] == [one, two]
    shutil.copytree(folder / "two", folder / "three", dirs_exist_ok=True)
    assert answer(loading, "three") == two
    assert {m.id for m in loading.client.models.list()} == {"base", "two", "three"}
    assert answer(loading, "one") == one  # it came with the server, and is read again
    assert {m.id for m in loading.client.models.list()} == {"base", "three", "one"}


def test_a_mix_is_loaded(loading: Running) -> None:
    two = answer(loading, "two")
    assert answer(loading, "base", extra_body={"adapter": {"two": 1.0, "one": 0.0}}) == two


@pytest.mark.long
def test_many_first_requests_at_once(loading: Running) -> None:
    ids = loading.ids(MESSAGES)
    expected = {n: loading.expected_text(n, ids, 5) for n in ("one", "two")}
    for round_number in range(4):
        shutil.copytree(loading.chat.folder / "two", loading.chat.folder / f"new{round_number}", dirs_exist_ok=True)
        names = [f"new{round_number}", "one", "two"] * 4
        with ThreadPoolExecutor(12) as threads:
            found = [*threads.map(lambda name: answer(loading, name), names)]
        assert found == [expected["two" if name.startswith("new") else name] for name in names]


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("absent", 404, "there is no model 'absent'"),
        ("model", 404, "there is no model 'model'"),
        ("../two", 404, "there is no model"),
        (".", 404, "there is no model"),
        ("./two", 404, "there is no model"),
        ("two/", 404, "there is no model"),
        ("one/../two", 404, "there is no model"),
        ("a\0b", 404, "there is no model"),
        ("ia3", 400, "ia3"),
    ],
)
def test_what_cannot_be_loaded(loading: Running, model: str, status: int, message: str) -> None:
    before = {*loading.served.serving.bank}
    body = {"model": model, "messages": MESSAGES, "max_tokens": 3}
    url, key = f"{loading.address}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    reply = httpx.post(url, json=body, headers=key, timeout=60)
    assert (reply.status_code, message in reply.text) == (status, True), reply.text
    assert str(loading.chat.folder.resolve()) not in reply.text
    assert {*loading.served.serving.bank} == before


def test_a_mix_with_an_unknown_name_is_not_found(loading: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="absent"):
        ask(loading, "base", extra_body={"adapter": {"one": 0.5, "absent": 0.5}})


def test_there_must_be_a_root() -> None:
    with pytest.raises(ConfigError, match="--adapter-root"):
        ServerOptions("base", load_on_use=True)
