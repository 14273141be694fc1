"""AOTInductor packages of one method of each kind: additive, multiplicative, on activations, on the bias by the weight,
with shared and grouped slots."""

from __future__ import annotations

import pytest

import adaptc
from tests.support.subject import assert_close, save_random_adapter, subject


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize(
    "entry", ["loha", "hra", "ia3", "vera", "pvera", "unilora", "tinylora", "lily", "glora", "bdlora"]
)
def test_packaged(entry: str, tmp_path):
    s = subject(entry, "linear")
    other = save_random_adapter(s, s.config(**s.entry.other_config), tmp_path / "other", seed=9)
    room = {"hra": 6, "lily": 7, "glora": 7, "bdlora": 9}.get(entry)  # the other adapter has a larger rank
    runner = adaptc.load_package(adaptc.package(s.program, tmp_path / "adapted.pt2", max_rank=room))
    assert_close(runner(*s.args(5)), s.expected(5), 1e-12)
    runner.swap(other)
    assert_close(runner(*s.args(2)), s.compile(other)(*s.args(2)), 1e-12)
    runner.swap(s.directory)
    assert_close(runner(*s.args(5)), s.expected(5), 1e-12)


@pytest.mark.long
@pytest.mark.parametrize("entry", ["frod", "kasa"])
def test_a_package_refuses_adapters_whose_values_follow_from_its_base(entry: str, tmp_path):
    s = subject(entry, "linear")
    runner = adaptc.load_package(adaptc.package(s.program, tmp_path / "adapted.pt2"))
    assert_close(runner(*s.args(5)), s.program(*s.args(5)), 1e-12)
    with pytest.raises(
        adaptc.SwapError, match=r"follow from the base weight 'layer.weight', which the package does not"
    ):
        runner.swap(s.directory)
    assert_close(runner(*s.args(5)), s.program(*s.args(5)), 1e-12)
