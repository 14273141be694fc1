from __future__ import annotations

import pytest

from tests.support.chats import Chats
from tests.support.chats import chats as made


@pytest.fixture(scope="package")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Chats:
    return made(tmp_path_factory.mktemp("chats"))
