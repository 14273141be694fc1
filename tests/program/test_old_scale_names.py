"""Deprecated ways to say scales: each compute what they did, with one warning that names the line and the new way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, ConfigError, LoraConfig, SwapError
from tests.support.subject import assert_close


@contextmanager
def one_warning(match: str) -> Iterator[None]:
    """Exactly one DeprecationWarning, of a line in this file."""
    with pytest.warns(DeprecationWarning, match=match) as told:
        yield
    assert [w.filename for w in told] == [__file__]


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double().eval()


@pytest.fixture
def program(model: nn.Module) -> Any:
    torch.manual_seed(4)
    configs = {n: LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False) for n in ("one", "two")}
    return adaptc.compile(model, configs, example_inputs=X)


def after(program: Any, *choices: Any) -> Tensor:
    """What calls compute after these calls of ``set_active``; the program is as it was then."""
    before = program.binding
    for choice in choices:
        program.set_active(*choice if isinstance(choice, tuple) else (choice,))
    found = program(X)
    program.install(before)
    return found


def test_set_scale(program: Any) -> None:
    half, part = after(program, {"one": 0.5, "two": None}), after(program, ({"one": 3, "two": None}, "2"))
    with one_warning(r"program\.set_scale is called program\.set_active\({name: factor}, modules=\.\.\.\) now"):
        program.set_scale(0.5, "one")
    assert torch.equal(program(X), half)
    with one_warning("set_active"):
        program.set_scale(1, adapter="one")
    with one_warning("set_active"):
        program.set_scale(3, "one", modules=["2"])
    assert torch.equal(program(X), part)
    program.set_active(["two"])
    alone = program(X)
    with one_warning("set_active"):
        program.set_scale(9, "one")  # which is off, and stays off
    assert program.active_adapters == ["two"]
    assert torch.equal(program(X), alone)
    before = program.binding
    for attempt, match in (
        (lambda: program.set_scale("one", 0.5), r"set_scale\(0.5, adapter='one'\)"),
        (lambda: program.set_scale(None, "one"), "scale must be a number"),
        (lambda: program.set_scale(0.5), "say whose scale it is.*'one', 'two'"),
        (lambda: program.set_scale(0.5, "three"), "called 'three' here"),
        (lambda: program.set_scale(0.5, "one", "4"), "'4' chooses nothing"),
    ):
        with one_warning("set_active"), pytest.raises(ConfigError, match=match):
            attempt()
    assert program.binding is before


def test_the_keyword_of_calls(program: Any, model: nn.Module) -> None:
    program.set_active({"one": 2, "two": 3})
    before = program(X)
    with one_warning(r"program\(\.\.\., adapter_scale=scale\) is called with program\.scaled\(scale\): program"):
        found = program(X, adapter_scale={"one": 0.3})
    assert torch.equal(found, after(program, {"one": 0.3}))
    with one_warning("scaled"):
        found = program(X, adapter_scale=0.5)  # of what adapters were made with, where a block multiplies
    assert torch.equal(found, after(program, {"one": 0.5, "two": 0.5}))
    with one_warning("scaled"):
        assert torch.equal(program(X, adapter_scale=None), before)
    with one_warning("scaled"), program.scaled(-3):
        found = program(X, adapter_scale={"two": 0.5})
    assert_close(found, after(program, {"two": -1.5}), 1e-9)
    with one_warning("scaled"), program.disabled():
        assert_close(program(X, adapter_scale=2), model(X), 1e-9)
    assert torch.equal(program(X), before)


def test_what_the_keyword_refuses(program: Any) -> None:
    before = program(X)
    bound, merged = program.bind(program), adaptc.merge(program)
    refused: list[tuple[Callable[[], Any], str, type[AdaptcError]]] = [
        (lambda: program(X, adapter_scale=[1]), "adapter_scale must be a number", ConfigError),
        (lambda: program(X, adapter_scale=float("nan")), "finite", ConfigError),
        (lambda: program(X, adapter_scale={"one": "2"}), r"adapter_scale\['one'\] must be a number", ConfigError),
        (lambda: merged(X, adapter_scale=2), "merged or unloaded", SwapError),
        (lambda: bound(X, adapter_scale=2), "adapter_scale.*keeps its adapter", AdaptcError),
    ]
    for attempt, match, error in refused:
        with pytest.raises(error, match=match):  # without a warning, which would be an error
            attempt()
    with one_warning("scaled"), pytest.raises(ConfigError, match="called 'three' here"):
        program(X, adapter_scale={"three": 2})
    assert torch.equal(program(X), before)


def test_names_of_the_block(program: Any) -> None:
    with program.scaled(0.5):
        expected = program(X)
    for old in (program.rescaled, lambda f: adaptc.rescale_adapter_scale(program, f)):
        with one_warning(r"program\.scaled"):
            block = old(0.5)
        with block:
            assert torch.equal(program(X), expected)
