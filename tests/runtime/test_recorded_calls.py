"""Calls recorded as CUDA graphs, by a recorder that repeats ops: equal to plain calls whatever happens in between."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from adaptc.errors import BackendError, ConfigError
from adaptc.runtime import executor as executor_module
from adaptc.runtime.calls import recorded_calls
from adaptc.runtime.calls.cuda_recorder import CudaRecorder, recorder_for
from adaptc.runtime.calls.recorded_calls import RecordedCalls
from adaptc.state import adaptation
from tests.gpu.tiny import tiny_llama
from tests.runtime.test_state import Cache
from tests.support.cover import examples
from tests.support.fake_gpu import Stream
from tests.support.recorded_ops import OpRecorder
from tests.support.sibling_nets import adapter, assert_close, block, compile_block, random_rows

RECORDERS: list[OpRecorder] = []


def _recorder(tensors: Any) -> OpRecorder:
    del tensors
    RECORDERS.append(OpRecorder(torch.device("cpu")))
    return RECORDERS[-1]


@pytest.fixture(autouse=True)
def _record_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    RECORDERS.clear()
    monkeypatch.setattr(executor_module, "recorder_for", _recorder)
    monkeypatch.setattr(adaptation, "recorder_for", _recorder)
    yield
    RECORDERS.clear()


def recordings() -> int:
    return sum(r.recorded for r in RECORDERS)


def test_the_second_call_is_recorded_and_outputs_are_copies() -> None:
    prog, plain = compile_block(cuda_graphs=True), compile_block()
    first = prog(random_rows(2))
    assert (recordings(), prog.recorded.count) == (0, 0)
    outputs = [prog(random_rows(2) + i) for i in range(3)]
    assert (recordings(), prog.recorded.count) == (1, 1)
    for found, shift in zip([first, *outputs], [0, 0, 1, 2], strict=True):
        assert_close(found, plain(random_rows(2) + shift))
    prog(random_rows(5))
    assert "CUDA graphs: 1 kinds of calls are replayed" in str(adaptc.report(prog))
    assert adaptc.report(prog).to_dict()["recorded"] == {"count": 1, "reasons": {}}


def test_a_swap_is_recorded_once_and_copied_from_then_on() -> None:
    prog = compile_block(cuda_graphs=True)
    x = random_rows(2)
    prog(x), prog(x)
    for seed in range(4):
        adaptc.swap(prog, adapter(3, seed))
        plain = compile_block()
        adaptc.swap(plain, adapter(3, seed))
        assert_close(prog(x), plain(x))
        assert recordings() == 2
    graphs = prog.executor().recorded_calls._kinds.values()
    names = [n for g in graphs for n in (g.own if isinstance(g, recorded_calls._Graph) else ())]
    assert names, "a swap must have given the adapter memory of the graph's own"
    base_bytes = {t.nbytes for t in prog.executor().base.values()}
    copies = [t.nbytes for g in graphs for t in g._bound if isinstance(t, Tensor)]
    assert base_bytes.isdisjoint(copies)


def test_adapters_that_nothing_else_holds_are_freed() -> None:
    prog, x = compile_block(cuda_graphs=True), random_rows(2)
    first, second = (prog.bind(adapter(3, s)) for s in (1, 2))
    first(x), first(x), second(x)  # the last is recorded with memory of the graph's own
    old = [ref(t) for t in first.binding.values.values()]
    assert None not in [r() for r in old]
    del first
    gc.collect()
    assert [r() for r in old] == [None] * len(old)


def test_graphs_go_with_their_program() -> None:
    prog, x = compile_block(cuda_graphs=True), random_rows(2)
    prog(x), prog(x)
    code = ref(prog.executor())
    gc.collect()  # what is left of capturing the model
    gc.disable()
    try:
        del prog
        assert code() is None
    finally:
        gc.enable()


@settings(max_examples=examples(15), deadline=None)
@given(st.data(), st.booleans())
def test_any_sequence_of_calls_and_changes(data: st.DataObject, kernels: bool) -> None:
    model = block().requires_grad_(False)
    progs = [compile_block(model, fuse=False), compile_block(model, fuse=False, cuda_graphs=True)]
    progs[1].kernels = kernels or None
    bound: list[list[Any]] = [[p.bind(adapter(3, 9)) for p in progs], [p.base for p in progs]]
    steps = ["call"] * 4 + ["swap", "bound", "base", "write", "move", "scale", "write adapter", "grad"]
    for step in data.draw(st.lists(st.sampled_from(steps), max_size=14)):
        x = random_rows(data.draw(st.sampled_from([2, 3])))
        if step == "swap":
            tensors = adapter(data.draw(st.sampled_from([3, 5])), data.draw(st.integers(0, 3)))
            for p in progs:
                adaptc.swap(p, tensors)
        elif step in ("bound", "base"):
            plain, found = bound[step == "base"]
            assert_close(found(x), plain(x))
        elif step == "write":
            with torch.no_grad():
                model.k.weight.mul_(1.5)
        elif step == "move":
            model.v.weight.data = model.v.weight.data.clone() + 1
        elif step == "write adapter":
            with torch.no_grad():
                for p in progs:
                    next(iter(p.binding.values.values())).mul_(0.5)
        elif step == "scale":
            with progs[0].scaled(0.5), progs[1].scaled(0.5):
                assert_close(progs[1](x), progs[0](x))
        elif step == "grad":
            xs = [x.clone().requires_grad_() for _ in progs]
            outs = [p(i) for p, i in zip(progs, xs, strict=True)]
            assert outs[0].requires_grad == outs[1].requires_grad
            assert_close(outs[1].detach(), outs[0].detach())
        assert_close(progs[1](x), progs[0](x))
    for r in RECORDERS:
        assert not r.is_busy


def test_what_calls_write_stays_where_the_caller_has_it() -> None:
    config = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    programs = []
    for graphs in (False, True):
        torch.manual_seed(0)
        exported = torch.export.export(Cache(), (torch.randn(3, 5),), strict=False)
        programs.append(adaptc.compile(exported, config, cuda_graphs=graphs))
    plain, prog = programs
    runners = [(p, p.bind(p.binding), p.bind(p.binding)) for p in (plain, prog)]
    for i in range(5):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(i))
        for expected, found in zip(*runners, strict=True):
            torch.testing.assert_close(found(x), expected(x), rtol=1e-6, atol=1e-6)
    assert recordings() >= 3


class Adds(nn.Module):
    """Adds what it computes to a tensor of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 4)

    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        total.add_(self.lin(x))
        return total * 2


