"""The limit on what is computed once, set later: it frees what is held by all that is bound, and they keep to it."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.runtime.hoisted_values import HoistedMemory
from tests.support import gated_net
from tests.support.gated_net import X

ROWS = (X, torch.randn(9000, 5, generator=torch.Generator().manual_seed(8)))
RANKS = (2, 5, 9)


def program(**options: Any) -> adaptc.AdaptedProgram:
    """Its adapter is frozen, and its layers fused: with two variants, each of which holds values of its own."""
    return gated_net.compile_net(4, **options)


def bound(prog: adaptc.AdaptedProgram, **options: Any) -> list[Any]:
    return [prog.bind(gated_net.adapter_tensors(r), config=gated_net.config(r), **options) for r in RANKS]


def close(found: Tensor, wanted: Tensor) -> None:
    """Up to rounding: the sums of the variants are taken in another order."""
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


def nbytes(held: HoistedMemory) -> int:
    return held.nbytes + held.shared_nbytes


def values(arguments: Any) -> list[Tensor]:
    """Everything that one binding's prefixes hold and its own inputs are not."""
    states = [p.state for p in arguments.hoisted_inputs.values()]
    inputs = {t.untyped_storage().data_ptr() for s in states for t in s.lifted if isinstance(t, Tensor)}
    made = [t for s in states for t in (*s.base.values, *s.slots.values)]
    return [t for t in made if t.untyped_storage().data_ptr() not in inputs]


def test_setting_it_frees_what_is_held() -> None:
    prog = program()
    calls = [prog, *bound(prog)]
    before = [[call(x) for x in ROWS] for call in calls]
    held = [prog.call_state.arguments, *(b.prepared.compiled_state().arguments for b in calls[1:])]
    gone = [weakref.ref(t) for a in held for t in values(a)]
    assert len(gone) >= 2 * len(calls)
    assert all(nbytes(call.held) > 0 for call in calls)
    del held
    prog.hoist_limit = 0
    assert all(r() is None for r in gone)
    assert [nbytes(call.held) for call in calls] == [0] * len(calls)
    for call, out in zip(calls, before, strict=True):
        for x, wanted in zip(ROWS, out, strict=True):
            close(call(x), wanted)
    assert [nbytes(call.held) for call in calls] == [0] * len(calls)
    prog.hoist_limit = None
    for call, out in zip(calls, before, strict=True):
        assert all(torch.equal(call(x), wanted) for x, wanted in zip(ROWS, out, strict=True))
    assert all(nbytes(call.held) > 0 for call in calls)


@pytest.mark.parametrize("order", [ROWS, ROWS[::-1]], ids=["few rows first", "many rows first"])
def test_no_binding_holds_more(order: Any) -> None:
    """Whatever its rank, and whichever variants of the code it is called with."""
    prog = program()
    calls = [prog, *bound(prog)]
    wanted = [[call(x) for x in order] for call in calls]
    most = max(nbytes(call.held) for call in calls)
    least = min(nbytes(call.held) for call in calls)
    some = set()
    for limit in (most, most - 1, 730, least, least // 2 + 1, 200, 100, 20, 0):
        prog.hoist_limit = limit
        late = prog.bind(gated_net.adapter_tensors(9), config=gated_net.config(9))
        for call, out in zip([*calls, late], [*wanted, wanted[-1]], strict=True):
            for x, w in zip(order, out, strict=True):
                close(call(x), w)
            assert nbytes(call.held) <= limit
            some.add(nbytes(call.held))
    assert len(some) > 4
    assert nbytes(calls[-1].held) == 0


def test_other_options_stay_those_of_the_time_it_was_bound() -> None:
    """Only the limit is followed; who is bound with other options than the program's shares code with its like."""
    prog = program()
    calls = bound(prog)
    prog.fuse = False
    assert not prog.fusion.groups
    later = bound(prog)
    prog.hoist_limit = 300
    for call in (*calls, *later):
        call(X)
    assert {b.prepared.compiled_state().options.hoist_limit for b in (*calls, *later)} == {300}
    assert [b.prepared.compiled_state().executor.fusion.groups for b in calls] == [1] * 3
    assert len({id(b.prepared.compiled_state().executor) for b in calls}) == 1
    assert {id(b.prepared.compiled_state().executor) for b in later} == {id(prog.executor())}


def test_the_weight_form_keeps_its_weights_and_no_more() -> None:
    prog = program()
    own, out = prog.bind(gated_net.adapter_tensors(3), config=gated_net.config(3), form="weight"), []
    for limit in (None, 0):
        prog.hoist_limit = limit
        out.append(own(X))
        weights = sum(t.nbytes for t in own.engine.own_weights)
        assert own.held.nbytes + own.held.shared_nbytes >= weights
        assert limit is None or nbytes(own.held) == weights
    close(*out)


def test_what_is_bound_to_another_program_stays() -> None:
    prog = program()
    other = prog.with_binding(prog.binding)
    (mine, *_), (theirs, *_) = bound(prog), bound(other)
    for call in (mine, theirs):
        call(X)
    prog.hoist_limit = 0
    assert nbytes(mine.held) == 0
    assert nbytes(theirs.held) > 0


def test_nobody_is_kept_alive_by_the_program() -> None:
    prog = program()
    gone = weakref.ref(bound(prog)[0])
    assert gone() is None


def test_setting_it_while_threads_call() -> None:
    prog = program()
    calls = bound(prog)
    wanted = [call(X) for call in calls]
    wrong: list[Any] = []

    def calling(i: int) -> None:
        for _ in range(60):
            try:
                close(calls[i](X), wanted[i])
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=calling, args=(i % 3,)) for i in range(6)]
    for t in threads:
        t.start()
    for limit in (0, 100, None, 250, 0, None, 300):
        prog.hoist_limit = limit
    for t in threads:
        t.join()
    assert not wrong, wrong
    assert all(nbytes(call.held) <= 300 for call in calls)
