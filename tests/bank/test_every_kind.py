"""Promises of every bank: of a program and of its package, that is called, that generates, and that has an encoder."""

from __future__ import annotations

import dataclasses
import pickle
import threading
from typing import Any

import pytest
import torch

import adaptc
from adaptc.binding.binding import Binding
from tests.bank.kinds import ROWS, Kind, chosen, close, every_kind, made_kind, mixed_adapter
from tests.generation.models import generator, prompt
from tests.support.builds import record_builds


@pytest.mark.long
@every_kind
def test_each_row_gets_what_its_adapter_alone_gives(kind: Kind) -> None:
    bank = kind.bank()
    for names in (("first", None, "second", "first"), ("second",) * 4, (None,) * 4):
        close(kind.rows(bank, [*names]), chosen(kind, *names))
    # the base to the bit, where it is not compiled beside the adapters
    if not kind.is_packaged:
        assert torch.equal(kind.rows(bank, ["first", None, "second", "first"])[1], kind.alone(None)[1])
    one = slice(1, 2)
    close(kind.rows(bank, ["second"], one), kind.alone("second", one))
    close(kind.rows(bank, [{"second": 1, "first": 0}], one), kind.alone("second", one))
    differ = [not torch.equal(a, b) for a, b in zip(kind.alone("first"), kind.alone("second"), strict=True)]
    assert any(differ)


@pytest.mark.long
@every_kind
def test_weights_of_a_row_are_those_of_a_sum(kind: Kind) -> None:
    """Of all adapters side by side, of few and many rows; a weight is a factor on the adapter's own scale."""
    bank = kind.bank()
    mixes = [(0.6, -0.4), (-2.0, 0.0), (0.5, 1.0), (0.0, 0.3)]
    alone = {mix: kind.of_one(kind.source.bind(mixed_adapter(kind, *mix))) for mix in mixes}
    for rows in (mixes, mixes[:2], [mixes[1], mixes[2], mixes[1], mixes[3]]):
        found = kind.rows(bank, [{"first": a, "second": b} for a, b in rows], slice(len(rows)))
        close(found, [alone[mix][i] for i, mix in enumerate(rows)])
    assert not all(torch.equal(a, b) for a, b in zip(alone[mixes[0]], kind.alone("first"), strict=True))


def not_finite(kind: Kind) -> Binding:
    binding = kind.source.bind(kind.adapters["first"]).binding
    values = {n: t * float("nan") if t.ndim else t for n, t in binding.values.items()}
    return dataclasses.replace(binding, values=values)


@pytest.mark.long
@every_kind
def test_what_is_refused_changes_nothing(kind: Kind) -> None:
    bank, first = kind.bank(), kind.adapters["first"]
    before = kind.rows(bank, ROWS)
    bank.add("third", first)
    held = dict(bank.adapters)
    unpickled = r"a bank cannot be pickled.*adaptc\.save_adapter.*copy\.deepcopy"
    if kind.is_packaged:
        unpickled = r"the package of a bank can be neither copied nor pickled.*adaptc\.load_package"
    wrong_calls: list[tuple[Any, str]] = [
        (["fourth"] * 4, "no adapter 'fourth'; it has "),
        (["thirt"] * 4, "nearest are 'third'"),
        ([], "adapters has 0 entries, and"),
        (["first"], "adapters has 1 entries, and"),
        (["first"] * 3, "adapters has 3 entries, and"),
        (["first"] * 8, "adapters has 8 entries, and"),
        ("first", "is no list"),
        ([7] * 4, r"adapters\[0\] is 7"),
        ([{"first": float("nan")}] * 4, "the weight nan.*finite in float32"),
    ]
    for names, message in wrong_calls:
        with pytest.raises(adaptc.AdaptcError, match=message):
            kind.rows(bank, names)
    with pytest.raises(adaptc.AdaptcError, match="adapters= is missing: give one entry for each row"):
        kind.rows(bank, None)
    for deed, error, message in (
        (lambda: bank.add("fourth", first), adaptc.ConfigError, "no room for 'fourth'"),
        (lambda: bank.add("first", first), adaptc.ConfigError, "has an adapter 'first': bank.replace"),
        (lambda: bank.add("", first), adaptc.ConfigError, "is a string"),
        (lambda: bank.replace("fourth", first), adaptc.AdaptcError, "no adapter 'fourth'"),
        (lambda: bank.remove("fourth"), adaptc.AdaptcError, "no adapter 'fourth'"),
        (lambda: bank.replace("first", {"no": torch.ones(3)}), adaptc.SwapError, "no slot in the program: 'no'"),
        (lambda: bank.replace("first", not_finite(kind)), adaptc.CheckpointError, "first'?:? .*is not finite"),
        (lambda: bank.replace("first", "/nowhere/at/all"), adaptc.AdaptcError, "nowhere"),
        (lambda: bank.replace("first", None), adaptc.AdaptcError, "None is no adapter"),
        (lambda: bank.exported(["first", "q"]), adaptc.AdaptcError, "no adapter 'q'"),
        (lambda: bank["fourth"], KeyError, "no adapter 'fourth'"),
        (lambda: bank[4], KeyError, "no adapter 4"),
        (lambda: bank[["first"]], KeyError, r"no adapter \['first'\]"),
        (lambda: kind.source.bind(bank), adaptc.AdaptcError, r"bank\[name\] is one of its adapters"),
        (lambda: kind.source.bind(bank.select(ROWS)), adaptc.AdaptcError, r"bank\[name\] is one"),
        (lambda: pickle.dumps(bank), adaptc.AdaptcError, unpickled),
    ):
        with pytest.raises(error, match=message):
            deed()
    assert dict(bank.adapters) == held
    assert sorted(bank) == ["first", "second", "third"]
    close(kind.rows(bank, ROWS), before)


