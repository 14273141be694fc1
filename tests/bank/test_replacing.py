"""An adapter is replaced while calls go on: its stacks are made before the calls ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.bank.stack_placement import StackPlacement
from tests.support.method_checks import save_random_adapter
from tests.support.method_table import ENTRIES
from tests.support.subject import subject


def no_stack(*args: Any) -> Any:
    raise AssertionError("a call made a stack")


@pytest.mark.few(4)
@pytest.mark.parametrize("method", [e.name for e in ENTRIES if e.rows])
def test_a_stack_with_a_replaced_adapter_is_that_which_is_made_anew(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = subject(method, "linear")
    others = [save_random_adapter(s, s.config(), tmp_path / f"{seed}", seed=seed) for seed in (3, 4)]
    program = adaptc.compile(s.base, s.config(), example_inputs=s.args(3))
    bank, fresh = program.bank({"one": s.directory, "two": others[0]}), program.bank({"one": s.directory})
    fresh.add("two", others[1])
    (x,), rows = s.args(3), ["one", "two", None]
    before = bank(x, adapters=rows)
    kept = bank.select(rows)
    (old,) = bank.placement.table.contents.placed.stacks
    old_values = {n: t.clone() for n, t in old.binding.values.items()}
    expected = fresh(x, adapters=rows)
    bank.replace("two", others[1])
    monkeypatch.setattr(StackPlacement, "_make_stack", no_stack)
    assert torch.equal(bank(x, adapters=rows), expected)
    assert not torch.equal(expected, before)
    assert torch.equal(kept(x), before)
    (made,), (whole,) = (b.placement.table.contents.placed.stacks for b in (bank, fresh))
    assert all(torch.equal(made.binding.values[n], t) for n, t in whole.binding.values.items())
    assert all(made.binding.values[n].stride() == t.stride() for n, t in whole.binding.values.items())
    assert all(torch.equal(old.binding.values[n], t) for n, t in old_values.items())


def saved(folder: Path, seed: int, config: Any) -> Path:
    program = adaptc.compile(net(), config, example_inputs=X, generator=torch.Generator().manual_seed(seed))
    return adaptc.save_adapter(program, folder / f"{seed}")


def lora(folder: Path, rank: int, seed: int, targets: list[str] | None = None) -> Path:
    return saved(folder, seed, adaptc.LoraConfig(r=rank, target_modules=targets or ["0", "2"], init_lora_weights=False))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double().eval()


X = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5)


@pytest.mark.long
@pytest.mark.few(4)
@pytest.mark.parametrize("rank", [1, 3, 4, 6])
@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("targets", [["0", "2"], ["2"]])
def test_any_rank_and_any_sites_replace_one(name: str, rank: int, targets: list[str], tmp_path: Path) -> None:
    """A larger rank makes all wider, and a smaller one leaves no width that nobody needs."""
    held, new = {"one": lora(tmp_path, 4, 1), "two": lora(tmp_path, 3, 2)}, lora(tmp_path, rank, 3, targets)
    program = adaptc.compile(net(), adaptc.LoraConfig(r=2, target_modules=["0", "2"]), example_inputs=X)
    bank, fresh = program.bank(held), program.bank(held | {name: new})
    bank(X, adapters=["one", "two", None])
    bank.replace(name, new)
    found, expected = (b(X, adapters=["two", "one", None]) for b in (bank, fresh))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (made,), (whole,) = (b.placement.table.contents.placed.stacks for b in (bank, fresh))
    for fqn, t in whole.binding.values.items():
        place = [whole.names.index(n) for n in made.names]
        assert torch.equal(made.binding.values[fqn], t[place]), fqn


def test_a_replacement_that_another_one_overtakes_is_of_the_adapters_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread replaces the other adapter while the stack is prepared."""
    program = adaptc.compile(net(), adaptc.LoraConfig(r=2, target_modules=["0", "2"]), example_inputs=X)
    paths = [lora(tmp_path, 4, seed) for seed in range(4)]
    bank, fresh = program.bank({"one": paths[0], "two": paths[1]}), program.bank({"one": paths[2], "two": paths[3]})
    bank(X, adapters=["one", "two", None])
    prepare, overtaken = StackPlacement.prepare_replacement, list[str]()

    def slowly(self: StackPlacement, name: str, binding: Any) -> Any:
        made = prepare(self, name, binding)
        if not overtaken:
            overtaken.append(name)
            bank.replace("two", paths[3])
        return made

    monkeypatch.setattr(StackPlacement, "prepare_replacement", slowly)
    bank.replace("one", paths[2])
    assert overtaken == ["one"]
    held, stacks = bank.adapters, bank.placement.table.contents.placed.stacks
    assert all(held[n] is b for s in stacks for n, b in s.named_bindings)
    assert torch.equal(bank(X, adapters=["one", "two", None]), fresh(X, adapters=["one", "two", None]))
