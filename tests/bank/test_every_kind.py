"""Promises of every bank: of a program and of its package, that is called, that generates, and that has an encoder."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from tests.generation.models import case, generated, generator, prompt
from tests.generation.test_encoder_decoders import said

ROWS: list[Any] = ["first", None, "second", {"first": 0.6, "second": -0.4}]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@dataclass(frozen=True, eq=False)
class Kind:
    """A program or a generator ``source``, the two adapters of its banks, and how ``run(callable, row)`` asks it.

    ``run`` gives one result for each row of the shared inputs, all of them or those in ``row``.
    """

    source: Any
    adapters: dict[str, Any]
    run: Callable[..., list[Tensor]]
    is_packaged: bool

    def bank(self, **options: Any) -> Any:
        if not self.is_packaged:
            return self.source.bank(self.adapters, capacity=3, **options)
        return adaptc.load_package(package_of(self))

    def rows(self, bank: Any, names: list[Any]) -> list[Tensor]:
        return self.run(lambda **given: of_bank(bank, names, given))

    def alone(self, name: str | None) -> list[Tensor]:
        """What each row gets by a program with this adapter alone."""
        one = self.source.base if name is None else self.source.bind(self.adapters[name])
        return self.run(lambda **given: of_bank(one, None, given))


def of_bank(bank: Any, names: list[Any] | None, given: dict[str, Any]) -> Any:
    more = {} if names is None else {"adapters": names}
    return (
        bank.generate(**given, **more)
        if hasattr(bank, "generate") and "max_new_tokens" in given
        else bank(**given, **more)
    )


@cache
def package_of(kind: Kind) -> Path:
    made = kind.source.bank(kind.adapters, capacity=3)
    return adaptc.package(made, Path(mkdtemp()) / "bank.pt2", capacity=3, max_rank=5)


@cache
def net() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = adaptc.LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
    program = adaptc.compile(Net().eval(), config, example_inputs=torch.randn(4, 3, 7))
    state = {k: t.clone() for k, t in program.module().state_dict().items() if "lora" in k}
    other = {
        k: torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) for i, (k, t) in enumerate(state.items())
    }
    folder = Path(mkdtemp())
    first = adaptc.save_adapter(program, folder / "first")
    adaptc.swap(program, {k.removeprefix("base_model.model."): t for k, t in other.items()})
    return program, {"first": first, "second": adaptc.save_adapter(program, folder / "second")}


def call(model: Callable[..., Any]) -> list[Tensor]:
    x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return list(model(x=x))


class Generates:
    """A generator or a bank as the helpers of tests/generation call it."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.generate = run


def write(model: Callable[..., Any]) -> list[Tensor]:
    return list(generated(Generates(model), prompt(4, 6, (0, 2)), new=4))


def answer(model: Callable[..., Any]) -> list[Tensor]:
    return list(said(Generates(model), prompt(4, 6, (0, 2)), new=4, eos_token_id=None))


KINDS = [
    pytest.param(way, packaged, id=f"{way}-{'package' if packaged else 'program'}", marks=[pytest.mark.long] * slow)
    for way in ("call", "generate", "encoder-decoder")
    for packaged in (False, True)
    for slow in (packaged and way != "call",)
]


@cache
def made(way: str, packaged: bool) -> Kind:
    if way == "call":
        return Kind(*net(), call, packaged)
    family = "llama" if way == "generate" else "t5"
    return Kind(generator(family), dict(case(family).adapters), write if way == "generate" else answer, packaged)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    return made(*request.param)


every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(p.values, id=p.id, marks=p.marks) for p in KINDS], indirect=True
)


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=2e-5)


def chosen(kind: Kind, *names: str | None) -> list[Tensor]:
    return [kind.alone(name)[row] for row, name in enumerate(names)]


@every_kind
def test_each_row_gets_what_its_adapter_alone_gives(kind: Kind) -> None:
    bank = kind.bank()
    for names in (("first", None, "second", "first"), ("second",) * 4, (None,) * 4):
        close(kind.rows(bank, [*names]), chosen(kind, *names))
    differ = [not torch.equal(a, b) for a, b in zip(kind.alone("first"), kind.alone("second"), strict=True)]
    assert any(differ)


@every_kind
def test_adapters_come_and_go(kind: Kind) -> None:
    bank, (first, second) = kind.bank(), kind.adapters.values()
    assert (list(bank), len(bank), "first" in bank, "third" in bank) == (["first", "second"], 2, True, False)
    bank.add("third", first)
    close(kind.rows(bank, ["third", None, "second", "third"]), chosen(kind, "first", None, "second", "first"))
    bank.replace("first", second)
    close(kind.rows(bank, ["first", None, "third", "first"]), chosen(kind, "second", None, "first", "second"))
    bank.remove("second")
    assert sorted(bank) == ["first", "third"]
    assert bank["third"].methods
    bank.add("second", second)
    close(kind.rows(bank, ["second"] * 4), kind.alone("second"))
    assert bank.report().data()["adapters"].keys() == {"first", "second", "third"}
    assert (bank.capacity, adaptc.report(bank).nbytes) == (3, bank.nbytes)


