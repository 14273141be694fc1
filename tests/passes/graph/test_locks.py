"""Locks in a forked child: those that threads of the parent held are free, and work goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaptc.locks import reset_after_fork
from adaptc.passes.graph.graph_lock import GRAPH_LOCK, hold_graph_lock
from tests.support.guides import ROOT
from tests.support.interrupts import LineInterrupt

START = """
import os, sys, threading, time, warnings
import torch, adaptc
from torch import nn
warnings.simplefilter("ignore", DeprecationWarning)  # of forks of processes with threads, which this is about
torch.set_num_threads(1)
torch.manual_seed(0)
config = adaptc.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)

def made():
    model = nn.Sequential(nn.Linear(130, 131), nn.Tanh(), nn.Linear(131, 7))
    return adaptc.compile(model, config, example_inputs=x)

x = torch.randn(3, 130)
other = made()
begun = threading.Event()
"""
#: what a thread does in the middle of which the process forks
DURING = {
    "a first call": """
from adaptc.passes.graph.pass_infra import PassManager
prog, run = made(), PassManager.__call__
def slow(self, program):
    begun.set(); time.sleep(1.0)
    return run(self, program)
PassManager.__call__ = slow
work = lambda: prog(x)
""",
    "a measurement": """
from adaptc.tuning import matmul_table as product_table
prog = made()
def slow(dtype, *rest):
    begun.set(); time.sleep(1.0)
    return {}
product_table.matmul_table.__defaults__ = (slow, "")
work = lambda: product_table.matmul_table(torch.float32)
""",
    "a capture": """
run = torch.export.export
def slow(*args, **kwargs):
    begun.set(); time.sleep(1.0)
    return run(*args, **kwargs)
torch.export.export = slow
work = made
""",
}
FORK = """
thread = threading.Thread(target=work)
thread.start()
assert begun.wait(60), "the thread never came so far"
pid = os.fork()
if pid == 0:
    time.sleep = lambda seconds: None
    out, mine = other(x), made()
    adaptc.swap(mine, other.module().state_dict())
    assert torch.isfinite(mine(x)).all()
    assert torch.allclose(adaptc.merge(other)(x), out, atol=1e-4)
    print("child done", flush=True)
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert status == 0, status
thread.join()
print("parent done", torch.isfinite(made()(x)).all().item(), flush=True)
"""


@pytest.mark.long
@pytest.mark.few(1)  # each is a process of its own
@pytest.mark.parametrize("during", DURING)
def test_a_child_works_although_another_thread_held_locks(during: str, tmp_path: Path) -> None:
    code = START + DURING[during] + FORK
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "ADAPTC_CACHE": str(tmp_path), "ADAPTC_PRODUCTS": ""},
    )
    assert done.stdout.splitlines() == ["child done", "parent done True"], done.stderr[-3000:]


def in_child(work: Callable[[], Any]) -> int:
    """How a child ends that does ``work``; it is killed where it waits for ever."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    for _ in range(3000):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("make", [threading.Lock, threading.RLock])
def test_a_lock_of_another_thread_is_free(make: Callable[[], Any]) -> None:
    lock, free, let_go = reset_after_fork(make()), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            free.set()
            let_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    free.wait()
    try:
        assert in_child(lambda: lock.acquire(timeout=20)) == 0
        assert not lock.acquire(blocking=False), "in the parent it is still held"
    finally:
        let_go.set()
        thread.join()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_lock_of_the_thread_that_forks_stays_its_own() -> None:
    def held_once() -> bool:
        GRAPH_LOCK.release()
        with pytest.raises(RuntimeError):
            GRAPH_LOCK.release()
        return True

    with GRAPH_LOCK:
        assert in_child(held_once) == 0


def test_every_lock_is_known() -> None:
    """Or a child of a fork waits for it."""
    known = re.compile(r"reset_after_fork\((threading\.)?R?Lock\(\)\)")
    files = [f for folder in ("adaptc", "passes", "kernels") for f in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert not [f.name for f in files if re.search(r"\bR?Lock\b\(\)", known.sub("", f.read_text()))]


def test_an_interrupt_at_any_line_leaves_the_lock_free() -> None:
    def nested() -> None:
        with hold_graph_lock(), hold_graph_lock():
            pass

    def is_free() -> bool:
        found: list[bool] = []
        thread = threading.Thread(
            target=lambda: found.append(GRAPH_LOCK.acquire(timeout=5) and GRAPH_LOCK.release() is None)
        )
        thread.start()
        thread.join()
        return found[0]

    files, came = ("graph_lock.py",), 0
    with LineInterrupt(files=files) as lines:
        nested()
    for n in range(1, lines.count + 1):
        try:
            with LineInterrupt(n, files):
                nested()
        except KeyboardInterrupt:
            came += 1
        assert is_free(), f"line {n}"
    assert came >= 10
