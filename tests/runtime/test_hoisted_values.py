"""Hoisting at run time: the same outputs bit for bit, made once per adapter, never stale, within its limit."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptc
from adaptc import ConfigError, LoraConfig
from adaptc.methods import TargetedConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method, Slot
from adaptc.passes.protocol.parts.size_rule import SizeRule
from adaptc.runtime.hoisted_values import HoistedInputs, HoistedMemory, HoistedStage, StreamHandover
from adaptc.runtime.variants.graph_variants import PLAIN
from tests.support.fake_gpu import Stream
from tests.support.families import FAMILIES
from tests.support.odd_methods import registered

IDS = torch.randint(0, 13, (3, 6), generator=torch.Generator().manual_seed(4))


class Net(nn.Module):
    """Computes from its parameters alone: a cast of a norm's weight, a table of positions, a scale that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 11)
        self.down = nn.Linear(11, 5, bias=False)
        self.temperature = nn.Parameter(torch.tensor([0.3, -0.2, 0.1, 0.7, 0.4]))
        self.register_buffer("calls", torch.zeros(5))

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.up(self.emb(ids) * (1 + self.emb.weight.mean(0))))
        return self.down(h) * self.temperature.exp()


class Counting(Net):
    def forward(self, ids: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(ids) + self.calls * 2


def net(kind: type[Net] = Net) -> Net:
    torch.manual_seed(2)
    return kind()


def compiled(model: nn.Module | None = None, **options: Any) -> adaptc.AdaptedProgram:
    """A program in the weight form, whose adapter is random and frozen."""
    training = options.get("training", False)
    config = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False, inference_mode=not training)
    options = {"form": "weight", "example_inputs": IDS, **options}
    torch.manual_seed(3)
    return adaptc.compile(model or net(), config, **options)


def adapter(rank: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"up": ((rank, 7), (11, rank)), "down": ((rank, 11), (5, rank))}
    return {
        f"{m}.lora_{x}.weight": torch.randn(s, generator=g)
        for m, ab in shapes.items()
        for x, s in zip("AB", ab, strict=True)
    }


def prefix_of(program: adaptc.AdaptedProgram) -> HoistedInputs:
    """What the current binding gives to the one code that was called."""
    assert program.call_state.arguments is not None
    (prefix,) = program.call_state.arguments.hoisted_inputs.values()
    return prefix


def without(program: adaptc.AdaptedProgram) -> adaptc.AdaptedProgram:
    """The same program with everything computed in every call."""
    twin = program.with_binding(program.binding)
    twin.hoist_limit = 0
    return twin


def outputs(out: Any) -> list[Tensor]:
    return [
        t for t in torch.utils._pytree.tree_leaves(dict(out) if hasattr(out, "keys") else out) if torch.is_tensor(t)
    ]


def equal(found: Any, expected: Any) -> bool:
    pairs = list(zip(outputs(found), outputs(expected), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["gemma2", "falcon", "deberta_v2", "resnet"])
def test_families_compute_the_same_bit_for_bit(name: str) -> None:
    family = FAMILIES[name]
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, inference_mode=True)
    if name == "resnet":
        config = LoraConfig(r=3, target_modules=["convolution"], init_lora_weights=False, inference_mode=True)
    program = adaptc.compile(family.build(), config, form="weight")
    plain = without(program)
    for batch, seq in ((2, 5), (3, 9)):
        x = family.inputs(batch, seq)
        assert equal(program(**x), plain(**x))
    assert program.held.count >= len(program.adaptation.attachments)
    assert plain.held == HoistedMemory()


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_swap_takes_the_values_along(rank: int) -> None:
    program = compiled()
    program(IDS)
    adaptc.swap(program, adapter(rank, rank))
    assert equal(program(IDS), without(program)(IDS))
    bound = program.bind(adapter(rank + 1, 7))
    assert bound.held == HoistedMemory()
    assert equal(bound(IDS), without(program.with_binding(bound.binding))(IDS))
    assert bound.held.nbytes == (11 * 7 + 5 * 11) * 4
    assert bound.held.shared_nbytes == (7 + 5) * 4


