from __future__ import annotations

import pytest

from tests.support.chats import ChatModel
from tests.support.chats import make_chat_model as made


@pytest.fixture(scope="package")
def chats(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return made(tmp_path_factory.mktemp("chats"))
