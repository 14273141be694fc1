"""Promise 6 at every line: an operation that is interrupted anywhere has happened, or has not, and can be done again.

A trace function raises KeyboardInterrupt at the n-th line of adaptc that runs, for many n. Afterwards the program is
one of the two it may be: calls, graph, tensors and files agree on which. Then the operation is done again, and works.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.adapter_files.atomic_write import atomic_replace
from adaptc.passes.graph.graph_lock import GRAPH_LOCK
from tests.support.gated_net import X, adapter_tensors, compile_net
from tests.support.interrupts import LineInterrupt


def swapping(p: adaptc.AdaptedProgram, folder: Path) -> None:
    adaptc.swap(p, adapter_tensors(5))


def following(p: adaptc.AdaptedProgram, folder: Path) -> None:
    adaptc.swap(p, adapter_tensors(5))
    p.validate()


def calling(p: adaptc.AdaptedProgram, folder: Path) -> None:
    adaptc.swap(p, adapter_tensors(5))
    p(X)


def merging(p: adaptc.AdaptedProgram, folder: Path) -> None:
    adaptc.unmerge(adaptc.merge(p))(X)


def binding(p: adaptc.AdaptedProgram, folder: Path) -> None:
    p.bind(adapter_tensors(5), form="weight")(X)


def saving(p: adaptc.AdaptedProgram, folder: Path) -> None:
    adaptc.save(p, folder / "p.pt2")
    adaptc.save_adapter(p, folder / "adapter")


def training(p: adaptc.AdaptedProgram, folder: Path) -> None:
    p.module()(X)


def setting(p: adaptc.AdaptedProgram, folder: Path) -> None:
    p.fuse = False
    p(X)


def copying(p: adaptc.AdaptedProgram, folder: Path) -> None:
    copy.deepcopy(p)(X)
    str(adaptc.report(p))
    p.base(X)


DEEDS = [swapping, following, calling, merging, binding, saving, training, setting, copying]


def rank_of(tensors: dict[str, Tensor]) -> set[int]:
    return {t.shape[0] for name, t in tensors.items() if "lora_A" in name}


def check(program: adaptc.AdaptedProgram, outputs: dict[int, Tensor], folder: Path) -> None:
    """It is all of one adapter, whatever shows it."""
    (rank,) = rank_of(dict(program.binding.values))
    torch.testing.assert_close(program(X), outputs[rank], rtol=1e-4, atol=1e-3)
    assert rank_of(program.state_dict) == {rank}
    program.validate()
    (fake,) = {n.meta["val"].shape[0] for n in program.graph.find_nodes(op="placeholder") if "lora_A" in n.name}
    assert fake == rank
    # Merged weights are rounded once more; the adapters are apart by more than one.
    torch.testing.assert_close(adaptc.merge(program)(X), outputs[rank], rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(X), outputs[rank], rtol=1e-4, atol=1e-3)


def interrupted(deed: Callable[..., None], points: int, folder: Path, first: int = 0) -> int:
    """Interrupt at ``points`` lines, spread over all; how many interrupts came."""
    program = compile_net()
    outputs = {2: program(X), 5: program.bind(adapter_tensors(5))(X)}
    with LineInterrupt() as lines:
        deed(copy.copy(program), folder)
    came = 0
    for n in range(1 + first, lines.count + 1, max(1, lines.count // points)):
        fresh = compile_net() if deed is merging or deed is calling else copy.deepcopy(program)
        if n % 2:
            fresh(X)
        try:
            with LineInterrupt(n):
                deed(fresh, folder)
        except KeyboardInterrupt:
            came += 1
        check(fresh, outputs, folder)
        deed(fresh, folder)
        check(fresh, outputs, folder)
    assert not list(folder.glob(".*")), "something was left behind"
    free: list[bool] = []
    thread = threading.Thread(
        target=lambda: free.append(GRAPH_LOCK.acquire(timeout=20) and GRAPH_LOCK.release() is None)
    )
    thread.start()
    thread.join()
    assert free == [True], "other threads wait for ever"
    return came


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_interrupt_at_any_line_of_a_write_leaves_one_file(tmp_path: Path) -> None:
    """Of all lines, since few of them make or move something."""

    def written(text: str) -> None:
        with atomic_replace(tmp_path / "file") as new:
            new.write_text(text)

    with LineInterrupt() as lines:
        written("0")
    came = 0
    for n in range(1, lines.count + 1):
        old = (tmp_path / "file").read_text()
        with contextlib.suppress(KeyboardInterrupt):
            came += 1
            with LineInterrupt(n):
                written(str(n))
            came -= 1
        assert (tmp_path / "file").read_text() in (old, str(n))
        written(str(-n))
        assert [p.name for p in tmp_path.iterdir()] == ["file"], f"line {n} leaves something behind"
    assert came > 40


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("deed", DEEDS, ids=lambda d: d.__name__)
def test_an_interrupt_leaves_one_adapter(deed: Callable[..., None], tmp_path: Path) -> None:
    assert interrupted(deed, 3, tmp_path) >= 1  # what one run remembers, the next does not do again


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("deed", DEEDS, ids=lambda d: d.__name__)
def test_an_interrupt_anywhere_leaves_one_adapter(deed: Callable[..., None], tmp_path: Path) -> None:
    assert interrupted(deed, 150, tmp_path, first=1) >= 100
