"""Generators whose adapters are scaled, on and off: the tokens of a PeftModel that is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft.helpers import rescale_adapter_scale
from torch import Tensor

import adaptc
from adaptc import AdaptcError, ConfigError
from tests.generation.models import case, generated, generator, prompt
from tests.generation.packaged import packaged


def said(model: Any, given: dict[str, Tensor], **how: Any) -> Any:
    return generated(model, given, do_sample=True, **how)


@contextmanager
def factor(found: Any, value: float) -> Iterator[None]:
    """PEFT's model with its first adapter scaled."""
    found.oracle.set_adapter("first")
    with rescale_adapter_scale(found.oracle, value):
        yield


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_tokens_are_those_of_peft(family: str) -> None:
    found, gen, given = case(family), generator(family), prompt(3, 9)
    with factor(found, 4.0):
        scaled = said(found.oracle, given)
    first, base = found.expected("first", given, do_sample=True), found.expected(None, given, do_sample=True)
    assert not torch.equal(first, base)
    assert not torch.equal(scaled, first)
    try:
        with pytest.warns(DeprecationWarning, match=r"with generator\.scaled\(scale\): generator\.generate\(") as told:
            assert torch.equal(said(gen, given, adapter_scale=4.0), scaled)
        assert len(told) == 1
        assert torch.equal(said(gen, given), first)
        with gen.scaled({"default": 4.0}):
            assert torch.equal(said(gen, given), scaled)
        assert torch.equal(said(gen.bind(found.adapters["first"], scale=4.0), given), scaled)
        with gen.scaled(4.0):
            assert torch.equal(said(gen, given), scaled)
            with gen.disabled():
                assert torch.equal(said(gen, given), base)
        gen.set_active({"default": 1.0})
        with pytest.warns(DeprecationWarning, match="set_active") as told:
            gen.set_scale(4.0)
        assert [w.filename for w in told] == [__file__]
        assert torch.equal(said(gen, given), scaled)
        adaptc.swap(gen, found.adapters["first"])
        gen.set_active({"default": 4.0})
        assert torch.equal(said(gen, given), scaled)
        assert adaptc.debug.get_model_status(gen).scales == {"default": 4.0}
        gen.set_active([])
        assert gen.active_adapters == []
        assert torch.equal(said(gen, given), base)
    finally:
        adaptc.swap(gen, found.adapters["first"])
    assert torch.equal(said(gen, given), first)
    bound = gen.bind(found.adapters["first"])
    for attempt in (lambda: said(bound, given, adapter_scale=2), lambda: said(gen, given, adapter_scale="2")):
        with pytest.raises(ConfigError, match="adapter_scale"):
            attempt()


def test_a_generation_keeps_the_scale_it_began_with() -> None:
    found, gen, given = case("llama"), generator(), prompt(2, 5)
    first = found.expected("first", given, do_sample=True)

    class Sets:
        """A streamer that sets the scale in the middle of a generation."""

        def put(self, value: Tensor) -> None:
            gen.set_active({"default": 0.0})

        def end(self) -> None:
            pass

    one = {n: t[:1] for n, t in given.items()}
    expected = found.expected("first", one, do_sample=True)
    try:
        assert torch.equal(said(gen, one, streamer=Sets()), expected)
        assert not torch.equal(said(gen, given), first)
    finally:
        adaptc.swap(gen, found.adapters["first"])


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_packages_generate_with_scales(family: str) -> None:
    """Blocks are of the thread that is in them, and a generation keeps the scale that it began with."""
    gen, package, given = generator(family), packaged(family), prompt(3, 9)
    first, base = said(gen, given), said(gen.base, given)
    with gen.scaled(4.0):
        scaled = said(gen, given)
    found: list[Tensor] = []
    worker = threading.Thread(target=lambda: found.append(said(package, given)))
    for scale in (4.0, {"default": 4.0}):
        with package.scaled(scale):
            assert torch.equal(said(package, given), scaled)
    with package.scaled(4.0):
        worker.start()
        worker.join()
        with package.disabled():
            assert torch.equal(said(package, given), base)
    assert torch.equal(found[0], first)
    with pytest.warns(DeprecationWarning, match=r"scaled\(scale\)"):
        assert torch.equal(said(package, given, adapter_scale=4.0), scaled)
    try:
        package.set_active({"default": 4.0})
        assert torch.equal(said(package, given), scaled)
        package.set_active([])
        assert package.active_adapters == []
        assert torch.equal(said(package, given), base)
    finally:
        package.set_active({"default": 1.0})
    assert torch.equal(said(package, given), first)


@pytest.mark.long
def test_one_more_adapter_is_one_more_generator() -> None:
    found, given = case("llama"), prompt(2, 5)
    gen = generator()
    with pytest.raises(AdaptcError, match="recompile=True"):
        gen.add_adapter("second", found.adapters["second"])
    both = gen.add_adapter("second", found.adapters["second"], recompile=True)
    assert both.available_adapters == ["default", "second"]
    assert gen.available_adapters == ["default"]
    for name, theirs in (("default", "first"), ("second", "second")):
        both.set_active(name)
        assert torch.equal(said(both, given), found.expected(theirs, given, do_sample=True))
    both.delete_adapter("default")
    assert both.available_adapters == ["second"]
