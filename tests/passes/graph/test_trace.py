"""Tracing: once per distinct region, of pure functions only; and what injection refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import adaptc
from adaptc import LoraConfig
from adaptc.errors import AdaptcError, MethodError, PassError
from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.respecialize import Respecialize
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol import trace as _trace
from adaptc.passes.protocol.method import Method, Slot, Slots
from adaptc.passes.protocol.regions import node_tag, site_op
from tests.support.pass_checks import Snapshot, attach, export, inject_all, random_values


class Layers(nn.Module):
    """``depth`` blocks of two linears of different shapes, one with a bias."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(7, 11), "down": nn.Linear(11, 7, bias=False)}) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["down"](torch.tanh(layer["up"](x)))  # type: ignore[index]
        return x


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every trace."""
    calls: list[int] = []
    real = _trace.trace_function

    def counted(fn: Any, fakes: Any) -> Any:
        calls.append(len(fakes))
        return real(fn, fakes)

    monkeypatch.setattr(_trace, "trace_function", counted)
    return calls


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
def test_traces_do_not_grow_with_layers(traced: list[int], dynamic: bool) -> None:
    shapes = ({0: Dim("batch"), 1: Dim("length")},) if dynamic else None
    counts = []
    for depth in (1, 12):
        program = export(Layers(depth), torch.randn(3, 5, 7), dynamic_shapes=shapes)
        fqns = [f"layers.{i}.{n}.weight" for i in range(depth) for n in ("up", "down")]
        _, done, _ = inject_all(program, [attach(program, f) for f in fqns])
        assert len(done) == 2 * depth
        counts.append(len(traced))
        traced.clear()
    assert counts == [4, 4]  # two shapes in two forms, of which one is chosen


def test_traces_tell_regions_apart(traced: list[int]) -> None:
    """Other options or another dtype make another region; equal ones share one."""
    program = export(Layers(6), torch.randn(3, 7))
    up = [attach(program, f"layers.{i}.up.weight") for i in range(6)]
    values = random_values(program, up)
    doubled = up[1].method
    for slot in doubled.slots(site_op(LiftedProgram(program), up[1])):
        fqn = doubled.files.fqn(up[1].slot_path, slot, "default")
        values[fqn] = values[fqn].double()
    changed = [
        up[0],
        up[1],
        dataclasses.replace(up[2], method=Lora(r=3, alpha=5, rslora=True)),
        dataclasses.replace(up[3], method=Lora(r=3, alpha=5)),
        up[4],
        up[5],
    ]
    Inject(changed, values)(program)
    assert len(traced) == 6


@pytest.mark.long
def test_compile_and_swap_trace_once_per_shape(traced: list[int]) -> None:
    counts = []
    config = LoraConfig(r=3, target_modules=["up", "down"])
    for depth in (2, 12):
        torch.manual_seed(0)
        program = adaptc.compile(Layers(depth), config, example_inputs=torch.randn(3, 7))
        counts.append(len(traced))
        other = adaptc.compile(Layers(depth), config.replace(r=5), example_inputs=torch.randn(3, 7))
        traced.clear()
        adaptc.swap(program, other.binding)
        program.validate()
        counts.append(len(traced))
        traced.clear()
    assert counts[:2] == counts[2:]
    assert counts[0] == 4
    assert 0 < counts[1] <= 2


OUTSIDE = torch.randn(5, 1)


@dataclass(frozen=True)
class Toy(Method):
    """W' = W + scale * v, one slot of the weight's height; ``how`` spoils it."""

    name: ClassVar[str] = "toy"

    r: int = 3
    how: str = ""

    def slots(self, op: Op) -> dict[str, Slot]:
        return {"v": Slot((op.shape[0], self.r), free=(1,))}

    def scale(self, op: Op) -> float:
        return 2.0

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Tensor | None) -> Tensor:
        v = slots["v"]
        if self.how == "global":
            v = v * OUTSIDE
        elif self.how == "new tensor":
            v = v * torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
        elif self.how == "rank" and v.shape[1] > 3:
            v = v.abs() + v
        elif self.how == "loop":
            return W + sum(v[:, i : i + 1] for i in range(v.shape[1])) * scale
        return W + v.sum(1, keepdim=True) * scale


def program() -> ExportedProgram:
    torch.manual_seed(1)
    return export(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)), torch.randn(2, 7))


@pytest.mark.parametrize("how", ["global", "new tensor"])
def test_methods_may_only_use_their_arguments(how: str) -> None:
    p = program()
    before = Snapshot.record(p)
    attachments = [attach(p, "0.weight", Toy(how=how))]
    with pytest.raises(MethodError, match="may only use its arguments"):
        Inject(attachments, random_values(p, attachments))(p)
    before.check(p)


def test_a_toy_method_is_injected() -> None:
    """What the refusals spoil does work when left alone."""
    p = program()
    x = torch.randn(3, 7)[:2]
    adapted, (a,), values = inject_all(p, [attach(p, "0.weight", Toy())])
    weight = p.state_dict["0.weight"] + 2 * values[a.slots["v"]].sum(1, keepdim=True)
    hidden = nn.functional.linear(x, weight, p.state_dict["0.bias"])
    expected = nn.functional.linear(hidden, p.state_dict["1.weight"], p.state_dict["1.bias"])
    torch.testing.assert_close(adapted.module()(x), expected)


@pytest.mark.parametrize("how", ["rank", "loop"])
def test_regions_may_not_depend_on_the_rank(how: str) -> None:
    p = program()
    adapted, (a,), _ = inject_all(p, [attach(p, "0.weight", Toy(how=how))])
    lifted = LiftedProgram(adapted)
    ops = {a.id: site_op(lifted, a)}
    larger = {a.slots["v"]: nn.Parameter(torch.randn(5, 7))}
    with pytest.raises(MethodError, match=rf"region of '{a.fqn}\|toy' depends on the rank"):
        Respecialize([a], ops, {f: n.name for f, n in lifted.placeholders.items()}, larger)(lifted.graph)


def wrong(change: dict[str, Any]) -> Callable[[ExportedProgram], list[Any]]:
    return lambda p: [dataclasses.replace(attach(p, "0.weight"), **change)]


REFUSED: dict[str, tuple[Callable[[ExportedProgram], list[Any]], str]] = {
    "other consumer": (wrong({"consumers": ("linear_1",)}), "do not read '0.weight'"),
    "one consumer too many": (wrong({"consumers": ("linear", "linear_1")}), "do not read '0.weight'"),
    "no such consumer": (wrong({"consumers": ("gone",)}), "do not read '0.weight'"),
    "no consumer": (wrong({"consumers": ()}), "do not read '0.weight'"),
    "no such parameter": (wrong({"param": "wait"}), "no parameter '0.wait'"),
    "no apply form": (lambda p: [attach(p, "0.weight", Toy(), form="apply")], "cannot take the apply form"),
    "twice": (lambda p: [attach(p, "0.weight"), attach(p, "0.weight")], "given twice"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_attachments_that_do_not_fit(name: str) -> None:
    p = program()
    make, message = REFUSED[name]
    attachments = make(p)
    values = random_values(p, [attach(p, "0.weight"), attach(p, "0.weight", Toy())])
    before = Snapshot.record(p)
    with pytest.raises(AdaptcError, match=message):
        Inject(attachments, values)(p)
    before.check(p)
    assert not any(node_tag(n) for n in p.graph.nodes)


def test_missing_values() -> None:
    p = program()
    attachments = [attach(p, "0.weight"), attach(p, "1.weight")]
    values = random_values(p, attachments)
    for fqn in list(values):
        with pytest.raises(PassError, match=fqn):
            Inject(attachments, {k: v for k, v in values.items() if k != fqn})(p)
    assert Inject(attachments, values)(p).count == 2