def test_writes_and_moves_that_make_no_values_anew() -> None:
    """Without hoisted values a graph reads slots and weights themselves, or copies of slots."""
    model, x = block().requires_grad_(False), random_rows(2)
    options: dict[str, Any] = {"hoist_limit": 0, "fuse": False}
    prog, plain = compile_block(model, cuda_graphs=True, **options), compile_block(model, **options)
    for seed in (1, 2):  # the second has copies
        for p in (prog, plain):
            adaptc.swap(p, adapter(3, seed))
        for _ in range(2):
            assert_close(prog(x), plain(x))
    before = plain(x)
    for p in (prog, plain):
        for value in p.binding.values.values():
            value.detach().mul_(0.5)
    assert_close(prog(x), plain(x))
    assert not torch.equal(prog(x), before)
    before = plain(x)
    for _ in range(3):
        for p in (prog, plain):
            weight = p.base_tensors["v.weight"]
            weight.data = weight.data.clone() + 1
        assert_close(prog(x), plain(x))
        assert_close(prog(x), plain(x))
    assert not torch.equal(prog(x), before)
    calls = prog.executor().recorded_calls
    ((slots, _),) = calls._known_positions.values()
    for graph in calls._kinds.values():
        assert not isinstance(graph, recorded_calls._Graph) or graph.own <= slots  # no copy of a base weight


