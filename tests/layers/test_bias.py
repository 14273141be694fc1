"""Trained biases, biases of the adapter, and options that differ by layer."""

from __future__ import annotations

import pytest

from tests.support.site_cases import BIASES
from tests.support.site_checks import changed_by, parametrize_checks


@pytest.mark.few(12)
@parametrize_checks(BIASES)
def test_site(name, check, tmp_path):
    assert changed_by(check, name, tmp_path) == []