def test_the_prologue_runs_once_for_an_adapter_and_once_for_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[HoistedStage] = []
    real = HoistedStage.run_prologue

    def run(self: HoistedStage, values: Any) -> Any:
        runs.append(self)
        return real(self, values)

    monkeypatch.setattr(HoistedStage, "run_prologue", run)
    program = compiled()
    bound = program.bind(adapter(2, 1))
    assert runs == []
    base, slots = program.executor().variants.get(PLAIN).split.stages
    answers: list[Tensor] = []
    threads = [threading.Thread(target=lambda: answers.append(bound(IDS))) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert runs == [base, slots]
    assert len(answers) == 6
    assert all(torch.equal(a, answers[0]) for a in answers)
    again = program.bind(bound.binding)
    assert torch.equal(again(IDS), answers[0])
    assert runs == [base, slots]
    program(IDS)
    assert runs == [base, slots, slots]


@pytest.mark.long
def test_values_go_with_their_binding() -> None:
    program = compiled()
    program(IDS)
    state = prefix_of(program).state
    assert state is not None
    value = weakref.ref(state.slots.values[0])
    del state
    adaptc.swap(program, adapter(3, 8))
    gc.collect()
    assert value() is None


def test_a_write_to_a_tensor_is_seen_by_the_next_call() -> None:
    model = net()
    program = compiled(model)
    before = program(IDS)
    state = program.state_dict
    for name in ("up.lora_B.default.weight", "up.weight", "temperature", "emb.weight"):
        with torch.no_grad():
            state[name].mul_(1.5)
        after = program(IDS)
        assert not torch.equal(after, before)
        assert torch.equal(after, without(program)(IDS))
        before = after
    with torch.no_grad():
        model.up.weight.add_(1)  # the model's own parameter has the same memory
    assert not torch.equal(program(IDS), before)
    assert torch.equal(program(IDS), without(program)(IDS))


def test_a_bound_adapter_sees_writes_too() -> None:
    program = compiled()
    bound = program.bind(adapter(3, 5))
    before = bound(IDS)
    bound.binding.values["down.lora_A.default.weight"].zero_()
    assert not torch.equal(bound(IDS), before)
    assert torch.equal(bound(IDS), without(program.with_binding(bound.binding))(IDS))


@pytest.mark.long
def test_slots_that_require_grad_are_never_held() -> None:
    """Some optimizers write past torch's count of writes."""
    config = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
    program = adaptc.compile(net(), config, example_inputs=IDS, form="weight")
    before = program(IDS)
    assert program.held.count == 0
    assert program.held.shared == 2
    for p in program.module().parameters():
        if p.requires_grad:
            p.data.mul_(2)
    assert not torch.equal(program(IDS), before)
    assert torch.equal(program(IDS), without(program)(IDS))


def test_training_keeps_its_gradients() -> None:
    program = compiled(training=True)
    slots = {k: t for k, t in program.binding.values.items() if t.requires_grad}
    assert slots
    gradients = []
    for p in (program, without(program)):
        p(IDS).square().sum().backward()
        gradients.append({k: t.grad.clone() for k, t in slots.items() if t.grad is not None})
        for t in slots.values():
            t.grad = None
    assert gradients[0].keys() == gradients[1].keys() == slots.keys()
    assert all(torch.equal(g, gradients[1][k]) for k, g in gradients[0].items())
    assert program.held == HoistedMemory(shared=2, shared_nbytes=(7 + 5) * 4)
    optimizer = torch.optim.SGD(slots.values(), lr=0.1)
    before = program(IDS)
    before.square().sum().backward()
    optimizer.step()
    assert not torch.equal(program(IDS), before)


def test_a_base_of_its_own_has_values_of_its_own() -> None:
    program = compiled()
    expected = program(IDS)
    embedding = torch.randn(13, 7, generator=torch.Generator().manual_seed(9))
    other = program.bind({**adapter(3, 6), "emb.base_layer.weight": embedding})
    assert "emb.weight" in other.binding.changed_base
    assert equal(other(IDS), without(program.with_binding(other.binding))(IDS))
    assert (other.held.count, other.held.shared) == (4, 0)
    assert torch.equal(program(IDS), expected)
    assert (program.held.count, program.held.shared) == (2, 2)


@pytest.mark.parametrize("functional", [False, True])
def test_buffers_a_call_changes_are_not_frozen(functional: bool) -> None:
    reference = net(Counting)
    model = torch.export.export(net(Counting), (IDS,))
    model = model.run_decompositions({}) if functional else model
    program = adaptc.compile(model, LoraConfig(r=2, target_modules=["up"]), form="weight")
    for _ in range(3):
        torch.testing.assert_close(program(IDS), reference(IDS), rtol=1e-5, atol=1e-5)
    assert program.held.shared == 2


def test_views_are_neither_counted_nor_watched() -> None:
    class Viewing(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return self.up(self.emb(ids)) @ self.down.weight.t()[:, 1:]

    config = LoraConfig(r=2, target_modules=["up"], inference_mode=True)
    program = adaptc.compile(net(Viewing), config, example_inputs=IDS, form="apply")
    before = program(IDS)
    # What is held of the adapter is its A, and its scaled B, as calls read them.
    assert program.held == HoistedMemory(2, (7 * 2 + 11 * 2) * 4, shared=1)
    state = prefix_of(program).state
    assert state is not None
    assert state.base.watched == ()
    with torch.no_grad():
        program.state_dict["down.weight"].mul_(2)
    assert torch.equal(program(IDS), before * 2)


def test_values_do_not_depend_on_the_state_of_the_call_that_makes_them() -> None:
    program, plain = compiled(), without(compiled())
    with torch.inference_mode():
        first = program(IDS)
    assert torch.equal(first, plain(IDS))
    program, module = compiled(), compiled().module()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = program(IDS), module(IDS)
    assert torch.equal(found, expected)
    assert not torch.equal(found, first)
    assert torch.equal(program(IDS), first)


def test_gradients_of_inputs_after_a_first_call_in_inference_mode() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) * self.up.bias.exp()

    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False, inference_mode=True)
    program = adaptc.compile(Scaled(), config, example_inputs=torch.randn(3, 7), form="weight")
    x = torch.randn(3, 7, requires_grad=True)
    with torch.inference_mode():
        program(x)
    program(x).sum().backward()
    got, x.grad = x.grad, None
    without(program)(x).sum().backward()
    assert torch.equal(got, x.grad)  # type: ignore[arg-type]


