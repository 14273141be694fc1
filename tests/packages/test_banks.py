"""Packages of banks: what does not fit, and an adapter that was interrupted while it was written over another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adaptc
from tests.bank.kinds import Kind, config, made_kind, package_of, tensors, third_adapter


@pytest.fixture
def kind() -> Kind:
    return made_kind("call", True)


@pytest.mark.long
def test_what_does_not_fit_leaves_a_package_as_it_is(kind: Kind) -> None:
    packaged = kind.bank()
    before = kind.rows(packaged, ["first", "second", None, "first"])
    with pytest.raises(adaptc.SwapError, match="rank 7"):
        packaged.replace("first", tensors(7), config=config(7))
    after = kind.rows(packaged, ["first", "second", None, "first"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_options_of_banks_alone(kind: Kind, tmp_path: Any) -> None:
    with pytest.raises(adaptc.ConfigError, match="capacity"):
        adaptc.package(kind.source, tmp_path / "one.pt2", capacity=3)


@pytest.mark.long
def test_an_adapter_that_was_interrupted_twice_is_refused_until_it_is_replaced(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, packaged = kind.source, adaptc.load_package(package_of(kind))
    ready = {n: program.bind(a).binding for n, a in {**kind.adapters, "third": third_adapter(kind)}.items()}
    packaged.add("third", ready["third"])
    new = program.bind(kind.adapters["second"], scale=0.5).binding
    write = type(packaged.program).write_member
    others = kind.rows(packaged, ["second", "third", None, None])

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
                packaged.replace("first", new)
        with pytest.raises(adaptc.AdaptcError, match=r"'first' is not whole, since bank.replace was interrupted twice"):
            kind.rows(packaged, ["second", {"first": 0.5}, None, None])

    interrupted()
    assert all(map(torch.equal, kind.rows(packaged, ["second", "third", None, None]), others))
    packaged.replace("first", new)
    torch.testing.assert_close(kind.rows(packaged, ["first"] * 4), kind.of_one(program.bind(new)))
    interrupted()
    packaged.remove("first")
    packaged.add("first", ready["first"])
    torch.testing.assert_close(kind.rows(packaged, ["first"] * 4), kind.alone("first"))
