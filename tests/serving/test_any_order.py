"""Requests and adapters in any order: each request gets its tokens, and nothing is left in the pool."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adaptc
from tests.generation.models import case
from tests.serving.models import SIZES, expected_tokens, free_blocks, prompts, results, running
from tests.support.cover import examples

TEXTS = prompts(3, 21, 9, 21, 1, 14)
NEW = 5
EXPECTED: dict[Any, list[int]] = {}
STEPS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 5), st.sampled_from(["a", "b", None, {"a": 0.5, "b": 1.0}])),
    st.tuples(st.just("cancel"), st.integers(0, 9), st.none()),
    st.tuples(st.just("put"), st.sampled_from(["first", "second"]), st.sampled_from(["a", "b"])),
    st.tuples(st.just("remove"), st.none(), st.sampled_from(["a", "b"])),
    st.tuples(st.just("wait"), st.none(), st.none()),
)


def expected(text: int, mix: dict[str, float]) -> list[int]:
    """What a request gets by itself, with weights of the two adapters by PEFT's names for them."""
    key = text, tuple(sorted(mix.items()))
    if key not in EXPECTED:
        one = next(iter(mix)) if list(mix.values()) == [1.0] else mix or None
        EXPECTED[key] = expected_tokens("llama", TEXTS[text], one, NEW)
    return EXPECTED[key]


@pytest.mark.long
@settings(deadline=None, max_examples=examples(25), suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, min_size=4, max_size=30), st.sampled_from([14, 48]))
def test_each_request_gets_its_tokens_whatever_happens(steps: list[Any], blocks: int) -> None:
    found = case("llama")
    model = _model()
    for name in [*model.bank]:
        model.bank.remove(name)
    present: dict[str, str] = {}
    asked: dict[str, tuple[int, dict[str, float]]] = {}
    cancelled: set[str] = set()
    with running(model, NEW, num_blocks=blocks) as manager:
        for kind, first, second in steps:
            if kind == "put":
                put = model.bank.replace if second in present else model.bank.add
                put(second, found.adapters[first])
                present[second] = first
            elif kind == "remove":
                if second in present:
                    model.bank.remove(second)
                    del present[second]
            elif kind == "ask":
                mix = {} if second is None else {second: 1.0} if isinstance(second, str) else second
                if not {*mix} <= {*present}:
                    with pytest.raises(adaptc.AdaptcError, match="the bank has no adapter"):
                        manager.add_request(TEXTS[first], adapter=second)
                    continue
                weights: dict[str, float] = {}
                for name, weight in mix.items():
                    weights[present[name]] = weights.get(present[name], 0.0) + weight
                asked[manager.add_request(TEXTS[first], adapter=second)] = first, weights
            elif kind == "cancel" and asked:
                request = [*asked][first % len(asked)]
                manager.cancel_request(request)
                cancelled.add(request)
            elif kind == "wait":
                time.sleep(0.02)
        done = results(manager, [r for r in asked if r not in cancelled])
        for request, (text, weights) in asked.items():
            if request not in cancelled:
                assert done[request].error is None
                assert done[request].generated_tokens == expected(text, weights)
        _settle(manager)
        assert free_blocks(manager)


def _settle(manager: Any) -> None:
    """One more request, after which all that was cancelled before is gone."""
    results(manager, [manager.add_request([5], adapter=None, max_new_tokens=2)])


@cache
def _model() -> Any:
    found = case("llama")
    return adaptc.compile_for_serving(found.model, found.adapters["first"], **SIZES)
