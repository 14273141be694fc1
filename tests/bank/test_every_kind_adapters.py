"""Promises of every bank: adapters come and go, by name, from a loader, and in each copy by themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import adaptc
from tests.bank.kinds import ROWS, Kind, chosen, close, every_kind, third_adapter
from tests.generation.models import prompt


@pytest.mark.long
@every_kind
def test_adapters_come_and_go(kind: Kind) -> None:
    bank, (first, second) = kind.bank(), kind.adapters.values()
    assert (list(bank), len(bank), "first" in bank, "third" in bank) == (["first", "second"], 2, True, False)
    bank.add("third", first)
    close(kind.rows(bank, ["third", None, "second", "third"]), chosen(kind, "first", None, "second", "first"))
    bank.replace("first", second)
    close(kind.rows(bank, ["first", None, "third", "first"]), chosen(kind, "second", None, "first", "second"))
    bank.remove("second")
    assert (sorted(bank), len(bank), "second" in bank) == (["first", "third"], 2, False)
    assert bank["third"].methods
    assert bank["third"] is bank.adapters["third"]
    with pytest.raises(adaptc.AdaptcError, match=r"no adapter 'second'; it has '\w+', '\w+'"):
        kind.rows(bank, ["third", "second", None, None])
    bank.add("second", third_adapter(kind))
    own = kind.of_one(kind.source.bind(third_adapter(kind)))
    close(kind.rows(bank, ["second"] * 4), own)
    close(
        kind.rows(bank, ["second", None, "third", "first"]), [own[0], *chosen(kind, None, None, "first", "second")[1:]]
    )
    assert bank.report().to_dict()["adapters"].keys() == {"first", "second", "third"}
    assert (bank.capacity, adaptc.report(bank).nbytes) == (3, bank.nbytes)
    assert bank.nbytes > 0
    assert repr(bank).startswith("<Bank: 3 of 3 adapters, ")


@pytest.mark.long
@pytest.mark.few(2)
@every_kind
def test_options_of_an_adapter_are_those_of_a_swap_or_refused(kind: Kind) -> None:
    """A scale that was left out without a word is another adapter."""
    bank, first = kind.bank(), kind.adapters["first"]
    expected = kind.of_one(kind.source.bind(first, scale=-2.5))
    bank.add("third", first, scale=-2.5)
    close(kind.rows(bank, ["third"] * 4), expected)
    bank.replace("second", first, scale=-2.5)
    close(kind.rows(bank, ["second"] * 4), expected)
    assert not all(torch.equal(a, b) for a, b in zip(expected, kind.alone("first"), strict=True))
    bank.remove("third")
    for deed in (lambda: bank.add("third", first, scales=0.25), lambda: bank.replace("second", first, scales=0.25)):
        with pytest.raises(TypeError, match="scales"):
            deed()


@pytest.mark.long
@every_kind
def test_a_loader_gives_what_is_missing(kind: Kind) -> None:
    """Its faults are its own, and change nothing."""
    bank, second, asked = kind.bank(), kind.adapters["second"], []

    def loader(name: str) -> Any:
        asked.append(name)
        if name == "gone":
            raise OSError("the disk is gone")
        return {"third": second, "other": {"no": torch.ones(3)}}.get(name)

    bank.loader = loader
    close(kind.rows(bank, ["first", "third", None, "third"]), chosen(kind, "first", "second", None, "second"))
    bank.remove("third")
    with pytest.raises(OSError, match="the disk is gone"):
        kind.rows(bank, ["gone", "first", None, None])
    with pytest.raises(adaptc.SwapError, match="no slot in the program: 'no'") as error:
        kind.rows(bank, ["other", "first", None, None])
    assert error.value.__notes__ == ["It is adapter 'other' of the bank."]
    with pytest.raises(adaptc.AdaptcError, match="no adapter 'nobody', and its loader gave none"):
        kind.rows(bank, ["third", "nobody", None, None])
    assert (sorted(bank), asked) == (["first", "second"], ["third", "gone", "other", "third", "nobody"])


@pytest.mark.long
@every_kind
def test_a_call_of_other_rows_loads_nothing(kind: Kind) -> None:
    bank, asked = kind.bank(), []
    bank.loader = asked.append
    for names in (["third", "first"], ["third"] * 5):
        with pytest.raises(adaptc.AdaptcError, match=f"adapters has {len(names)} entries, and"):
            kind.rows(bank, names)
        if bank.generator is not None:
            with pytest.raises(adaptc.AdaptcError, match=f"{len(names)} entries, and there are 4 prompts"):
                bank.prefill(prompt(4, 6)["input_ids"], adapters=names)
    assert (sorted(bank), asked) == (["first", "second"], [])


@pytest.mark.long
@every_kind
def test_copies_are_banks_of_their_own_or_refused(kind: Kind) -> None:
    bank = kind.bank()
    before = kind.rows(bank, ROWS)
    for copied in (copy.copy, copy.deepcopy):
        if kind.is_packaged:
            with pytest.raises(adaptc.AdaptcError, match="can be neither copied nor pickled"):
                copied(bank)
            continue
        other = copied(bank)
        other.remove("second")
        assert (list(bank), list(other)) == (["first", "second"], ["first"])
        close(kind.rows(other, ["first", None, None, "first"]), chosen(kind, "first", None, None, "first"))
        other.add("third", kind.adapters["second"])
        assert (list(bank), sorted(other)) == (["first", "second"], ["first", "third"])
        close(kind.rows(other, ["first", None, "third", {"first": 0.6, "third": -0.4}]), before)
        other.add("second", third_adapter(kind))
        with pytest.raises(adaptc.ConfigError, match="no more than 3"):
            other.add("fourth", third_adapter(kind))
        shared = [
            t.data_ptr() == bank["first"].values[n].data_ptr() for n, t in other["first"].values.items() if t.ndim
        ]
        assert set(shared) == {copied is copy.copy}
    close(kind.rows(bank, ROWS), before)
