"""Packages of banks: rows of one call on adapters of their own in compiled code, and adapters put in afterwards."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptc
from tests.support.interrupts import interrupt_at_every_line


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 13), nn.Linear(13, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def written(model: nn.Module, folder: Path, rank: int, seed: int) -> Path:
    torch.manual_seed(seed)
    config = adaptc.LoraConfig(r=rank, lora_alpha=3, target_modules=["up", "down"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=torch.randn(3, 4, 7))
    return Path(adaptc.save_adapter(program, folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    torch.manual_seed(0)
    model = Net().eval()
    dirs = {n: written(model, folder / n, r, i) for i, (n, r) in enumerate({"a": 3, "b": 5, "c": 2, "d": 4}.items())}
    config = adaptc.LoraConfig(r=2, target_modules=["up", "down"])
    program = adaptc.compile(model, config, example_inputs=torch.randn(3, 4, 7))
    bank = program.bank({n: dirs[n] for n in ("a", "b")})
    path = adaptc.package(bank, folder / "bank.pt2", capacity=3, max_rank=6)
    return program, bank, path, dirs


@pytest.mark.long
def test_rows_of_a_package_are_those_of_its_bank(made):
    program, bank, path, dirs = made
    packaged = adaptc.load_package(path)
    assert list(packaged) == ["a", "b"]
    for rows, adapters in ((5, ["a", None, "b", {"a": 0.5, "b": -2.0}, "a"]), (2, [None, None])):
        x = torch.randn(rows, 3, 7)
        torch.testing.assert_close(packaged(x, adapters=adapters), bank(x, adapters=adapters))
    single = program.bind(dirs["b"])
    torch.testing.assert_close(packaged(x, adapters=["b", "b"]), single(x))


@pytest.mark.long
def test_what_does_not_fit_leaves_a_package_as_it_is(made, tmp_path):
    _, _, path, dirs = made
    packaged = adaptc.load_package(path)
    x = torch.randn(2, 3, 7)
    before = packaged(x, adapters=["a", "b"])
    large = written(Net().eval(), tmp_path / "large", 7, 9)
    with pytest.raises(adaptc.SwapError, match="rank 7"):
        packaged.replace("a", large)
    with pytest.raises(adaptc.ConfigError, match="has an adapter 'a'"):
        packaged.add("a", dirs["c"])
    torch.testing.assert_close(packaged(x, adapters=["a", "b"]), before, rtol=0, atol=0)


def test_options_of_banks_alone(made, tmp_path):
    program, bank, *_ = made
    with pytest.raises(adaptc.ConfigError, match="capacity"):
        adaptc.package(program, tmp_path / "one.pt2", capacity=3)
    with pytest.raises(adaptc.ConfigError, match="capacity"):
        adaptc.package(bank, tmp_path / "small.pt2", capacity=1)
    with pytest.raises(adaptc.ConfigError, match="empty"):
        adaptc.package(program.bank(), tmp_path / "none.pt2")


@pytest.mark.long
def test_a_fresh_process_runs_it(made):
    _, bank, path, dirs = made
    torch.manual_seed(4)
    x = torch.randn(3, 2, 7)
    code = (
        "import torch, adaptc\n"
        "torch.manual_seed(4); x = torch.randn(3, 2, 7)\n"
        f"bank = adaptc.load_package({str(path)!r}); bank.add('c', {str(dirs['c'])!r})\n"
        "print(bank(x, adapters=['c', None, {'a': 0.3, 'c': 0.5}]).double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bank.add("c", dirs["c"])
    expected = bank(x, adapters=["c", None, {"a": 0.3, "c": 0.5}]).double().sum().item()
    bank.remove("c")
    assert float(done.stdout) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_an_interrupt_at_any_line_leaves_the_old_or_the_new_adapters(made, full):
    """In a place that is free, and, where none is, in the one of the adapter that goes."""
    program, _, path, dirs = made
    packaged = adaptc.load_package(path)
    x = torch.randn(3, 2, 7)
    ready = {n: program.bind(d).binding for n, d in dirs.items()}
    alone = {n: program.bind(b)(x) for n, b in ready.items()}
    source = {n: "of " + n for n in dirs}
    ready = {n: dataclasses.replace(b, source=source[n]) for n, b in ready.items()}
    names = ("a", "b", "c") if full else ("a", "b")

    def reset():
        for name in list(packaged):
            packaged.remove(name)
        for name in names:
            packaged.add(name, ready[name])

    def seen():
        adapters = packaged.report().adapters
        assert list(adapters) == list(packaged)
        return [(n, b.source) for n, b in adapters.items()]

    def works():
        now = dict(seen())
        chosen = [*now, None, None][:3]
        found = packaged(x, adapters=chosen)
        for row, name in enumerate(chosen):
            if name is not None:
                torch.testing.assert_close(found[row], alone[now[name][-1]][row])

    files = (
        "/packages/package_placement.py",
        "/bank/bank.py",
        "/bank/placement.py",
        "/packages/packaged_program.py",
        "/packages/constants.py",
    )
    deeds = [lambda: packaged.replace("a", ready["d"]), lambda: packaged.remove("a")]
    for deed in deeds if full else [*deeds, lambda: packaged.add("d", ready["d"])]:
        assert interrupt_at_every_line(deed, reset, seen, works, files) >= 4


def test_options_of_an_adapter_are_those_of_a_swap_or_refused(made):
    """A scale that was left out without a word is another adapter."""
    program, _, path, dirs = made
    packaged = adaptc.load_package(path)
    x = torch.randn(3, 2, 7)
    expected = program.bind(dirs["c"], scale=0.25)(x)
    packaged.add("c", dirs["c"], scale=0.25)
    torch.testing.assert_close(packaged(x, adapters=["c"] * 3), expected)
    packaged.replace("a", dirs["c"], scale=0.25)
    torch.testing.assert_close(packaged(x, adapters=["a"] * 3), expected)
    assert not torch.allclose(expected, program.bind(dirs["c"])(x))
    for deed in (packaged.add, packaged.replace):
        with pytest.raises(TypeError, match="scales"):
            deed("b" if deed == packaged.replace else "d", dirs["d"], scales=0.25)


def test_an_adapter_that_was_interrupted_twice_is_refused_until_it_is_replaced(made, monkeypatch):
    program, _, path, dirs = made
    packaged = adaptc.load_package(path)
    ready = {n: program.bind(d).binding for n, d in dirs.items()}
    packaged.add("c", ready["c"])
    x, write = torch.randn(3, 2, 7), type(packaged.program).write_member
    others = packaged(x, adapters=["b", "c", None])

    class Cut(dict):
        def __getitem__(self, name):
            if name != next(iter(self)):
                raise KeyboardInterrupt
            return super().__getitem__(name)

    def torn(self, place, values):
        write(self, place, Cut(values))

    def interrupted():
        with monkeypatch.context() as m:
            m.setattr(type(packaged.program), "write_member", torn)
            with pytest.raises(KeyboardInterrupt):
                packaged.replace("a", ready["d"])
        with pytest.raises(adaptc.AdaptcError, match=r"'a' is not whole, since bank.replace was interrupted twice"):
            packaged(x, adapters=["b", {"a": 0.5}, None])

    interrupted()
    assert torch.equal(packaged(x, adapters=["b", "c", None]), others)
    packaged.replace("a", ready["d"])
    torch.testing.assert_close(packaged(x, adapters=["a"] * 3), program.bind(ready["d"])(x))
    interrupted()
    packaged.remove("a")
    packaged.add("a", ready["a"])
    torch.testing.assert_close(packaged(x, adapters=["a"] * 3), program.bind(ready["a"])(x))
