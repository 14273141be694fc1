"""Adapters of what generates: swapped between calls and while one runs, bound, merged, saved, in several threads."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptc
from tests.generation.models import case, generated, generator, prompt
from tests.support.turns import Turns


class SwapAfter:
    """A streamer that swaps when so many tokens were generated."""

    def __init__(self, gen: Any, adapter: Path, tokens: int) -> None:
        self.gen, self.adapter, self.left = gen, adapter, tokens

    def put(self, value: torch.Tensor) -> None:
        if self.left == 0:
            adaptc.swap(self.gen, self.adapter)
        self.left -= 1

    def end(self) -> None:
        pass


@pytest.mark.long
@given(after=st.integers(0, 7), first=st.booleans(), length=st.integers(1, 9))
def test_a_generation_keeps_the_adapter_it_began_with(after: int, first: bool, length: int) -> None:
    found, gen, text = case("llama"), generator(), prompt(1, length)
    before, then = ("first", "second") if first else ("second", "first")
    try:
        adaptc.swap(gen, found.adapters[before])
        streamer = SwapAfter(gen, found.adapters[then], after)
        assert torch.equal(generated(gen, text, streamer=streamer), found.expected(before, text))
        assert torch.equal(generated(gen, text), found.expected(then, text))
    finally:
        adaptc.swap(gen, found.adapters["first"])


@pytest.mark.long
def test_what_was_swapped_away_is_freed() -> None:
    found, gen, text = case("llama"), generator(), prompt(1, 4)
    try:
        adaptc.swap(gen, found.adapters["second"])
        generated(gen, text)
        gone = weakref.ref(gen.program.current)
    finally:
        adaptc.swap(gen, found.adapters["first"])
    gc.collect()
    assert gone() is None


@pytest.mark.long
def test_what_is_bound_stays() -> None:
    found, gen, text = case("llama"), generator(), prompt(2, 6, (2, 0))
    second, weights = (gen.bind(found.adapters["second"], form=form) for form in ("apply", "weight"))
    for bound in (second, weights):
        assert torch.equal(generated(bound, text), found.expected("second", text))
        with pytest.raises(adaptc.AdaptcError, match=r"keeps .*second.*: swap, merge and save"):
            adaptc.swap(bound, found.adapters["first"])
    assert torch.equal(generated(gen.bind(None), text), found.expected(None, text))
    assert torch.equal(generated(gen, text), found.expected("first", text))


@pytest.mark.long
def test_functions_of_programs_take_it(tmp_path: Path) -> None:
    found, gen, text = case("llama"), generator(), prompt(2, 6, (2, 0))
    expected = found.expected("first", text)
    merged = adaptc.merge(gen)
    assert isinstance(merged, adaptc.Generator)
    assert torch.equal(generated(merged, text), expected)
    assert torch.equal(generated(adaptc.unmerge(merged), text), expected)
    assert torch.equal(generated(adaptc.unload(gen), text), found.expected(None, text))
    assert adaptc.verify(gen).ok
    report = adaptc.verify(gen, found.model)
    assert report.ok
    assert report["base equals model"].passed
    assert adaptc.report(gen).sites == adaptc.report(gen.program).sites
    written = adaptc.save_adapter(gen, tmp_path / "adapter")
    adaptc.swap(gen, found.adapters["second"])
    assert adaptc.swap(gen, written).sites == 14
    assert torch.equal(generated(gen, text), expected)


@pytest.mark.long
@pytest.mark.parametrize("how", ["adapted", "merged"])
def test_files(tmp_path: Path, how: str) -> None:
    """What is saved generates again, adapters and all."""
    found, gen, text = case("llama"), generator(), prompt(2, 6, (2, 0))
    kept = gen if how == "adapted" else adaptc.merge(gen)
    loaded = adaptc.load(adaptc.save(kept, tmp_path / "gen.pt2"))
    assert isinstance(loaded, adaptc.Generator)
    assert torch.equal(generated(loaded, text), found.expected("first", text))
    assert loaded.config.to_dict() == gen.config.to_dict()
    assert (loaded.spec.layout, loaded.spec.max_length) == (gen.spec.layout, gen.spec.max_length)
    if how == "adapted":
        adaptc.swap(loaded, found.adapters["second"])
        assert torch.equal(generated(loaded, text), found.expected("second", text))
    with pytest.raises(adaptc.AdaptcError, match="of another program"):
        generated(loaded, text, past_key_values=gen.prefill(**text))


def _in_threads(seconds: float) -> None:
    """Four threads on adapters of their own, while a fifth swaps what others generate with."""
    found, gen = case("llama"), generator()
    names = ["first", "second", None, "first"]
    bound = [gen.bind(None if n is None else found.adapters[n]) for n in names]
    texts = [prompt(rows, length, seed=rows) for rows, length in ((1, 5), (2, 9), (3, 4), (4, 7))]
    expected = [found.expected(n, text) for n, text in zip(names, texts, strict=True)]
    of_any = {n: found.expected(n, texts[0]).tolist() for n in ("first", "second")}
    wrong: list[Any] = []
    swaps: list[int] = []
    turns = Turns(seconds, lambda: len(swaps) > 2)

    def generate(i: int) -> None:
        try:
            while turns.go_on() and not wrong:
                if not torch.equal(generated(bound[i], texts[i]), expected[i]):
                    wrong.append(names[i])
                if generated(gen, texts[0]).tolist() not in of_any.values():
                    wrong.append("swapped")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(len(bound))]
    for t in threads:
        t.start()
    try:
        while turns.go_on() and not wrong:
            adaptc.swap(gen, found.adapters[("second", "first")[len(swaps) % 2]])
            swaps.append(1)
    finally:
        for t in threads:
            t.join()
        adaptc.swap(gen, found.adapters["first"])
    assert not wrong
    assert len(swaps) > 2


@pytest.mark.long
def test_threads() -> None:
    _in_threads(2)


@pytest.mark.slow
def test_threads_for_long() -> None:
    _in_threads(60)
