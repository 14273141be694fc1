"""Servers of program files and packages, whose sizes and places are settled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import adaptc
from adaptc import CheckpointError, ConfigError, LoraConfig
from adaptc.server import ServerOptions, open_server
from adaptc.server.run import server_in_thread
from tests.server.conftest import KEY, Running
from tests.server.test_requests import MESSAGES, NAMES, ask
from tests.support.chats import ChatModel, tokenizer

SIZES: dict[str, Any] = {"max_batch_tokens": 16, "num_blocks": 48, "page_size": 4}


@pytest.fixture(scope="module")
def files(chat_model: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a program, its tokenizer, and a package that brings its own tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    config = LoraConfig(r=2, target_modules="all-linear")
    serving = adaptc.compile_for_serving(chat_model.model, config, **SIZES)
    (folder / "program").mkdir()
    (folder / "package").mkdir()
    adaptc.save(serving, folder / "program" / "serving.pt2")
    tokenizer().save_pretrained(folder / "program")
    serving.bank.add("one", chat_model.folder / "two")  # the server's options replace it
    adaptc.package(serving, folder / "package" / "serving.pt2", tokenizer=tokenizer(), capacity=3, max_rank=8)
    return folder


@pytest.fixture(scope="module", params=["program", "package"])
def saved(request: pytest.FixtureRequest, files: Path, chat_model: ChatModel) -> Iterator[Running]:
    options = ServerOptions("base", chat_model.folder, KEY, adapters=chat_model.adapters)
    served = open_server(files / request.param / "serving.pt2", options)
    with server_in_thread(served) as address:
        yield Running(address, served, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0), chat_model)


@pytest.mark.long
def test_they_answer_as_the_model_does(saved: Running) -> None:
    for name, adapter in NAMES:
        answer = ask(saved, name).choices[0].message.content
        assert answer == saved.expected_text(adapter, saved.ids(MESSAGES), 5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("program", {"page_size": 8}, "page_size"),
        ("package", {"num_blocks": 8, "max_batch_tokens": 9}, "num_blocks, max_batch_tokens|max_batch_tokens"),
        ("package", {"max_adapters": 8}, "max_adapters"),
        ("package", {"load_on_use": True}, "load_on_use"),
    ],
)
def test_options_that_were_settled(
    files: Path, chat_model: ChatModel, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_server(files / kind / "serving.pt2", ServerOptions("base", chat_model.folder, **options))
    settled: dict[str, Any] = {"dtype": "bfloat16", "quantize": "int8", "autocast_adapter_dtype": False}
    settled |= {"backend": "inductor", "device": "cpu"} if kind == "package" else {}
    for name, value in settled.items():
        with pytest.raises(ConfigError, match=rf"^{name} is part of a saved program"):
            open_server(files / kind / "serving.pt2", ServerOptions("base"), **{name: value})


@pytest.mark.long
def test_other_programs_do_not_serve(chat_model: ChatModel, tmp_path: Path) -> None:
    adaptc.save(chat_model.uncached_program, tmp_path / "program.pt2")
    with pytest.raises(CheckpointError, match="holds no serving model"):
        open_server(tmp_path / "program.pt2", ServerOptions("base"))
