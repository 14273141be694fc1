"""Programs in transforms of ``torch.func`` and under modes: as plain operators, and nothing is kept of these."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import adaptc
from adaptc import LoraConfig
from tests.support.gated_net import X, adapter_tensors, compile_net, config, net

# torch's own, in make_dual
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
ROWS = ["a", None, "b"]
BASE = net()
#: of enough positions that each row is computed with the factors of its own adapter alone
LONG = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(5))


def written_out(x: Tensor, *adapters: Any) -> Tensor:
    """The net with an adapter for each row, or one for all of them, in plain operators."""
    base = BASE
    chosen = adapters if len(adapters) == x.shape[0] else [adapters[0]] * x.shape[0]

    def layer(name: str, x: Tensor) -> Tensor:
        rows = [x.new_zeros(())] * len(chosen)
        for i, a in enumerate(chosen):
            if a is not None:
                A, B = a[f"{name}.lora_A.weight"], a[f"{name}.lora_B.weight"]
                rows[i] = x[i] @ A.t() @ B.t() * (8 / 2)
        made = F.linear(x, getattr(base, name).weight.detach(), getattr(base, name).bias.detach())
        return torch.stack([made[i] + row for i, row in enumerate(rows)])

    return layer("down", torch.tanh(layer("up", x)) * layer("side", x))


def scaled(rank: int) -> dict[str, Tensor]:
    """What ``state(rank)`` is in a program, whose scale is that of its own rank."""
    return {k: t * (2 / rank if "lora_B" in k else 1) for k, t in adapter_tensors(rank).items()}


def cubed(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x: (f(x) ** 3).sum() / 1e3


def tangent(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent.clone()


def second(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(cubed(f)(x), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)[0]


WAYS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x: grad(cubed(f))(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: vmap(grad(cubed(f)))(torch.stack([x, 2 * x])),
    "hessian": lambda f, x: hessian(cubed(f))(x),
    "forward mode": tangent,
    "double backward": second,
}


@cache
def program() -> adaptc.AdaptedProgram:
    return compile_net(2)


@cache
def training() -> adaptc.AdaptedProgram:
    made = adaptc.compile(net(), config(2), example_inputs=torch.randn(2, 5), training=True)
    adaptc.swap(made, adapter_tensors(2))
    return made


@cache
def bank_of(example: Tensor) -> Callable[[Tensor], Tensor]:
    bank = adaptc.compile(net(), config(2), example_inputs=example).bank(
        {"a": adapter_tensors(2), "b": adapter_tensors(5)}
    )
    return lambda x: bank(x, adapters=ROWS)


#: what can be called, with one adapter or with ``ROWS``
KINDS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "program": program,
    "bound": lambda: program().bind(adapter_tensors(2)),
    "weights of its own": lambda: program().bind(adapter_tensors(2), form="weight"),
    "training": training,
    "module": lambda: training().module(),
    "merged": lambda: adaptc.merge(program()),
    "bank": lambda: bank_of(X),
    "bank of positions": lambda: bank_of(LONG),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_plain_operators(kind: str, way: str) -> None:
    adapters = [scaled(2), None, scaled(5)] if "bank" in kind else [scaled(2)]
    x, call = LONG if "positions" in kind else X, KINDS[kind]()
    if (kind, way) == ("module", "double backward"):
        with pytest.raises(adaptc.AdaptcError, match=r"gradients of first order alone: set prog.fuse = False"):
            WAYS[way](call, x)
        return
    found, expected = WAYS[way](call, x), WAYS[way](lambda x: written_out(x, *adapters), x)
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("fuse", [True, False])
def test_a_gradient_for_each_sample_by_the_parameters_of_a_module(fuse: bool) -> None:
    made = adaptc.compile(net(), config(2), example_inputs=torch.randn(2, 5), training=True)
    adaptc.swap(made, adapter_tensors(2))
    made.fuse = fuse
    module = made.module()
    learned = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(learned, X)
    for i, x in enumerate(X):
        module.zero_grad()
        module(x[None]).square().sum().backward()
        for name, p in module.named_parameters():
            if name in learned:
                torch.testing.assert_close(found[name][i], p.grad, rtol=1e-4, atol=1e-4)
    assert len(learned) == 6


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def within(context: Any, f: Callable[[Tensor], Any]) -> None:
    with context:
        f(X)


def dual(f: Callable[[Tensor], Any]) -> None:
    with forward_ad.dual_level():
        f(forward_ad.make_dual(X, X))


MODES: dict[str, Callable[[Callable[[Tensor], Any]], Any]] = {
    "grad": lambda f: grad(lambda x: f(x).sum())(X),
    "jvp": lambda f: jvp(f, (X,), (X,)),
    "vmap": lambda f: vmap(f)(torch.stack([X, X])),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).sum()))(torch.stack([X, X])),
    "dual numbers": dual,
    "inference mode": lambda f: within(torch.inference_mode(), f),
    "no gradients": lambda f: within(torch.no_grad(), f),
    "autocast": lambda f: within(torch.autocast("cpu", torch.bfloat16), f),
    "a device": lambda f: within(torch.device("meta"), f),
    "a dispatch mode": lambda f: within(Counting(), f),
    "fake tensors": lambda f: within(FakeTensorMode(), f),
}


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_what_is_made_inside_is_as_if_made_outside(mode: str) -> None:
    """First calls, swaps, bindings, banks, scales, merges and modules: all of them remember tensors."""
    adapter, model, base, example = adapter_tensors(5), net(), program(), X[:2]
    with torch.no_grad():
        expected, half = base.bind(adapter)(X), base.bind(adapter, scale=0.5)(X)
        rows = torch.stack([expected[0], base.base(X)[1], base(X)[2]])
    called, swapped, strong, of_bank = (copy.deepcopy(program()) for _ in range(4))
    called(X)
    adapters, kept = {"a": adapter, "b": adapter_tensors(2)}, {}
    bank = of_bank.bank(adapters)

    def inside(x: Tensor) -> Any:
        for p in (called, swapped, strong):
            adaptc.swap(p, adapter)
        strong.set_active({"default": 0.5})
        kept["bound"] = called.bind(adapter)
        kept["weights"] = called.bind(adapter, form="weight")
        kept["bank"] = called.bank(adapters)
        kept["merged"] = adaptc.merge(swapped)
        kept["module"] = swapped.module()
        kept["compiled"] = adaptc.compile(model, config(2), example_inputs=example)
        if mode == "fake tensors":
            return x  # whose values nothing real computes with
        calls = [called, swapped, strong, kept["bound"], kept["weights"], kept["merged"], kept["module"]]
        with called.scaled(0.5):
            weaker = called(x)
        out = [*(f(x) for f in calls), weaker]
        out += [b(x, adapters=ROWS) for b in (bank, kept["bank"])]
        return torch.stack(out)

    MODES[mode](inside)
    adaptc.swap(kept["compiled"], adapter)
    plain = [called, swapped, kept["bound"], kept["weights"], kept["merged"], kept["module"], kept["compiled"]]
    for f in plain:
        torch.testing.assert_close(f(X), expected, rtol=1e-4, atol=1e-4)
        leaf = X.clone().requires_grad_()
        f(leaf).sum().backward()
        assert float(leaf.grad.abs().max()) > 0  # type: ignore[union-attr]
    torch.testing.assert_close(strong(X), half, rtol=1e-4, atol=1e-4)
    with called.scaled(0.5):
        torch.testing.assert_close(called(X), half, rtol=1e-4, atol=1e-4)
    for b in (bank, kept["bank"]):
        torch.testing.assert_close(b(X, adapters=ROWS), rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["grad", "vmap", "dual numbers"])
def test_what_ends_with_a_transform_is_not_kept(mode: str) -> None:
    """Tensors and models of a transform are refused; the program stays as it was."""
    made = copy.deepcopy(program())
    before, bank = made(X), made.bank({"a": adapter_tensors(2)})
    ways: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "swap": lambda s: adaptc.swap(made, s),
        "bind": made.bind,
        "add": lambda s: bank.add("b", s),
        "replace": lambda s: bank.replace("a", s),
    }
    seen = []

    def inside(x: Tensor) -> Tensor:
        own = {k: t + 0 * x.sum() for k, t in adapter.items()}
        for way, call in ways.items():
            with pytest.raises(adaptc.CheckpointError, match=r"up.lora_A.weight.*functional_call\(prog.module\(\)"):
                call(own)
            seen.append(way)
        layer.register_buffer("weight", layer.bias[:, None] + x.sum())
        with pytest.raises(adaptc.CaptureError, match=r"'weight' belongs to a transform of torch.func"):
            adaptc.compile(layer, LoraConfig(r=2, target_modules="all-linear"), example_inputs=X[:2])
        return x

    adapter, layer = adapter_tensors(5), nn.Linear(5, 3)
    del layer.weight
    MODES[mode](inside)
    assert seen == list(ways)
    assert torch.equal(made(X), before)
    assert list(bank) == ["a"]


@pytest.mark.parametrize("mode", ["grad", "jvp", "vmap", "dual numbers"])
def test_compiled_code_is_not_followed(mode: str) -> None:
    made = compile_net(2, backend="inductor")
    expected = made(X)
    with pytest.raises(adaptc.BackendError, match=r"input 'x' is followed by .*prog.backend = 'eager'"):
        MODES[mode](made)
    # What is no part of the transform is computed as ever.
    found: list[Tensor] = []
    MODES[mode](lambda x: (found.append(made(X)), x)[1])
    assert torch.equal(found[0], expected)
