"""A run or a capture of the user's model leaves it as it was, whatever its forward writes to."""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import adaptc
from adaptc import LoraConfig
from adaptc.capture.capture import capture
from adaptc.capture.model_state import preserve_state
from adaptc.errors import AdaptcError
from tests.support.families import FAMILIES
from tests.support.model_state import changed_paths, state_of

LORA = {"r": 2, "target_modules": "all-linear"}


class Helper:
    def __init__(self) -> None:
        self.count, self.inner = 0, {"sizes": []}


class Net(nn.Module):
    """Calls ``write`` when it runs: always, or (``single``) for one row alone, which captures take another path for."""

    def __init__(self, write: Callable[[Any], object], single: bool) -> None:
        super().__init__()
        self.lin, self.drop = nn.Linear(5, 7), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(3))
        self.plain, self.array = torch.zeros(3), numpy.zeros(3)
        self.k, self.sizes, self.last = 7, [1], deque([1, 2], maxlen=2)
        self.known, self.ordered = {"deep": [{"a": 1}]}, OrderedDict(a=1, b=2)
        self.names = {"a"}
        self.helper, self.space = Helper(), SimpleNamespace(count=0)
        self.generator, self.numbers = torch.Generator(), numpy.random.default_rng(0)
        self.unlisted = [nn.Linear(2, 2)]
        self.write, self.single, self.calls = write, single, CALLS

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x) + self.seen[0] + self.k
        if not self.single or x.shape[0] == 1:
            self.calls()
            self.write(self)
        return y


COUNT = [0]


def CALLS() -> None:
    COUNT[0] += 1


@torch.no_grad()
def scaled(net: Any) -> None:
    net.lin.weight.mul_(2)


@torch.no_grad()
def scaled_by_view(net: Any) -> None:
    net.lin.weight.view(-1)[1:3].zero_()


def swapped_data(net: Any) -> None:
    net.lin.weight.data = net.lin.weight.data.double()


def with_gradient(net: Any) -> None:
    net.lin.weight.grad = torch.ones(7, 5)


def replaced(net: Any) -> None:
    net.lin = nn.Linear(5, 7)


def reordered(net: Any) -> None:
    net.ordered.move_to_end("a")


WRITES: dict[str, Callable[[Any], object]] = {
    "attribute": lambda n: setattr(n, "k", 1),
    "new attribute": lambda n: setattr(n, "fresh", 1),
    "deleted attribute": lambda n: vars(n).pop("sizes"),
    "list": lambda n: n.sizes.append(2),
    "dict in a list": lambda n: n.known["deep"][0].update(a=2),
    "dict": lambda n: n.known.clear(),
    "ordered dict": reordered,
    "deque": lambda n: n.last.append(3),
    "set": lambda n: n.names.add("b"),
    "helper": lambda n: vars(n.helper).update(count=1),
    "list of a helper": lambda n: n.helper.inner["sizes"].append(1),
    "namespace": lambda n: setattr(n.space, "count", 1),
    "buffer": lambda n: n.seen.add_(1),
    "buffer replaced": lambda n: setattr(n, "seen", n.seen + 1),
    "buffer registered": lambda n: n.register_buffer("made", torch.zeros(2)),
    "tensor": lambda n: n.plain.add_(1),
    "array": lambda n: n.array.fill(1),
    "parameter": scaled,
    "part of a parameter": scaled_by_view,
    "memory of a parameter": swapped_data,
    "flag of a parameter": lambda n: n.lin.weight.requires_grad_(False),
    "gradient": with_gradient,
    "hook": lambda n: n.lin.register_forward_hook(lambda *given: None),
    "module replaced": replaced,
    "module added": lambda n: n.add_module("more", nn.Linear(2, 2)),
    "module in a list": lambda n: n.unlisted[0].train(not n.unlisted[0].training),
    "mode": lambda n: n.drop.train(not n.drop.training),
    "random numbers of torch": lambda n: torch.rand(2),
    "random numbers of Python": lambda n: random.random(),
    "random numbers of NumPy": lambda n: numpy.random.random(),
    "own generator": lambda n: torch.rand(2, generator=n.generator, device="cpu"),
    "own generator of NumPy": lambda n: n.numbers.random(),
}


def unchanged(model: nn.Module, use: Callable[[], object]) -> None:
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(AdaptcError):
            use()
    assert changed_paths(before, state_of(model)) == []


