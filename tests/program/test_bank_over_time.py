"""Banks over time: any order of what may be done to one, and many threads at once, against a plain dict."""

from __future__ import annotations

import random
import threading
import time
import traceback
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import adaptc
from tests.support.cover import examples
from tests.support.gated_net import X, adapter_tensors, compile_net, net

NAMES = ("a", "b", "c", "d")
RANKS = (2, 3, 5, 7)
ROW = st.one_of(st.none(), st.sampled_from(NAMES), st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1.0, 0.0])))


class Reference:
    """What an adapter of each rank computes alone, on one program for all tests."""

    def __init__(self) -> None:
        self.program = compile_net(2)
        with torch.no_grad():
            self.alone = {r: self.program.bind(adapter_tensors(r))(X) for r in RANKS}
            self.base = net()(X)

    def row(self, i: int, rank: int | None) -> Tensor:
        return (self.base if rank is None else self.alone[rank])[i]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


REFERENCE: list[Reference] = []


class Banks(RuleBasedStateMachine):
    """``held`` maps names to ranks; of more than one adapter in a row only the first has a weight."""

    @initialize(capacity=st.sampled_from([None, 2, 3]), evict=st.booleans())
    def begin(self, capacity: int | None, evict: bool) -> None:
        REFERENCE[:] = REFERENCE or [Reference()]
        self.reference = REFERENCE[0]
        self.program = self.reference.program
        self.capacity, self.evict = capacity, evict
        self.bank = self.program.bank(capacity=capacity, evict=evict)
        self.held: dict[str, int] = {}  # in the order of last use

    def used(self, name: str) -> None:
        self.held[name] = self.held.pop(name)

    @rule(name=st.sampled_from(NAMES), rank=st.sampled_from(RANKS))
    def add(self, name: str, rank: int) -> None:
        full = self.capacity is not None and len(self.held) >= self.capacity
        if name in self.held or (full and not self.evict):
            with pytest.raises(adaptc.ConfigError):
                self.bank.add(name, adapter_tensors(rank))
            return
        self.bank.add(name, adapter_tensors(rank))
        if full:
            del self.held[next(iter(self.held))]
        self.held[name] = rank

    @rule(name=st.sampled_from(NAMES), rank=st.sampled_from(RANKS))
    def replace(self, name: str, rank: int) -> None:
        if name not in self.held:
            with pytest.raises(adaptc.AdaptcError):
                self.bank.replace(name, adapter_tensors(rank))
            return
        self.bank.replace(name, adapter_tensors(rank))
        self.held[name] = rank
        self.used(name)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        if name not in self.held:
            with pytest.raises(adaptc.AdaptcError):
                self.bank.remove(name)
            return
        self.bank.remove(name)
        del self.held[name]

    @rule(rows=st.lists(ROW, min_size=3, max_size=3))
    def call(self, rows: list[Any]) -> None:
        mixes = [{} if r is None else {r: 1.0} if isinstance(r, str) else r for r in rows]
        one = [{n: w for n, w in list(m.items())[:1] if w} for m in mixes]
        names = list(dict.fromkeys(n for m in one for n in m))
        if set(names) - set(self.held):
            with pytest.raises(adaptc.AdaptcError, match=r"the bank has no adapter|at once"):
                self.bank(X, adapters=one)
            return
        with torch.no_grad():
            found = self.bank(X, adapters=one)
        want = [self.reference.row(i, self.held[next(iter(m))] if m else None) for i, m in enumerate(one)]
        torch.testing.assert_close(found, torch.stack(want), rtol=1e-4, atol=1e-4)
        for name in names:
            self.used(name)

    @rule(rank=st.sampled_from(RANKS))
    def swap(self, rank: int) -> None:
        adaptc.swap(self.program, adapter_tensors(rank))

    @rule()
    def merge_and_unload_beside(self) -> None:
        adaptc.unmerge(adaptc.merge(self.program))
        adaptc.unload(self.program)

    @precondition(lambda self: self.held)
    @rule()
    def assigned_before(self) -> None:
        """What was assigned stays as it was, whatever goes."""
        name, rank = next(iter(self.held.items()))
        chosen = self.bank.select([name, None, name])
        self.used(name)
        self.bank.replace(name, adapter_tensors(RANKS[0] if rank != RANKS[0] else RANKS[1]))
        self.held[name] = RANKS[0] if rank != RANKS[0] else RANKS[1]
        with torch.no_grad():
            want = torch.stack([self.reference.row(i, r) for i, r in enumerate((rank, None, rank))])
            torch.testing.assert_close(chosen(X), want, rtol=1e-4, atol=1e-4)

    @invariant()
    def as_the_dict(self) -> None:
        if hasattr(self, "held"):
            assert list(self.bank) == list(self.held)
            assert len(self.bank) == len(self.held)
            held = {id(b) for b in (self.bank[n] for n in self.held)}
            assert len(held) == len(self.held)
            assert {n for stack in self.bank.report().stacks for n in stack} <= set(self.held)


