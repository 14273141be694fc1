"""Which kind of bank a test asks."""

from __future__ import annotations

import pytest

from tests.bank.kinds import Kind, made_kind


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    return made_kind(*request.param)