def test_each_caller_has_its_own_tensor_written() -> None:
    torch.manual_seed(0)
    model, config = Adds(), LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    example = (torch.randn(3, 5), torch.zeros(3, 4))
    prog = adaptc.compile(model, config, example_inputs=example, dynamic_shapes=None, cuda_graphs=True)
    plain = adaptc.compile(model, config, example_inputs=example, dynamic_shapes=None)
    adaptc.swap(plain, prog.binding)
    totals = [[torch.zeros(3, 4) for _ in range(2)] for _ in range(2)]
    for i in range(8):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(i))
        expected, found = plain(x, totals[0][i % 2]), prog(x, totals[1][i % 2])
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(totals[1], totals[0])
    assert prog.recorded.count == 2
    assert not prog.recorded.reasons


def test_generation_with_a_cache() -> None:
    model = tiny_llama()
    model.config.use_cache = True
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    made = []
    for graphs in (False, True):
        torch.manual_seed(3)
        gen = adaptc.compile_for_generation(model, config, max_batch=2, max_length=32, cuda_graphs=graphs)
        made.append([gen.generate(ids, max_new_tokens=9, do_sample=False) for _ in range(2)])
        reasons = gen.program.recorded.reasons
    assert torch.equal(torch.stack(made[0]), torch.stack(made[1]))
    assert recordings() >= 1
    assert not reasons