@every_kind
def test_what_is_refused_changes_nothing(kind: Kind) -> None:
    bank, first = kind.bank(), kind.adapters["first"]
    before = kind.rows(bank, ROWS)
    bank.add("third", first)
    wrong_calls: list[tuple[Any, str]] = [
        (["fourth"] * 4, "no adapter 'fourth'"),
        (["first"] * 3, "adapters has 3 entries, and"),
        (["first"] * 8, "adapters has 8 entries, and"),
        ("first", "is no list"),
        ([7] * 4, r"adapters\[0\] is 7"),
        ([{"first": float("nan")}] * 4, "finite in float32"),
    ]
    for names, message in wrong_calls:
        with pytest.raises(adaptc.AdaptcError, match=message):
            kind.rows(bank, names)
    with pytest.raises(adaptc.AdaptcError, match="adapters= is missing"):
        kind.run(lambda **given: of_bank(bank, None, given))
    for deed, error, message in (
        (lambda: bank.add("fourth", first), adaptc.ConfigError, "no room for 'fourth'"),
        (lambda: bank.add("first", first), adaptc.ConfigError, "has an adapter 'first'"),
        (lambda: bank.add("", first), adaptc.ConfigError, "is a string"),
        (lambda: bank.replace("fourth", first), adaptc.AdaptcError, "no adapter 'fourth'"),
        (lambda: bank.remove("fourth"), adaptc.AdaptcError, "no adapter 'fourth'"),
        (lambda: bank.replace("first", {"no": torch.ones(3)}), adaptc.AdaptcError, "no"),
        (lambda: bank.warm(0), adaptc.ConfigError, "no number of adapters from 1"),
        (lambda: bank["fourth"], KeyError, "no adapter 'fourth'"),
        (lambda: pickle.dumps(bank), adaptc.AdaptcError, "pickled"),
    ):
        with pytest.raises(error, match=message):
            deed()
    assert sorted(bank) == ["first", "second", "third"]
    close(kind.rows(bank, ROWS), before)


@every_kind
def test_a_selection_keeps_its_adapters(kind: Kind) -> None:
    bank, second = kind.bank(), kind.adapters["second"]
    kept = bank.select(ROWS)
    before = kind.run(lambda **given: of_bank(kept, None, given))
    close(before, kind.rows(bank, ROWS))
    bank.replace("first", second)
    bank.remove("second")
    close(kind.run(lambda **given: of_bank(kept, None, given)), before)
    close(kind.rows(bank, ["first"] * 4), kind.alone("second"))
    with pytest.warns(DeprecationWarning, match=r"Bank\.assigned is called Bank\.select now"):
        old = bank.assigned([None] * 4)
    close(kind.run(lambda **given: of_bank(old, None, given)), kind.alone(None))


@every_kind
def test_copies_are_banks_of_their_own_or_refused(kind: Kind) -> None:
    bank = kind.bank()
    for copied in (copy.copy, copy.deepcopy):
        if kind.is_packaged:
            with pytest.raises(adaptc.AdaptcError, match="can be neither copied nor pickled"):
                copied(bank)
            continue
        other = copied(bank)
        other.remove("second")
        assert (list(bank), list(other)) == (["first", "second"], ["first"])
        close(kind.rows(other, ["first", None, None, "first"]), chosen(kind, "first", None, None, "first"))


@every_kind
def test_threads_get_the_rows_that_they_ask_for(kind: Kind) -> None:
    bank, first = kind.bank(), kind.adapters["first"]
    expected = {name: kind.alone(name) for name in ("first", "second", None)}
    wrong: list[Any] = []

    def ask(name: str | None) -> None:
        for _ in range(4):
            found = kind.rows(bank, [name] * 4)
            if not all(torch.allclose(f, e, atol=2e-5) for f, e in zip(found, expected[name], strict=True)):
                wrong.append(name)

    def change() -> None:
        for _ in range(6):
            bank.add("third", first)
            bank.remove("third")

    threads = [threading.Thread(target=ask, args=(name,)) for name in expected] + [threading.Thread(target=change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert list(bank)[-1] != "third"


def test_a_bank_of_a_program_does_not_generate() -> None:
    bank = made("call", False).bank()
    for deed in (bank.generate, bank.prefill):
        with pytest.raises(adaptc.AdaptcError, match="of a program that does not generate"):
            deed(torch.ones(4, 2, dtype=torch.int64), adapters=ROWS)


def test_generators_name_the_bank_that_they_lack() -> None:
    gen, bank = generator(), made("generate", False).bank()
    ids = prompt(4, 6)["input_ids"]
    for deed in (gen.generate, gen.prefill):
        with pytest.raises(adaptc.AdaptcError, match=r"make one with bank = gen\.bank"):
            deed(ids, adapters=ROWS)
    found = bank.generator.generate(ids, adapters=ROWS, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, bank.generate(ids, adapters=ROWS, max_new_tokens=3, do_sample=False))
    assert bank.generator.program is bank.program
