"""Modules trained as a whole, and single rows of embeddings."""

from __future__ import annotations

from tests.custom_models import WHOLE
from tests.site_checks import every_check, subject


@every_check(WHOLE)
def test_site(name, check, tmp_path):
    check(subject(name), tmp_path)