@pytest.mark.long
@every_kind
def test_a_warm_bank_makes_nothing_in_calls(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, built = kind.bank(), record_builds(monkeypatch)
    bank.warm()
    assert bool(built) != kind.is_packaged  # which has all its code
    before = len(built)
    for names in (ROWS, [None] * 4, ["first"] * 4, ["first", None, "second", "second"]):
        kind.rows(bank, names)
    for wrong in (0, 4, True, "many", 2.0):
        with pytest.raises(adaptc.ConfigError, match="is no number of adapters from 1 to 3, which the bank may hold"):
            bank.warm(wrong)
    assert built[before:] == []


@pytest.mark.long
@every_kind
def test_a_selection_keeps_its_adapters(kind: Kind) -> None:
    bank, second = kind.bank(), kind.adapters["second"]
    kept = bank.select(ROWS)
    before = kind.of_one(kept)
    close(before, kind.rows(bank, ROWS))
    bank.replace("first", second)
    bank.remove("second")
    if kind.is_packaged:
        with pytest.raises(adaptc.ConfigError, match="that go on keep 2 that are gone"):
            bank.add("third", second)
    else:
        bank.add("third", second)
    close(kind.of_one(kept), before)
    close(kind.rows(bank, ["first"] * 4), kind.alone("second"))
    with pytest.raises(adaptc.AdaptcError, match="pickled"):
        pickle.dumps(kept)
    with pytest.warns(DeprecationWarning, match=r"Bank\.assigned is called Bank\.select now"):
        old = bank.assigned([None] * 4)
    close(kind.of_one(old), kind.alone(None))


@pytest.mark.long
@pytest.mark.few(3)
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
    bank = made_kind("call", False).bank()
    for deed in (bank.generate, bank.prefill):
        with pytest.raises(adaptc.AdaptcError, match="of a program that does not generate"):
            deed(torch.ones(4, 2, dtype=torch.int64), adapters=ROWS)


@pytest.mark.long
def test_generators_name_the_bank_that_they_lack() -> None:
    gen, bank = generator(), made_kind("generate", False).bank()
    ids = prompt(4, 6)["input_ids"]
    for deed in (gen.generate, gen.prefill):
        with pytest.raises(adaptc.AdaptcError, match=r"make one with bank = gen\.bank"):
            deed(ids, adapters=ROWS)
    found = bank.generator.generate(ids, adapters=ROWS, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, bank.generate(ids, adapters=ROWS, max_new_tokens=3, do_sample=False))
    for change in (
        lambda: adaptc.swap(bank.generator, bank["first"]),
        lambda: bank.generator.set_active({"default": 0.5}),
        lambda: bank.generator.scaled(0.5),
        lambda: bank.generator.program,
    ):
        with pytest.raises(adaptc.AdaptcError, match=r"bank\.replace changes one"):
            change()
    with pytest.raises(adaptc.AdaptcError, match=r"bank\[name\] is one of its adapters"):
        assert bank.generator.active_adapters
    with pytest.raises(adaptc.AdaptcError, match=r"call bank\.generate"):
        bank(ids, adapters=ROWS)
