"""Whatever is set in whatever order: calls compute the sum of what acts, by its factors, and nothing is compiled.

The oracle is the model with the changes of the adapters added to its weights, by hand.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from tests.support.cover import examples

NAMES = ("style", "task", "third")
SITES = ("up", "down")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 11), nn.Linear(11, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


X = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@cache
def net() -> Net:
    torch.manual_seed(3)
    return Net().double().requires_grad_(False).eval()


@cache
def files() -> list[Path]:
    """Three adapters of different ranks and alphas."""
    torch.manual_seed(5)
    configs = [LoraConfig(r=r, lora_alpha=a, target_modules=list(SITES), init_lora_weights=False) for r, a in RANKS]
    made = [adaptc.compile(net(), c, example_inputs=X) for c in configs]
    return [adaptc.save_adapter(p, Path(mkdtemp())) for p in made]


RANKS = ((2, 3), (3, 1), (5, 4))


@cache
def change(file: int, site: str) -> Tensor:
    tensors = adaptc.load_adapter(files()[file]).tensors
    rank, alpha = RANKS[file]
    return alpha / rank * tensors[f"{site}.lora_B.weight"] @ tensors[f"{site}.lora_A.weight"]


def compiled(backend: str) -> adaptc.AdaptedProgram:
    adapters = dict(zip(NAMES, files(), strict=True))
    program = adaptc.compile(net(), adapters, example_inputs=X, backend=backend)
    program(X)  # which is when it compiles
    return program


@dataclass
class Model:
    """What a program should be: which file each name has, its factors by site, and whether it acts."""

    files: dict[str, int] = field(default_factory=lambda: {n: i for i, n in enumerate(NAMES)})
    factors: dict[tuple[str, str], float] = field(default_factory=dict)
    active: set[str] = field(default_factory=lambda: set(NAMES))

    def __call__(self, only: dict[str, float] | None = None, times: float = 1.0) -> Tensor:
        acting = self.active if only is None else only.keys()
        state = {k: v.clone() for k, v in net().state_dict().items()}
        for name, site in itertools.product(sorted(acting), SITES):
            factor = self.factors.get((name, site), 1.0) if only is None else only[name]
            state[f"{site}.weight"] += times * factor * change(self.files[name], site)
        return torch.func.functional_call(net(), state, X)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


FACTORS = st.sampled_from([0.0, 0.5, 1.0, -1.5, 3.0])
STEPS = st.one_of(
    st.tuples(st.just("scale"), st.sampled_from(NAMES), FACTORS, st.sampled_from([None, *SITES])),
    st.tuples(st.just("active"), st.sets(st.sampled_from(NAMES))),
    st.tuples(st.just("weights"), st.dictionaries(st.sampled_from(NAMES), FACTORS)),
    st.tuples(st.just("swap"), st.sampled_from(NAMES), st.integers(0, 2), st.none() | FACTORS),
    st.tuples(st.just("delete"), st.sampled_from(NAMES)),
    st.tuples(st.just("add"), st.sampled_from(NAMES), st.integers(0, 2)),
    st.tuples(st.just("call"), st.dictionaries(st.sampled_from(NAMES), FACTORS, min_size=1)),
    st.tuples(st.just("disabled")),
    st.tuples(st.just("scaled"), FACTORS),
)


def apply(step: tuple, p: adaptc.AdaptedProgram, m: Model) -> None:  # type: ignore[type-arg]
    """One step of both; names that are gone are left out of it."""
    match step:
        case ("scale", name, factor, site) if name in m.files:
            m.active.add(name)
            p.set_active({n: factor if n == name else None for n in m.active}, site)
            m.factors |= {(name, s): factor for s in SITES if site in (None, s)}
        case ("active", names):
            m.active = names & m.files.keys()
            p.set_active(sorted(m.active))
        case ("weights", weights):
            weights = {n: f for n, f in weights.items() if n in m.files}
            p.set_active(weights)
            m.active = set(weights)
            m.factors |= {(n, s): f for n, f in weights.items() for s in SITES}
        case ("swap", name, file, factor) if name in m.files:
            adaptc.swap(p, {name: files()[file]}, scale=factor)
            m.files[name] = file
            m.active.add(name)
            m.factors |= {(name, s): 1.0 if factor is None else factor for s in SITES}
        case ("delete", name) if name in m.files and len(m.files) > 1:
            p.delete_adapter(name)
            del m.files[name]
            m.active.discard(name)
            m.factors = {k: f for k, f in m.factors.items() if k[0] != name}
        case ("add", name, file) if name not in m.files:
            assert p.add_adapter(name, files()[file]) is p
            m.files[name] = file
            m.active.add(name)
        case ("call", weights) if weights.keys() <= m.files.keys():
            with p.scaled(weights):
                same(p(X), m(weights))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@settings(max_examples=examples(20))
@given(steps=st.lists(STEPS, max_size=9))
def test_any_sequence(backend: str, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    p, m = program(backend), Model()
    p.install(start(backend))
    with adaptc.debug.assert_no_recompiles(), ExitStack() as blocks:
        off, times = False, 1.0
        for step in steps:
            if step[0] == "disabled":
                blocks.enter_context(p.disabled())
                off = True
            elif step[0] == "scaled":
                blocks.enter_context(p.scaled(step[1]))
                times *= step[1]
            elif step[0] != "call" or (not off and times == 1):
                apply(step, p, m)
            same(p(X), m({}) if off else m(times=times))
        blocks.close()
        same(p(X), m())
        assert set(p.available_adapters) == m.files.keys()
        assert set(p.active_adapters) == m.active


@cache
def program(backend: str) -> adaptc.AdaptedProgram:
    return compiled(backend)


@cache
def start(backend: str) -> object:
    return program(backend).binding


def together(*workers: Callable[[], None]) -> None:
    """All at once, each in a thread; what one raises is raised."""
    raised: list[BaseException] = []

    def run(worker: Callable[[], None]) -> None:
        try:
            worker()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(w,)) for w in workers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if raised:
        raise raised[0]


@pytest.mark.long
def test_threads_see_their_own_blocks_and_all_of_what_is_set() -> None:
    """One thread wants the base, one other scales, one sets them; each call is of one state, never of two."""
    p = compiled("eager")
    end = time.monotonic() + 2
    with torch.no_grad():
        base, states = net()(X), {f: Model()({"style": f, "task": -f}) for f in (0.5, 2.0, -3.0)}
    tripled = [Model()({n: 3 * f for n, f in {"style": f, "task": -f}.items()}) for f in states]

    def one_of(found: Tensor, expected: list[Tensor]) -> None:
        assert sum(torch.allclose(found, e, rtol=1e-9, atol=1e-9) for e in expected) == 1

    def sets() -> None:
        for factor in itertools.cycle(states):
            if time.monotonic() > end:
                return
            p.set_active({"style": factor, "task": -factor})

    def calls() -> None:
        while time.monotonic() < end:
            one_of(p(X), list(states.values()))

    def disables() -> None:
        while time.monotonic() < end:
            with p.disabled():
                same(p(X), base)
            one_of(p(X), list(states.values()))

    def multiplies() -> None:
        while time.monotonic() < end:
            with p.scaled(3):
                one_of(p(X), tripled)

    def asks() -> None:
        while time.monotonic() < end:
            with p.scaled({"third": 0.25}):
                same(p(X), Model()({"third": 0.25}))

    p.set_active({"style": 0.5, "task": -0.5})
    together(sets, calls, disables, multiplies, asks)


def test_what_two_threads_set_is_all_set() -> None:
    """Each sets and swaps an adapter of its own: none undoes what another has done."""
    p = compiled("eager")

    def worker(name: str, file: int) -> Callable[[], None]:
        def work() -> None:
            for i in range(40):
                p.set_active({n: i if n == name else None for n in NAMES})
                if i % 8 == 7:
                    adaptc.swap(p, {name: files()[file]}, scale=i)
            p.set_active({n: file + 2 if n == name else None for n in NAMES})

        return work

    together(*(worker(name, 2 - i) for i, name in enumerate(NAMES)))
    m = Model(files={n: 2 - i for i, n in enumerate(NAMES)})
    same(p(X), m({n: 2.0 + m.files[n] for n in NAMES}))


def test_a_task_of_asyncio_has_its_own_block() -> None:
    p = compiled("eager")
    base, all_of_them = net()(X), p(X)

    async def wants_none(entered: asyncio.Event, done: asyncio.Event) -> None:
        with p.disabled():
            entered.set()
            await done.wait()
            same(p(X), base)
            same(await asyncio.to_thread(p, X), base)

    async def both() -> None:
        entered, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(wants_none(entered, done))
        await entered.wait()
        assert torch.equal(p(X), all_of_them)
        done.set()
        await task

    asyncio.run(both())