def test_the_limit_holds_and_changes_no_output() -> None:
    program = compiled()
    expected = without(program)(IDS)
    full = (11 * 7 + 5 * 11 + 7 + 5) * 4
    for limit in (None, full, full - 1, 11 * 7 * 4, 100, 13, 0):
        program.hoist_limit = limit
        assert torch.equal(program(IDS), expected)
        held = program.held
        total = held.nbytes + held.shared_nbytes
        assert total == full if limit in (None, full) else total <= limit
        assert limit != 0 or held == HoistedMemory()
    assert compiled(hoist_limit=100).hoist_limit == 100


def test_a_call_never_mixes_code_and_values_of_two_limits() -> None:
    program = compiled()
    expected = program(IDS)
    old = program.call_state.arguments
    program.hoist_limit = 0
    program._run_state.arguments = old  # as a call in another thread may have left it
    assert torch.equal(program(IDS), expected)


def test_limits_that_are_none_are_refused(tmp_path: Path) -> None:
    program = compiled()
    path = adaptc.save(program, tmp_path / "p.pt2")
    for limit in (-1, 2.5, "1GB", True):
        with pytest.raises(ConfigError, match="hoist_limit"):
            program.hoist_limit = limit  # type: ignore[assignment]
        with pytest.raises(ConfigError, match="hoist_limit"):
            compiled(hoist_limit=limit)
        with pytest.raises(ConfigError, match="hoist_limit"):
            adaptc.load(path, hoist_limit=limit)  # type: ignore[arg-type]
    assert program.hoist_limit is None


def test_only_calls_see_it(tmp_path: Path) -> None:
    program = compiled(hoist_limit=500)
    expected = program(IDS)
    nodes = [n.name for n in program.graph.nodes]
    assert [n.name for n in without(program).graph.nodes] == nodes
    program.graph.lint()
    program.validate()
    assert torch.equal(program.module()(IDS), expected)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"), hoist_limit=500)
    assert [n.name for n in loaded.graph.nodes] == nodes
    assert torch.equal(loaded(IDS), expected)
    assert loaded.held == program.held
    merged = adaptc.merge(program)
    torch.testing.assert_close(merged(IDS), expected, rtol=1e-5, atol=1e-5)
    assert merged.hoist_limit == adaptc.unload(program).hoist_limit == 500
    assert merged.held == HoistedMemory(shared=2, shared_nbytes=(7 + 5) * 4)
    assert torch.equal(adaptc.unmerge(merged)(IDS), expected)  # type: ignore[operator]


def test_the_report_says_what_is_held() -> None:
    program = compiled()
    assert "computed once" not in str(adaptc.report(program))
    program(IDS)
    said = "computed once: 2 values for this adapter (528 B), 2 values for all adapters (48 B)"
    assert said in str(adaptc.report(program))


class SquaredSizes(SizeRule):
    def with_sizes_of(self, op: Op, slots: Any) -> Method:
        return Squared(slots["a"].shape[0])


