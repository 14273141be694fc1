"""Consumers that only know the weight form: recurrent layers, transposed convolutions, functions of a parameter."""

from __future__ import annotations

import pytest

from tests.support.site_cases import PARAMETERS, UNUSUAL
from tests.support.site_checks import changed_by, parametrize_checks

#: its time, in a loop
pytestmark = pytest.mark.filterwarnings("ignore:Recurrent was captured for some sizes alone")


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights:UserWarning")
@parametrize_checks(UNUSUAL)
def test_site_by_hand(name, check, tmp_path):
    assert changed_by(check, name, tmp_path) == []


@pytest.mark.long
@parametrize_checks(PARAMETERS)
def test_parameter(name, check, tmp_path):
    assert changed_by(check, name, tmp_path) == []
