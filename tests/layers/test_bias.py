"""Trained biases, biases of the adapter, and options that differ by layer."""

from __future__ import annotations

from tests.support.site_cases import BIASES
from tests.support.site_checks import every_check, subject


@every_check(BIASES)
def test_site(name, check, tmp_path):
    check(subject(name), tmp_path)