@dataclass(frozen=True)
class Squared(Method):
    """y + B cos(S A' A) x, S being A smoothed.

    What follows from the slots alone has the rank in its shape, and is no row-major matrix.
    """

    name: ClassVar[str] = "squared"
    sizes = SquaredSizes()

    r: int = 2

    def slots(self, op: Op) -> dict[str, Slot]:
        return {"a": Slot((self.r, op.in_features), free=(0,)), "b": Slot((op.out_features, self.r), free=(1,))}

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Any, slots: Any, scale: Any) -> Tensor:
        smooth = F.conv1d(slots["a"][:, None], slots["a"].new_ones(1, 1, 3), padding=1)[:, 0]
        cube = smooth @ slots["a"].t() @ slots["a"]
        return y + F.linear(x @ cube.t().cos(), slots["b"])


@dataclass
class SquaredConfig(TargetedConfig):
    peft_type: ClassVar[str] = "SQUARED"

    r: int = 2

    def method(self, name: str, kind: str) -> Squared:
        return Squared(self.r)


@pytest.fixture
def squared(monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, SquaredConfig, Squared)


def squares(rank: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rank)
    return {"up.a": torch.randn(rank, 7, generator=g) / rank, "up.b": torch.randn(11, rank, generator=g)}


@pytest.mark.long
@pytest.mark.usefixtures("squared")
def test_compiled_code_takes_values_of_any_rank() -> None:
    config = SquaredConfig(r=5, target_modules=["up"], inference_mode=True)
    options: dict[str, Any] = {"example_inputs": IDS, "form": "apply"}
    fast = adaptc.compile(net(), config, backend="inductor", **options)
    eager = adaptc.compile(net(), config, hoist_limit=0, **options)
    fast(IDS)
    assert (fast.held.count, fast.held.shared) == (1, 2)

    def check() -> None:
        with adaptc.debug.assert_no_recompiles():
            found = fast(IDS)
        torch.testing.assert_close(found, eager(IDS), rtol=1e-4, atol=1e-4)

    for rank in (5, 1, 2, 16, 31):
        with adaptc.debug.assert_no_recompiles():
            adaptc.swap(fast, squares(rank))
        adaptc.swap(eager, squares(rank))
        if rank == 16:
            with torch.autocast("cpu", torch.bfloat16):
                fast(IDS)
        check()
        assert fast.held.nbytes == 7 * max(rank, 2) * 4
        state = prefix_of(fast).state
        assert state is not None
        assert all(t.is_contiguous() for t in state.slots.values)
        for slot in (
            "up.a.default",
            "up.b.default",
        ):  # the code reads the second as it is, or padded
            for p in (fast, eager):
                p.binding.values[slot].mul_(-0.5)
            check()


def test_compiled_code_follows_slots_that_require_grad() -> None:
    config = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
    program = adaptc.compile(net(), config, example_inputs=IDS, form="weight", backend="inductor")
    before = program(IDS)
    program.state_dict["up.lora_B.default.weight"].data.mul_(2)
    with adaptc.debug.assert_no_recompiles():
        after = program(IDS)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, program.module()(IDS), rtol=1e-4, atol=1e-5)
    adaptc.swap(program, adapter(4, 4))
    with adaptc.debug.assert_no_recompiles():
        program(IDS)
    assert program.held.count == 2


class OnGpu(Tensor):
    """A tensor that says it is on a GPU, and which streams the allocator knows to use it."""

    is_cuda = True
    streams: ClassVar[dict[int, list[int]]] = {}

    def record_stream(self, stream: Stream) -> None:
        self.streams.setdefault(id(self), []).append(stream.cuda_stream)


def test_values_of_one_stream_are_waited_for_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = map(Stream, (1, 2, 3))
    current, capturing = [first], [False]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    values = [torch.ones(2).as_subclass(OnGpu), None, torch.ones(3)]
    handover = StreamHandover(values)
    for stream in (first, second, second, first, third):
        current[0] = stream
        handover.to_current_stream()
    assert (first.waited, second.waited, third.waited) == ([], ["event of 1"], ["event of 1"])
    assert OnGpu.streams == {id(values[0]): [2, 3]}
    current[0], capturing[0] = Stream(4), True
    handover.to_current_stream()
    assert not current[0].waited
    StreamHandover([None, torch.ones(3)]).to_current_stream()  # asks nothing of CUDA


def test_every_call_hands_its_values_to_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    program = adaptc.compile(
        net(), LoraConfig(r=3, target_modules=["up", "down"], inference_mode=True), example_inputs=IDS, form="weight"
    )
    asked: list[int] = []
    monkeypatch.setattr(StreamHandover, "to_current_stream", lambda self: asked.append(id(self)))
    program(IDS)
    first = len(asked)
    assert first
    program(IDS)
    assert len(asked) == first + 1
    assert asked[-1] in asked[:first]
