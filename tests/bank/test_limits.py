"""Who goes for another adapter, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adaptc
from adaptc.bank.capacity import Limits
from adaptc.binding.binding import Binding
from adaptc.methods import AdapterConfig


def binding(numbers: int = 4, **fields: Any) -> Binding:
    return Binding({"x": torch.zeros(numbers)}, {}, AdapterConfig(), **fields)


TABLE = {"a": binding(), "b": binding(), "c": binding()}
ORDER = ["b", "a", "c"]


def test_the_one_used_least_recently_goes_first() -> None:
    limits = Limits(capacity=3, evict=True)
    assert limits.choose_evicted(TABLE, ORDER, "d", binding(), ()) == ["b"]
    assert limits.choose_evicted(TABLE, ORDER, "d", binding(), {"b"}) == ["a"]
    assert limits.choose_evicted(TABLE, ORDER, "b", binding(), ()) == []  # in its own place
    assert Limits(capacity=1, evict=True).choose_evicted(TABLE, ORDER, "d", binding(), ()) == ["b", "a", "c"]


def test_bytes_are_counted_once_for_what_is_shared() -> None:
    shared = binding(8)
    table = {"a": shared, "b": Binding({"y": shared.values["x"]}, {}, AdapterConfig())}
    assert Limits(max_bytes=48).choose_evicted(table, ["a", "b"], "c", binding(), ()) == []
    assert Limits(max_bytes=40, evict=True).choose_evicted(table, ["a", "b"], "c", binding(), ()) == ["a", "b"]


@pytest.mark.parametrize(
    ("limits", "needed", "message"),
    [
        (Limits(capacity=3), (), "no room for 'd': it holds no more than 3.*evict=True"),
        (Limits(capacity=3, evict=True), {"a", "b", "c"}, "no room for 'd': it holds no more than 3"),
        (Limits(max_bytes=50, evict=False), (), "it holds 50 B, and would need 64 B"),
        (Limits(max_bytes=8, evict=True), (), "it holds 8 B, and would need 16 B"),
    ],
)
def test_no_room(limits: Limits, needed: Any, message: str) -> None:
    with pytest.raises(adaptc.ConfigError, match=message):
        limits.choose_evicted(TABLE, ORDER, "d", binding(), needed)


@pytest.mark.parametrize("name", ["capacity", "max_rank", "max_bytes"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "3"])
def test_what_is_no_limit_is_refused(name: str, value: Any) -> None:
    with pytest.raises(adaptc.ConfigError, match=f"{name}=.* must be a positive integer"):
        Limits(**{name: value})


def test_evict_is_a_truth_value() -> None:
    with pytest.raises(adaptc.ConfigError, match="evict='yes' must be True or False"):
        Limits(evict="yes")  # type: ignore[arg-type]


def test_a_call_that_needs_more_than_there_may_be_is_refused() -> None:
    Limits(capacity=2).check_call(("a", "b"))
    with pytest.raises(adaptc.ConfigError, match=r"names 3 adapters \('a', 'b', 'c'\), and the bank holds 2 at once"):
        Limits(capacity=2).check_call(("a", "b", "c"))


def test_what_rows_cannot_have_is_refused() -> None:
    with pytest.raises(adaptc.CheckpointError, match=r"'p' brings a base of its own .'w'.*convert_to_lora"):
        Limits().check_adapter("p", binding(changed_base={"w": torch.zeros(1)}))
    with pytest.raises(adaptc.ConfigError, match="'p' is 2 adapters that act together"):
        Limits().check_adapter("p", binding(joint_adapters=dict.fromkeys("xy", binding())))
    with pytest.raises(adaptc.CheckpointError, match="'p' is not finite: 'x' has NaN or infinity"):
        Limits().check_adapter("p", Binding({"x": torch.full((2,), float("nan"))}, {}, AdapterConfig()))
