"""Several adapters of one package at once: bound beside the current one, swapped while calls run, in any thread."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptc
from adaptc import AdaptcError, CheckpointError, ConfigError, SwapError
from adaptc.packages.constants import Constants
from tests.support.packaged_nets import NET_CONFIG, SIZES, Packaged, adapter, net_inputs
from tests.support.turns import Turns

#: what is compiled once serves all tests of the file
pytestmark = pytest.mark.long

CONFIGS = [
    NET_CONFIG.replace(r=r, lora_alpha=2.0 * r + 1, rank_pattern={"conv": 3}, use_rslora=r % 2 == 0)
    for r in (1, 2, 5, 6)
]
#: sites of each; None for all
SITES = [None, "lin.weight", "experts", None]
INPUT = net_inputs(3, 7)


def tensors(net: Packaged, i: int) -> dict[str, Tensor]:
    return adapter(net.program, CONFIGS[i], lambda fqn: SITES[i] in (None, fqn), seed=10 + i)


def run(call: Any, size: tuple[int, int] = (3, 7)) -> Tensor:
    args, kwargs = net_inputs(*size)
    with torch.no_grad():
        return call(*args, **kwargs)["y"]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module")
def bound(net: Packaged) -> list[tuple[Any, Any]]:
    """Each adapter bound to the package and to the program."""
    pairs = [(tensors(net, i), CONFIGS[i]) for i in range(len(CONFIGS))]
    return [(net.runner.bind(t, config=c), net.program.bind(t, config=c)) for t, c in pairs]


def test_each_computes_its_own_adapter_in_any_order(net: Packaged, bound: Any) -> None:
    config = NET_CONFIG.replace(r=3, lora_alpha=5)
    adaptc.swap(net.runner, adapter(net.program, config, seed=3), config=config)
    adaptc.swap(net.program, adapter(net.program, config, seed=3), config=config)
    order = [0, 3, 1, 1, 2, 0, 2, 3]
    for i, size in zip(order, SIZES * 2, strict=True):
        ours, theirs = bound[i]
        close(run(ours, size), run(theirs, size))
        net.check_same_outputs(size)
    outputs = [run(ours) for ours, _ in bound]
    assert all((a - b).abs().max() > 1e-2 for n, a in enumerate(outputs) for b in outputs[:n])


def test_the_first_adapter_comes_back_to_the_bit(net: Packaged, bound: Any) -> None:
    """It is in compiled code alone, which calls of others write over."""
    package = adaptc.load_package(net.path)
    first, out = package.binding, run(package)
    other = package.bind(tensors(net, 3), config=CONFIGS[3])
    assert not torch.equal(run(other), out)
    assert torch.equal(run(package), out)
    adaptc.swap(package, tensors(net, 0), config=CONFIGS[0])
    close(run(package), run(bound[0][1]))
    report = adaptc.swap(package, first)
    assert report.source == str(net.path)
    assert torch.equal(run(package), out)
    adaptc.swap(package, other.binding)
    assert package.binding is other.binding
    assert torch.equal(run(package), run(other))


def test_the_base(net: Packaged, bound: Any) -> None:
    run(bound[0][0])
    close(run(net.runner.base), run(net.model))
    assert run(net.runner.base).sub(run(bound[0][0])).abs().max() > 1e-2


def test_swap_and_bind_of_the_facade_take_every_option(net: Packaged, tmp_path: Path) -> None:
    adaptc.swap(net.program, tensors(net, 3), config=CONFIGS[3])
    directory = adaptc.save_adapter(net.program, tmp_path / "a")
    wanted = run(net.program)
    (file,) = directory.glob("*.safetensors")
    renamed = {k.replace("model.lin.", "model.inner.lin."): v for k, v in load_file(file).items()}
    assert renamed.keys() != load_file(file).keys()
    save_file(renamed, file)
    mapping = {r"^inner\.": ""}
    for call in (net.runner.bind(directory, key_mapping=mapping), net.runner):
        if call is net.runner:
            report = adaptc.swap(net.runner, directory, key_mapping=mapping)
            assert (report.sites, report.source) == (6, str(directory))
            assert report.seconds > 0
        close(run(call), wanted)
    with pytest.raises(SwapError, match="inner"):
        adaptc.swap(net.runner, directory)
    with pytest.raises(ConfigError, match=r"key_mapping\[.a.\] must be"):
        net.runner.bind(directory, key_mapping={"a": 1})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="adapter_name must be"):
        adaptc.swap(net.runner, directory, adapter_name=5)  # type: ignore[arg-type]


def test_a_refused_adapter_changes_nothing(net: Packaged, bound: Any) -> None:
    adaptc.swap(net.runner, tensors(net, 0), config=CONFIGS[0])
    before, binding = run(net.runner), net.runner.binding
    large = NET_CONFIG.replace(r=7, rank_pattern={"conv": 3})
    bad = tensors(net, 0)
    bad["lin.lora_A.weight"][0, 3] = float("nan")
    other = adaptc.load_package(net.path)
    for error, match, given, options in [
        (SwapError, "has room for 6", adapter(net.program, large), {"config": large}),
        (CheckpointError, "NaN or infinite", bad, {"config": CONFIGS[0]}),
        (SwapError, "belongs to another package", other.binding, {}),
        (AdaptcError, "an adapter is a directory", 5, {}),
    ]:
        for call in (net.runner.bind, lambda *a, **k: adaptc.swap(net.runner, *a, **k)):
            with pytest.raises(error, match=match):
                call(given, **options)
    assert net.runner.binding is binding
    assert torch.equal(run(net.runner), before)


def test_forms_and_copies(net: Packaged, bound: Any) -> None:
    assert net.runner.bind(tensors(net, 0), config=CONFIGS[0], form="auto", memory_limit=10).form == "apply"
    with pytest.raises(ConfigError, match=r"form=.weight.*package the merged program"):
        net.runner.bind(tensors(net, 0), config=CONFIGS[0], form="weight")
    with pytest.raises(ConfigError, match="memory_limit"):
        net.runner.bind(tensors(net, 0), config=CONFIGS[0], memory_limit=-1)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(AdaptcError, match="bind the adapter there"):
            attempt(bound[0][0])
    assert repr(bound[1][0]) == "Runner('state dict', 1 of 6 sites, packaged)"


def test_what_is_bound_owns_its_values(net: Packaged) -> None:
    given = tensors(net, 3)
    ours = net.runner.bind(given, config=CONFIGS[3])
    theirs = net.program.bind(given, config=CONFIGS[3])
    passed = net.runner.bind(theirs.binding)
    before = run(ours)
    for t in (*given.values(), *theirs.binding.values.values()):
        t.data.fill_(float("nan"))
    assert torch.equal(run(ours), before)
    assert torch.equal(run(passed), before)


def test_memory_of_what_is_bound(net: Packaged, bound: Any) -> None:
    """Its values, padded; sites it lacks take next to nothing."""
    package = net.runner
    whole = sum(r.dtype.itemsize * torch.Size(r.shape).numel() for r in package.manifest.rooms.values())
    assert bound[3][0].held.nbytes == whole
    assert bound[1][0].held.nbytes < whole / 2
    assert bound[1][0].held.count == len(package.manifest.rooms)


def test_an_interrupt_while_values_are_copied(net: Packaged, bound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code then holds parts of two adapters, and the next call makes it whole."""
    wanted = run(bound[0][0])

    class Cut(dict[str, Tensor]):
        reads = 0

        def __getitem__(self, name: str) -> Tensor:
            self.reads += 1
            if self.reads > 5:
                raise KeyboardInterrupt
            return super().__getitem__(name)

    run(bound[3][0])
    run(bound[0][0])
    with monkeypatch.context() as m:
        fill = Constants._load_values
        m.setattr(Constants, "_load_values", lambda self, values: fill(self, Cut(values)))
        with pytest.raises(KeyboardInterrupt):
            run(bound[3][0])
    assert torch.equal(run(bound[0][0]), wanted)