class Waits(nn.Module):
    """A layer whose result depends on a number that the processor reads from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.sum().to(torch.int64).item() % 2 + 1
        torch._check(rows >= 1)
        torch._check(rows <= 2)
        return self.lin(x).sum(0) * rows


def test_a_call_that_waits_for_the_device_runs_as_ever() -> None:
    model, x = Waits(), torch.ones(3, 5)
    config = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    prog = adaptc.compile(model, config, example_inputs=(x,), dynamic_shapes=None, cuda_graphs=True)
    results = [prog(x * i) for i in (1, 2, 3)]
    assert prog.recorded.count == 0
    ((why, number),) = prog.recorded.reasons.items()
    assert number == 2  # the first call was to warm up
    assert "not permitted when stream is capturing" in why
    assert f"no CUDA graph for 2 calls: {why}" in str(adaptc.report(prog))
    assert not torch.equal(results[0], results[1])


def test_the_graph_used_least_lately_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_calls, "MAX_GRAPHS", 2)
    prog, plain = compile_block(cuda_graphs=True), compile_block()
    for rows in (2, 2, 3, 3, 4, 4, 2, 2):
        assert_close(prog(random_rows(rows)), plain(random_rows(rows)))
    assert prog.recorded.count == 2
    assert recordings() == 4


def test_threads_take_turns() -> None:
    prog, plain = compile_block(cuda_graphs=True), compile_block()
    runners = [prog.bind(adapter(3, s)) for s in range(3)]
    expected = [plain.bind(adapter(3, s)) for s in range(3)]
    wrong: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for n in range(12):
                x = random_rows(2 + n % 2)
                assert_close(runners[i](x), expected[i](x))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_transforms_and_modes_see_plain_calls() -> None:
    prog, plain, x = compile_block(cuda_graphs=True), compile_block(), random_rows(2)
    for _ in range(3):
        assert_close(torch.func.vmap(prog)(x[None]), torch.func.vmap(plain)(x[None]))
    x = x.clone().requires_grad_()
    assert_close(prog(x).detach(), plain(x).detach())
    prog(x)
    assert recordings() == 0
    assert prog.recorded.reasons == {
        "it is called in a mode of torch's, or in a transform of torch.func": 3,
        "gradients flow to its inputs": 2,
    }


def test_tensors_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    prog, x = compile_block(cuda_graphs=True), random_rows(2)
    recorder = prog.executor().recorded_calls._recorder
    monkeypatch.setattr(recorder, "device", torch.device("cuda", 3))
    prog(x), prog(x)
    assert (recorder.recorded, prog.recorded.reasons) == (0, {"an input is not on cuda:3": 2})
    monkeypatch.setattr(RecordedCalls, "_why_as_ever", lambda self, given: "")
    assert_close(prog(x), compile_block()(x))
    assert "a weight or a tensor of the adapter is not on cuda:3" in prog.recorded.reasons


def test_banks_have_no_graphs() -> None:
    """Their kernels group rows in Python, which a replay would not do for another selection."""
    prog, plain, x = compile_block(cuda_graphs=True), compile_block(), random_rows(3)
    prog.kernels = True
    adapters = {str(s): adapter(3, s) for s in range(2)}
    bank = prog.bank(adapters)
    expected: dict[Any, Tensor] = {name: plain.bind(a)(x) for name, a in adapters.items()} | {None: plain.base(x)}
    for names in (["0", "1", None], ["0", "1", None], ["1", "1", "0"], [None, "0", "1"]):
        found = bank(x, adapters=names)
        for i, name in enumerate(names):
            torch.testing.assert_close(found[i], expected[name][i], rtol=1e-10, atol=1e-10)
    assert recordings() == 0


def test_calls_in_inference_mode_and_outside_share_graphs() -> None:
    prog, plain, x = compile_block(cuda_graphs=True), compile_block(), random_rows(2)
    for seed, is_inference in enumerate([True, True, False, True, False, False]):
        if not seed % 4:
            for p in (prog, plain):
                adaptc.swap(p, adapter(3, seed))
        with torch.inference_mode(is_inference):
            assert_close(prog(x + seed), plain(x + seed))
    assert prog.recorded.count == 1
    assert not prog.recorded.reasons


def test_what_is_known_of_bound_values_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_calls, "MAX_GRAPHS", 2)
    exported = torch.export.export(Cache(), (torch.randn(3, 5),), strict=False)
    prog = adaptc.compile(exported, LoraConfig(r=2, target_modules=["lin"]), cuda_graphs=True)
    kept = [prog.bind(prog.binding) for _ in range(12)]  # each has a cache of its own
    for runner in kept:
        runner(torch.randn(3, 5))
    calls = prog.executor().recorded_calls
    assert len(calls._layouts) == 8
    assert len(calls._kinds) == 2


def test_options_that_cannot_be_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    prog = compile_block()
    with pytest.raises(ConfigError, match="cuda_graphs='yes' must be True or False"):
        prog.cuda_graphs = "yes"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="cuda_graphs=True is for inference"):
        compile_block(training=True, cuda_graphs=True)
    monkeypatch.setattr(adaptation, "recorder_for", recorder_for)
    with pytest.raises(BackendError, match="needs a base on one CUDA device, and this one is on cpu"):
        prog.cuda_graphs = True
    assert prog.cuda_graphs is False
    with pytest.raises(BackendError, match="this one is on cpu"):
        compile_block(cuda_graphs=True)


def test_memory_of_a_graph_is_aligned_as_its_source() -> None:
    room = recorded_calls._room_like
    flat = torch.randn(300)
    for offset in (0, 1, 2, 3, 4):
        for value in (
            flat[offset : offset + 40].view(8, 5).t(),
            flat[offset:][None].expand(7, -1),
            flat[offset:offset],
        ):
            made = room(value)
            assert (made.shape, made.stride(), made.dtype) == (value.shape, value.stride(), value.dtype)
            assert not value.numel() or made.data_ptr() % 16 == value.data_ptr() % 16
    assert room(torch.tensor(3.0)).shape == ()


def test_replays_on_another_stream_wait_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Stream(1), Stream(2)
    recorder = CudaRecorder(torch.device("cuda", 0))
    for stream in (first, first, second, second, first):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, now=stream: now)
        with recorder.in_order():
            pass
    assert (first.waited, second.waited) == (["event of 2"], ["event of 1"])