@pytest.mark.long
def test_any_order() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Banks, settings=settings(max_examples=examples(20), stateful_step_count=15))


# -- threads ----------------------------------------------------------------------------------------------------------


def everything_at_once(reference: Reference, seconds: float, threads: int, **options: Any) -> int:
    """Calls beside others that replace, remove and add: each row is of one of the versions its name has had."""
    versions = {"a": (2, 3), "b": (5, 7), "c": (3, 5)}
    bank = reference.program.bank({n: adapter_tensors(v[0]) for n, v in versions.items()}, **options)
    began, faults, calls = time.monotonic(), [], [0] * threads

    def goes_on() -> bool:
        """For so long, and on a busy machine until there were some calls."""
        took = time.monotonic() - began
        return took < seconds or (sum(calls) <= 10 and took < seconds + 60)

    def check(rows: list[str | None]) -> None:
        with torch.no_grad():
            found = bank(X, adapters=rows)
        for i, name in enumerate(rows):
            wants = [reference.row(i, r) for r in (versions[name] if name is not None else (None,))]
            assert any(torch.allclose(found[i], w, rtol=1e-4, atol=1e-4) for w in wants), (rows, i)

    def change(rng: random.Random) -> None:
        name = rng.choice(list(versions))
        if rng.random() < 0.5:
            bank.replace(name, adapter_tensors(rng.choice(versions[name])))
        else:
            bank.remove(name)
            bank.add(name, adapter_tensors(rng.choice(versions[name])))

    def work(number: int) -> None:
        rng = random.Random(number)
        while goes_on() and not faults:
            try:
                if number < threads // 4:
                    change(rng)
                else:
                    check([rng.choice([*versions, None]) for _ in range(3)])
                    calls[number] += 1
            except (adaptc.AdaptcError, KeyError) as error:
                if "the bank has no adapter" not in str(error) and "the bank has an adapter" not in str(error):
                    faults.append(traceback.format_exc())
            except BaseException:
                faults.append(traceback.format_exc())

    pool = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(threads)]
    for t in pool:
        t.start()
    for t in pool:
        t.join(seconds + 120)
    assert not faults, faults[0]
    assert not any(t.is_alive() for t in pool), "threads wait for each other"
    return sum(calls)


@pytest.mark.long
def test_threads_see_whole_adapters(reference: Reference) -> None:
    assert everything_at_once(reference, 3, 8) > 10


@pytest.mark.long
def test_threads_share_a_bank_that_evicts(reference: Reference) -> None:
    """With a loader no call fails, however few adapters it holds at once."""
    ranks = {"a": 2, "b": 3, "c": 5, "d": 7}
    bank = reference.program.bank(capacity=2, evict=True, loader=lambda name: adapter_tensors(ranks[name]))
    faults: list[str] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        try:
            for _ in range(8):
                two = rng.sample(list(ranks), 2)
                rows = [two[0], None, two[1]]
                with torch.no_grad():
                    found = bank(X, adapters=rows)
                want = [reference.row(i, None if n is None else ranks[n]) for i, n in enumerate(rows)]
                torch.testing.assert_close(found, torch.stack(want), rtol=1e-4, atol=1e-4)
        except BaseException:
            faults.append(traceback.format_exc())

    pool = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(6)]
    for t in pool:
        t.start()
    for t in pool:
        t.join(120)
    assert not faults, faults[0]
    assert len(bank) == 2


@pytest.mark.slow
def test_threads_see_whole_adapters_for_long(reference: Reference) -> None:
    assert everything_at_once(reference, 60, 8) > 100
