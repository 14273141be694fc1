"""What callers say of rows, as mixes and as coefficients."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptc
from adaptc.bank.row_adapters import adapter_names_in, check_adapter_names, make_coefficients, parse_row_adapters

NAMES = ("de", "fr", "style")
WEIGHTS = st.floats(-1e3, 1e3, width=32)
ENTRIES = st.one_of(st.none(), st.sampled_from(NAMES), st.dictionaries(st.sampled_from(NAMES), WEIGHTS))


@given(st.lists(ENTRIES, max_size=7), st.integers(3, 5))
def test_coefficients_say_what_callers_said(entries: list[Any], count: int) -> None:
    mixes = parse_row_adapters(entries)
    found = make_coefficients(mixes, NAMES, count, torch.device("cpu"))
    assert (found.shape, found.dtype) == ((len(entries), count), torch.float32)
    for row, entry in enumerate(entries):
        want = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else entry
        assert found[row].tolist() == [want.get(n, 0.0) for n in NAMES] + [0.0] * (count - 3)
    assert set(adapter_names_in(mixes)) == {n for row in found for n, c in zip(NAMES, row.tolist(), strict=False) if c}


def test_names_are_in_the_order_in_which_they_come_first() -> None:
    assert adapter_names_in(parse_row_adapters(["fr", None, {"de": 1, "fr": 2}, {"style": 0.0}])) == ("fr", "de")


@pytest.mark.parametrize("weight", [2, 0.5, -1e3, np.float32(0.5), np.float16(0.5), np.int64(3), Fraction(1, 3), 3e38])
def test_numbers_of_any_kind_are_weights(weight: Any) -> None:
    assert parse_row_adapters([{"de": weight}])[0] == {"de": float(weight)}


@pytest.mark.parametrize(
    "weight", [float("nan"), float("inf"), 1e300, 10**400, Fraction(10**400), True, "nan", None, 1j, np.float64("nan")]
)
def test_a_weight_that_is_no_number_of_float32_is_refused(weight: Any) -> None:
    with pytest.raises(adaptc.AdaptcError, match=r"adapters\[1\] gives 'de' the weight .*finite in float32"):
        parse_row_adapters([None, {"de": weight}])


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (..., "adapters= is missing: give one entry for each row"),
        (None, "adapters=None is no list"),
        ("de", "adapters='de' is no list"),
        ({"de": 1.0}, "is no list"),
        ({"de"}, "is no list"),
        (torch.zeros(2), "is no list"),
        (["de", 3], r"adapters\[1\] is 3: expected a name"),
        ([{3: 1.0}], r"adapters\[0\] gives 3 the weight 1.0"),
    ],
)
def test_what_is_no_assignment_is_refused(adapters: Any, message: str) -> None:
    with pytest.raises(adaptc.AdaptcError, match=message):
        parse_row_adapters(adapters)


@pytest.mark.parametrize("name", [None, 3, b"de", ("de",), ["de"]])
def test_a_name_that_is_no_string_is_refused(name: Any) -> None:
    with pytest.raises(adaptc.AdaptcError, match="the name of an adapter is a string, not"):
        check_adapter_names([name], NAMES)


def test_an_unknown_name_comes_with_those_nearest() -> None:
    with pytest.raises(adaptc.AdaptcError, match=r"no adapter 'styl'; it has 'de', 'fr', 'style'; nearest are 'style'"):
        check_adapter_names(["fr", "styl"], NAMES)
