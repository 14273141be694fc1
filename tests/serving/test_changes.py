"""Adapters that are added, replaced and removed while requests run, and requests that are refused."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch

import adaptc
from tests.generation.models import case
from tests.serving.models import SIZES, expected_tokens, free_blocks, greedy, prompts, results, running, served, serving


def own_serving() -> Any:
    found = case("llama")
    adapters = {"changing": found.adapters["first"], "second": found.adapters["second"]}
    return adaptc.compile_for_serving(found.model, found.adapters["first"], adapters=adapters, **SIZES)


@pytest.mark.long
@pytest.mark.parametrize("how", ["replace", "remove"])
def test_a_request_keeps_the_adapter_that_it_began_with(how: str) -> None:
    """And the last such request frees it."""
    model, found, (text, other) = own_serving(), case("llama"), prompts(9, 6)
    old = weakref.ref(model.bank["changing"])
    with running(model) as manager:
        before = manager.add_request(text, adapter="changing", max_new_tokens=30, streaming=True)
        beside = manager.add_request(other, adapter="second", max_new_tokens=30)
        while (out := manager.get_result(timeout=5)) is None or out.request_id != before:
            assert manager.is_running()
        if how == "replace":
            model.bank.replace("changing", found.adapters["second"])
            after = [manager.add_request(text, adapter="changing", max_new_tokens=5)]
        else:
            model.bank.remove("changing")
            with pytest.raises(adaptc.AdaptcError, match="the bank has no adapter 'changing'"):
                manager.add_request(text, adapter="changing")
            after = []
        done = results(manager, [before, beside, *after])
        assert done[before].generated_tokens == expected_tokens("llama", text, "first", 30)
        assert done[beside].generated_tokens == expected_tokens("llama", other, "second", 30)
        for request in after:
            assert done[request].generated_tokens == expected_tokens("llama", text, "second", 5)
        (last,) = results(manager, [manager.add_request(other, adapter="second", max_new_tokens=2)]).values()
        assert last.error is None
        assert free_blocks(manager)
    gc.collect()
    assert old() is None


@pytest.mark.long
def test_adapters_change_while_many_requests_run() -> None:
    """Each request has the adapter that its name had when it was added, from whatever thread."""
    model, found, texts = own_serving(), case("llama"), prompts(*range(3, 19))
    expected = {name: [expected_tokens("llama", text, name, 4) for text in texts] for name in ("first", "second")}
    requests: dict[str, tuple[int, str]] = {}
    with running(model, num_blocks=40) as manager:
        names = ["first", "second"]

        def change() -> None:
            for i in range(24):
                name = names[i % 2]
                model.bank.replace("changing", found.adapters[name])
                request = manager.add_request(texts[i % 16], adapter="changing", max_new_tokens=4)
                requests[request] = i % 16, name

        def ask() -> None:
            for i in range(24):
                request = manager.add_request(texts[i % 16], adapter="second", max_new_tokens=4)
                requests[request] = i % 16, "second"

        threads = [threading.Thread(target=t) for t in (change, ask, ask)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        done = results(manager, list(requests), 120)
        assert free_blocks(manager)
    assert len(done) == 72
    for request, (i, name) in requests.items():
        assert done[request].generated_tokens == expected[name][i]


@pytest.mark.long
def test_wrong_requests_are_refused_and_others_go_on() -> None:
    model, (text,) = serving(), prompts(6)
    with running(model) as manager:
        going = manager.add_request(text, adapter="second", max_new_tokens=20)
        wrong: list[tuple[Any, dict[str, Any], str]] = [
            (text, {"adapter": "third"}, "the bank has no adapter 'third'"),
            (text, {"adapter": 7}, r"adapters\[0\] is 7"),
            (text, {"adapter": {"first": float("inf")}}, "finite in float32"),
            ([], {}, "the prompt has no tokens"),
            ([5] * 60, {"max_new_tokens": 5}, "the model has positions for 64"),
            ([5], {"max_new_tokens": 0}, "max_new_tokens is 0"),
            ([5], {"max_new_tokens": True}, "max_new_tokens is True"),
            ([5] * 65, {"max_new_tokens": 1}, "the model has positions for 64"),
            ([5, 4000], {}, "4000"),
            ([5, -1], {}, "-1"),
        ]
        for tokens, options, message in wrong:
            with pytest.raises(adaptc.AdaptcError, match=message):
                manager.add_request(tokens, **options)
        done = results(manager, [going])
        assert done[going].generated_tokens == expected_tokens("llama", text, "second", 20)
    for adapters, message in ((["first"], "adapters has 1 entries, and there are 2 prompts"), ("first", "is no list")):
        with pytest.raises(adaptc.AdaptcError, match=message):
            model.generate_batch([text, text], adapters=adapters)
    assert model.generate_batch([]) == {}


def test_what_is_no_model_or_adapter_for_it_is_refused() -> None:
    found = case("llama")
    lora = adaptc.LoraConfig(r=2, target_modules=["q_proj"])
    for model, adapter, options, error, message in (
        (torch.nn.Linear(3, 2), lora, {}, adaptc.CaptureError, "takes a transformers model, not a Linear"),
        (found.model, lora, {"num_blocks": 0}, adaptc.ConfigError, "num_blocks=0 is not a number of one or more"),
        (found.model, lora, {"page_size": 3}, adaptc.ConfigError, "page_size=3: .* pages of 4 positions or more"),
        (found.model, lora, {"max_batch_tokens": True}, adaptc.ConfigError, "max_batch_tokens=True is not a number"),
        (
            found.model,
            adaptc.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            {},
            adaptc.ConfigError,
            "Config puts virtual tokens in front of a text",
        ),
        (
            found.model,
            adaptc.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            {},
            adaptc.ConfigError,
            "Config puts virtual tokens in front of a text",
        ),
    ):
        with pytest.raises(error, match=message):
            adaptc.compile_for_serving(model, adapter, **options)


@pytest.mark.long
def test_the_functions_of_adaptc_take_it() -> None:
    found, (text,) = case("llama"), prompts(6)
    model = own_serving()
    assert "serves batches of up to 16 tokens from a pool for 192 positions (2 layers of full attention)" in str(
        adaptc.report(model)
    )
    merged = adaptc.merge(model.program)
    assert merged is not None
    with pytest.raises(adaptc.AdaptcError, match=r"adaptc\.compile_for_generation"):
        model.generate(torch.tensor([text]))
    copied = copy.copy(model)
    adaptc.swap(copied, found.adapters["second"])
    (one,) = served(model, [text], ["changing"])
    (two,) = copied.generate_batch([text], generation_config=greedy(copied)).values()
    assert one.generated_tokens == expected_tokens("llama", text, "first")
    assert two.generated_tokens == expected_tokens("llama", text, "second")
