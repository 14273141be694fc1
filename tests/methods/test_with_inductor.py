"""Every method compiled once by inductor: adapters of other sizes run through the same code."""

from __future__ import annotations

import warnings

import pytest

import adaptc
from tests.support.method_table import ENTRIES
from tests.support.subject import assert_close, assert_valid, save_random_adapter, subject

CASES = [(e.name, layer) for e in ENTRIES for layer in ("linear",) if layer in e.layers()]
CASES += [(n, "conv2d") for n in ("loha", "hra", "ia3_inputs", "vera")] + [("oft", "embedding"), ("lokr", "experts")]


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize(("entry", "layer"), CASES)
def test_compiled_once(entry: str, layer: str, tmp_path):
    s = subject(entry, layer)
    args = s.args(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = s.compile(s.config(**s.entry.other_config), backend="inductor")
        other = save_random_adapter(s, s.config(**s.entry.other_config), tmp_path, seed=9)
    program(*s.args(2))
    eager = s.compile(other)
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(program, s.directory)
        assert_close(program(*args), s.expected(5), max(1e-8, s.tolerance))
        adaptc.swap(program, other)
        assert_close(program(*args), eager(*args), 1e-8)
    assert_valid(program)
    assert_close(adaptc.unload(program)(*args), s.base(*args))
