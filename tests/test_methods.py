"""Every method at every kind of layer it has a meaning for: the table crossed with the checks."""

from __future__ import annotations

import pytest

import adaptc
from tests.method_checks import CHECKS, Subject, cases, refusals, subject
from tests.method_table import BY_NAME


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize(("entry", "layer"), cases())
def test_method(check, entry, layer, tmp_path):
    check(subject(entry, layer), tmp_path)


def test_refused_by_name():
    for entry, layer in refusals():
        s = Subject(BY_NAME[entry], layer)
        with pytest.raises((adaptc.TargetError, adaptc.ConfigError), match="layer"):
            s.compile(s.config())
