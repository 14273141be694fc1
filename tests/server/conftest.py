"""A server of a tiny model with two adapters, and its client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from adaptc.server.read_served import ModelOptions
from adaptc.server.run import server_in_thread
from adaptc.server.served import Served
from adaptc.server.server_options import ServerOptions, open_served_model
from tests.support.chats import ChatModel, make_chat_model

KEY = "a key"


@dataclass(frozen=True)
class Running:
    """A server that runs: its address, what it serves, a client with the key, and the model with its adapters."""

    address: str
    served: Served
    client: openai.OpenAI
    chat: ChatModel

    def expected_text(self, adapter: str | None, ids: list[int], new: int) -> str:
        """The greedy answer to a prompt, computed without a cache."""
        return self.served.tokenizer.decode(self.chat.uncached_answer(adapter, ids, new), skip_special_tokens=True)

    def ids(self, messages: list[Any]) -> list[int]:
        found: Any = self.served.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return found


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    torch.manual_seed(0)
    return make_chat_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def running(chat_model: ChatModel) -> Iterator[Running]:
    folder: Path = chat_model.folder
    options = ServerOptions(
        "base", folder, KEY, max_batch_tokens=16, num_blocks=48, page_size=4, adapters=chat_model.adapters
    )
    served = Served(*open_served_model(folder / "model", ModelOptions(), options), options)
    with server_in_thread(served) as address:
        yield Running(address, served, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0), chat_model)