@contextmanager
def threads(workers: list[Any]) -> Iterator[list[BaseException]]:
    errors: list[BaseException] = []

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=guarded, args=(w,)) for w in workers]
    for t in started:
        t.start()
    yield errors
    for t in started:
        t.join()


def test_threads_call_bind_and_swap_at_once(net: Packaged, bound: Any) -> None:
    """Eight threads, four adapters bound, a fifth swapped in and out: each result is all of one adapter's."""
    package = net.runner
    alone = [run(theirs) for _, theirs in bound]
    done: list[str] = []
    every_kind = {"bound", "swap", "current", "bind"}
    turns = Turns(3, lambda: set(done) == every_kind)

    def calls(i: int) -> None:
        while turns.go_on():
            close(run(bound[i][0]), alone[i])
            done.append("bound")

    def swaps(seed: int) -> None:
        rng = random.Random(seed)
        while turns.go_on():
            i = rng.randrange(4)
            if rng.random() < 0.5:
                adaptc.swap(package, bound[i][0].binding)
            else:
                adaptc.swap(package, tensors(net, i), config=CONFIGS[i])
            done.append("swap")

    def current() -> None:
        while turns.go_on():
            found = run(package)
            assert sum(torch.allclose(found, a, rtol=1e-4, atol=1e-4) for a in alone) == 1, found
            done.append("current")

    def binds() -> None:
        while turns.go_on():
            for i in range(4):
                close(run(package.bind(tensors(net, i), config=CONFIGS[i])), alone[i])
            done.append("bind")

    adaptc.swap(package, bound[0][0].binding)
    work: list[Any] = [lambda i=i: calls(i) for i in range(4)] + [lambda: swaps(1), lambda: swaps(2), current, binds]
    with threads(work) as errors:
        pass
    assert not errors, errors
    assert set(done) == every_kind