@pytest.mark.few(5)
@pytest.mark.parametrize("write", WRITES)
def test_what_runs_write_is_put_back(write: str) -> None:
    """Of the runs in eager mode: of a capture, of one that fails, and of a verification."""
    model, x = Net(WRITES[write], single=True), torch.randn(3, 5)
    for use in (lambda: capture(model, x), lambda: capture(model, x[:1]), lambda: capture(model, (x, x))):
        COUNT[0] = 0
        unchanged(model, use)
    unchanged(model, lambda: capture(model, x[:1], dynamic_shapes=None))
    assert COUNT[0] > 0
    program = adaptc.compile(Net(lambda n: None, single=True), LoraConfig(**LORA), example_inputs=x)
    COUNT[0] = 0
    unchanged(model, lambda: adaptc.verify(program, model, inputs=(x[:1],)))
    assert COUNT[0] > 0


@pytest.mark.parametrize("write", WRITES)
def test_what_captures_write_is_put_back(write: str) -> None:
    """Traced or run, whether or not torch can capture it."""
    model, x = Net(WRITES[write], single=False), torch.randn(3, 5)
    for training in (False, True):
        unchanged(model, lambda training=training: capture(model, x, training=training))
    unchanged(model, lambda: capture(model, (x,), dynamic_shapes=({0: Dim("rows", min=2)},)))


def test_memory_and_identity_of_what_is_written_to_stay() -> None:
    """Views that others hold see the values again; a graph that waits for its backward stays valid."""
    model = Net(scaled, single=True)
    view, loss = model.lin.weight.view(-1), model(torch.randn(2, 5)).sum()
    before = view.clone()
    with preserve_state(model), torch.no_grad():
        model(torch.randn(1, 5))
        assert not torch.equal(view, before)
    assert torch.equal(view, before)
    loss.backward()
    assert model.lin.weight.grad is not None


def test_a_mode_is_put_back_after_an_error() -> None:
    model = Net(lambda n: None, single=True)
    model.drop.eval()

    def failing() -> None:
        with preserve_state(model, training=False):
            assert not model.training
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert (model.training, model.drop.training) == (True, False)


class Window(nn.Module):
    """As Swin does: a window that is never larger than what there is, and stays so."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.k = nn.Linear(5, 7), 4

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.k:
            self.k = x.shape[1]
        return self.lin(x) * self.k


def test_the_model_as_it_was_is_captured() -> None:
    """Runs and captures that failed before have no part in it."""
    model, x = Window(), torch.randn(3, 6, 5)
    program = capture(model, x).program
    assert model.k == 4
    assert torch.equal(program.module()(x), model(x))
    assert torch.equal(program.module()(x), copy.deepcopy(model)(x))


@pytest.mark.long
@pytest.mark.parametrize("name", ["Swin", "DonutSwin"])
def test_windows_of_swin_are_as_they_were(name: str) -> None:
    import transformers

    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    x, lora = torch.randn(2, 3, 32, 32), LoraConfig(**LORA)
    expected = model(x).last_hidden_state
    before = state_of(model)
    with preserve_state(model), torch.no_grad():
        with suppress(RuntimeError):  # DonutSwin has no bias for such windows
            model(x[..., :8, :8])
        assert changed_paths(before, state_of(model))
    assert changed_paths(before, state_of(model)) == []
    program = adaptc.compile(model, lora, example_inputs=x, dynamic_shapes=({0: Dim("images")},))
    assert changed_paths(before, state_of(model)) == ["random.torch"]  # the adapter's first values
    torch.testing.assert_close(program(x).last_hidden_state, expected)


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families_with_inputs_of_their_own_are_as_they_were(name: str) -> None:
    """Without these, and with a cache: see test_families, and the models of tests/generation."""
    model = FAMILIES[name].build()
    unchanged(model, lambda: capture(model, FAMILIES[name].inputs(2, 5), training=True))
    unchanged(model, lambda: capture(model, FAMILIES[name].inputs(1, 5)))


class Compiled(nn.Module):
    """Branches by ``torch.cond``, and compiles a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.graphs = nn.Linear(5, 7), nn.Linear(5, 7), list[Any]()
        self.scaled = torch.compile(self._scaled, backend=self._backend, fullgraph=True)

    def _backend(self, module: Any, inputs: Any) -> Any:
        self.graphs.append(module)
        return module.forward

    def _scaled(self, x: Tensor) -> Tensor:
        return x * 2 + 1

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(self.scaled(x).sum() > 0, lambda t: self.a(t), lambda t: self.b(t), (x,))


@pytest.mark.long
def test_what_a_model_compiles_is_compiled_afterwards() -> None:
    """Dynamo skips for ever what it met while somebody watched all ops."""
    torch.compiler.reset()
    model, x = Compiled(), torch.rand(3, 5)
    program = adaptc.compile(model, LoraConfig(r=2, target_modules=["a", "b"]), example_inputs=x)
    model.graphs.clear()
    torch.testing.assert_close(model(x), program(x))
    assert len(model.graphs) == 1
    state = {name: t.clone() for name, t in model.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), program(x))
