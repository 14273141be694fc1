"""Sizes of one: kept free, also where the example has them, and told apart where the model does something else."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from adaptc.capture import model_state
from adaptc.capture.capture import capture
from adaptc.errors import AdaptcWarning
from adaptc.passes.graph.lifted import guards_of
from tests.support.families import FAMILIES


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


class Doubles(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * (2 if x.shape[1] == 1 else 1)


class Reshapes(Net):
    """Another branch, and the same values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x[0])[None] if x.shape[0] == 1 else self.lin(x)


class Together(Net):
    """Only where both are one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * (2 if x.shape[0] * x.shape[1] == 1 else 1)


class Writes(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.lin(x) + self.seen


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + torch.rand_like(x[..., :1])


class Raises(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise ValueError("one row has no variance")
        return self.lin(x)


def quietly(model: nn.Module, example: Tensor, shapes: object = "auto"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return capture(model, example, dynamic_shapes=shapes).program


@pytest.mark.parametrize("shapes", ["auto", ({0: Dim.AUTO, 1: Dim.AUTO},)])
@pytest.mark.parametrize("kind", [Net, Reshapes, Writes, Noisy, Raises])
def test_what_does_not_matter_leaves_no_trace(kind: type[Net], shapes: object) -> None:
    model = kind()
    state = torch.get_rng_state()
    program = quietly(model, torch.randn(3, 4, 5), shapes)
    assert not any("!= 1" in g for g in guards_of(program))
    assert model.seen.item() == 0
    assert model.training
    torch.manual_seed(7)
    torch.set_rng_state(state)
    if kind in (Net, Reshapes):
        for sizes in [(0, 4), (1, 4), (1, 1), (3, 1), (2, 7)]:
            x = torch.randn(*sizes, 5)
            torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("shapes", ["auto", ({0: Dim.AUTO, 1: Dim.AUTO},)])
@pytest.mark.parametrize(("kind", "guard"), [(Doubles, r"size\(\)\[1\] != 1"), (Together, "!= 1")])
def test_what_matters_is_a_guard(kind: type[Net], guard: str, shapes: object) -> None:
    model = kind()
    program = quietly(model, torch.randn(3, 4, 5), shapes)
    module = program.module()
    for sizes in [(1, 4), (3, 1), (1, 1), (2, 7)]:
        x = torch.randn(*sizes, 5)
        if sizes == (1, 1) or (kind is Doubles and sizes[1] == 1):
            with pytest.raises(AssertionError, match="Guard failed"):
                module(x)
        else:
            torch.testing.assert_close(module(x), model(x))


def test_named_sizes_are_a_promise_that_the_model_breaks() -> None:
    with pytest.warns(AdaptcWarning, match=r"Doubles computes something else for size 1 of axis 1 of input 'x'.*torch"):
        program = capture(Doubles(), torch.randn(3, 4, 5), dynamic_shapes=({0: Dim("b"), 1: Dim("s")},)).program
    assert program.module()(torch.randn(3, 1, 5)).shape == (3, 1, 7)


def test_large_models_and_those_without_values_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    program = quietly(Doubles().to("meta"), torch.randn(3, 4, 5, device="meta"))
    assert not any("!= 1" in g for g in guards_of(program))
    monkeypatch.setattr(model_state, "MAX_BYTES", 100)
    program = quietly(Doubles(), torch.randn(3, 4, 5))
    assert not any("!= 1" in g for g in guards_of(program))


def test_half_precision_is_compared_as_such() -> None:
    model = Net().to(torch.bfloat16)
    model.lin.weight.data *= 100
    program = quietly(model, torch.randn(3, 4, 5, dtype=torch.bfloat16))
    assert not any("!= 1" in g for g in guards_of(program))
    other = Doubles().to(torch.bfloat16)
    program = quietly(other, torch.randn(3, 4, 5, dtype=torch.bfloat16))
    assert any("!= 1" in g for g in guards_of(program))


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 4)])
def test_examples_of_one_leave_sizes_free(sizes: tuple[int, int]) -> None:
    program = quietly(Net(), torch.randn(*sizes, 5))
    for n in [(1, 1), (2, 3), (0, 1), (7, 2)]:
        assert program.module()(torch.randn(*n, 5)).shape == (*n, 7)


@pytest.mark.long
def test_a_language_model_from_one_token() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    program = quietly(model, family.inputs(1, 1))
    for sizes in [(1, 1), (3, 7), (2, 1)]:
        kwargs = family.inputs(*sizes)
        torch.testing.assert_close(program.module()(**kwargs).logits, model(**kwargs, use_cache=False).logits)


class Channels(nn.Module):
    """A size of one that is one for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


def test_what_must_be_one_stays_one() -> None:
    model = Channels()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptcWarning)
        program = capture(model, torch.randn(1, 1, 9, 8)).program
    for n in (1, 2, 5):
        x = torch.randn(n, 1, 9, 8)
        torch.testing.assert_close(program.module()(x), model(x))
