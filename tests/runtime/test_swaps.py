"""The runtime: swaps of every rank and subset through one program, without compiling again, under threads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc import AdaptcError, LoraConfig, RecompileError, SwapError
from adaptc.runtime.recompiles import compile_count
from tests.support.cover import examples

TARGETS = ["emb", "up", "conv", "down"]
KEYS = {
    "emb": (("lora_embedding_A", lambda r: (r, 13)), ("lora_embedding_B", lambda r: (7, r))),
    "up": (("lora_A.weight", lambda r: (r, 7)), ("lora_B.weight", lambda r: (11, r))),
    "conv": (("lora_A.weight", lambda r: (r, 11, 3)), ("lora_B.weight", lambda r: (5, r, 1))),
    "down": (("lora_A.weight", lambda r: (r, 5)), ("lora_B.weight", lambda r: (3, r))),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 11)
        self.conv = nn.Conv1d(11, 5, 3, padding="same")
        self.down = nn.Linear(5, 3, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.up(self.emb(ids)))
        h = self.conv(h.transpose(1, 2)).transpose(1, 2)
        return self.down(torch.tanh(h))


def adapter(rank: int, sites: list[str], seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {f"{s}.{k}": torch.randn(shape(rank), generator=g) / rank for s in sites for k, shape in KEYS[s]}


def reference(model: nn.Module, tensors: dict[str, torch.Tensor], alpha: float, ids: torch.Tensor) -> torch.Tensor:
    """The model with W + alpha / r B A written into a copy, in float64."""
    copy = Net().double()
    copy.load_state_dict(model.state_dict())
    for site in {k.partition(".")[0] for k in tensors}:
        a, b = (tensors[f"{site}.{k}"].double() for k, _ in KEYS[site])
        delta = (b.flatten(1) @ a.flatten(1)) * alpha / a.shape[0]
        weight = getattr(copy, site).weight
        weight.data += delta.t() if site == "emb" else delta.reshape(weight.shape)
    return copy(ids)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    return Net()


@pytest.fixture(scope="module", params=["eager", "inductor"])
def program(request: pytest.FixtureRequest, model: nn.Module) -> adaptc.AdaptedProgram:
    config = LoraConfig(r=16, target_modules=TARGETS)
    prog = adaptc.compile(model, config, example_inputs=torch.randint(0, 13, (2, 4)), backend=request.param)
    prog(torch.randint(0, 13, (3, 5)))
    return prog


@given(
    rank=st.sampled_from([1, 2, 3, 8, 16, 17, 128]),
    sites=st.sets(st.sampled_from(TARGETS), min_size=1),
    alpha=st.sampled_from([1, 5, 32]),
    rslora=st.booleans(),
    batch=st.integers(2, 6),
    length=st.sampled_from([3, 16, 17]),
)
@settings(max_examples=examples(25))
def test_swap_to_any_rank_alpha_and_subset_compiles_nothing(program, model, rank, sites, alpha, rslora, batch, length):
    tensors = adapter(rank, sorted(sites), rank * 7 + batch)
    ids = torch.randint(0, 13, (batch, length))
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=sorted(sites))
    with adaptc.debug.assert_no_recompiles():
        report = adaptc.swap(program, tensors, config=config)
        got = program(ids)
    scale = alpha * rank**0.5 if rslora else alpha
    torch.testing.assert_close(got.double(), reference(model, tensors, scale, ids), rtol=2e-4, atol=2e-4)
    assert report.sites == len(sites)
    assert len(report.identity) == len(TARGETS) - len(sites)


def test_a_bare_state_dict_keeps_the_programs_alpha(program, model):
    tensors = adapter(5, TARGETS, 3)
    ids = torch.randint(0, 13, (4, 6))
    adaptc.swap(program, tensors, config=LoraConfig(r=5, lora_alpha=20, target_modules=TARGETS))
    adaptc.swap(program, adapter(3, TARGETS, 4))
    expected = reference(model, adapter(3, TARGETS, 4), 20, ids)
    torch.testing.assert_close(program(ids).double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("rank", [2, 33])
def test_program_is_valid_and_saves_after_a_swap(program, model, rank, tmp_path):
    tensors = adapter(rank, ["up", "conv"], rank)
    adaptc.swap(program, tensors, config=LoraConfig(r=rank, target_modules=["up", "conv"]))
    program.graph.lint()
    program.validate()
    assert program.state_dict["up.lora_A.default.weight"].shape == (rank, 7)
    node = next(n for n in program.graph.nodes if n.name == "p_up_lora_A_default_weight")
    assert node.meta["val"].shape == (rank, 7)
    ids = torch.randint(0, 13, (3, 8))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
    torch.testing.assert_close(loaded(ids), program(ids), rtol=1e-5, atol=1e-6)
    assert set(loaded.binding.methods) == set(program.binding.methods)
    assert loaded.binding.config == program.binding.config
    plain = torch.export.load(tmp_path / "p.pt2").run_decompositions()
    torch.testing.assert_close(plain.module()(ids), program(ids), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(program.module()(ids), program(ids), rtol=1e-5, atol=1e-6)


def test_bound_adapters_keep_their_weights_while_others_swap(program, model):
    ids = torch.randint(0, 13, (3, 7))
    configs = {s: LoraConfig(r=s + 1, lora_alpha=9, target_modules=TARGETS) for s in range(1, 5)}
    bound = {s: program.bind(adapter(s + 1, TARGETS, s), config=c) for s, c in configs.items()}
    expected = {s: reference(model, adapter(s + 1, TARGETS, s), 9, ids).float() for s in configs}
    failures: list[str] = []

    def call(seed: int) -> None:
        for _ in range(20):
            got = bound[seed](ids)
            if not torch.allclose(got, expected[seed], rtol=2e-4, atol=2e-4):
                failures.append(f"adapter {seed} answered with other weights")

    def swapper() -> None:
        for i in range(20):
            adaptc.swap(program, adapter(2 + i % 5, TARGETS, i))

    threads = [threading.Thread(target=call, args=(s,)) for s in configs] + [threading.Thread(target=swapper)]
    with adaptc.debug.assert_no_recompiles():
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not failures


def test_calls_of_the_program_see_one_adapter_as_a_whole(program, model):
    """While another thread swaps between two adapters, each call answers with one of them, never with a mixture."""
    ids = torch.randint(0, 13, (2, 5))
    config = LoraConfig(r=4, target_modules=TARGETS)
    choices = [program.bind(adapter(4, TARGETS, s), config=config) for s in (21, 22)]
    answers = [c(ids) for c in choices]
    stop = threading.Event()

    def swapper() -> None:
        i = 0
        while not stop.is_set():
            adaptc.swap(program, choices[i % 2].binding)
            i += 1

    adaptc.swap(program, choices[0].binding)
    thread = threading.Thread(target=swapper)
    thread.start()
    try:
        seen = [program(ids) for _ in range(200)]
    finally:
        stop.set()
        thread.join()
    for got in seen:
        assert any(torch.equal(got, a) for a in answers)


def test_sites_the_program_lacks_are_an_error_that_says_how_to_get_them(model):
    prog = adaptc.compile(model, LoraConfig(r=3, target_modules=["up"]), example_inputs=torch.randint(0, 13, (2, 4)))
    before = prog(torch.arange(8).reshape(2, 4))
    with pytest.raises(SwapError, match=r"'down'.*compile\(model, \[adapter, another\]\)"):
        adaptc.swap(prog, adapter(3, ["up", "down"], 1))
    assert torch.equal(prog(torch.arange(8).reshape(2, 4)), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "up.lora_A.weight": torch.randn(3, 8)}, "shape"),
        (lambda t: {k: v for k, v in t.items() if k != "up.lora_B.weight"}, "missing"),
        (lambda t: {**t, "up.lora_B.weight": torch.full((11, 3), float("nan"))}, "NaN"),
        (lambda t: {**t, "upp.lora_B.weight": torch.ones(11, 3)}, "upp"),
        (lambda t: {**t, "up.lora_B.weight": torch.randn(11, 4)}, "shape"),
    ],
)
def test_a_failed_swap_changes_nothing(program, change, message):
    ids = torch.randint(0, 13, (3, 4))
    adaptc.swap(program, adapter(3, TARGETS, 8))
    before, binding = program(ids), program.binding
    with pytest.raises(AdaptcError, match=message):
        adaptc.swap(program, change(adapter(3, TARGETS, 9)))
    assert program.binding is binding
    assert torch.equal(program(ids), before)


def test_inputs_the_program_was_not_captured_for_are_refused(program):
    with pytest.raises(AdaptcError, match="float32"):
        program(torch.randn(2, 3))
    with pytest.raises(AdaptcError, match="2 axes"):
        program(torch.randint(0, 13, (2, 3, 4)))
    with pytest.raises(AdaptcError, match="positional"):
        program(torch.randint(0, 13, (2, 3)), torch.ones(1))
    with pytest.raises(AdaptcError, match="not an input of the program"):
        program(torch.randint(0, 13, (2, 3)), mask=torch.ones(1))


def test_the_guard_fails_when_something_compiles():
    with pytest.raises(RecompileError, match="promised none"), adaptc.debug.assert_no_recompiles():
        torch.compile(lambda x: torch.sin(x) * 3)(torch.ones(5))


def test_the_guard_sees_a_recompilation_of_the_same_function():
    fn = torch.compile(lambda x: torch.cos(x) + 2, dynamic=False)
    fn(torch.ones(5))
    before = compile_count()
    fn(torch.zeros(5))
    assert compile_count() == before
    with pytest.raises(RecompileError), adaptc.debug.assert_no_recompiles():
        fn(torch.ones(6))


def test_a_prepared_binding_is_laid_out_once(program):
    binding = program.bind(adapter(3, TARGETS, 5)).binding
    executor = program.executor()
    assert executor.arguments(binding) is executor.arguments(binding)
    adaptc.swap(program, binding)
    assert program.call_state.arguments is executor.arguments(binding)


@pytest.mark.long
def test_training_with_rank_one_is_refused_by_inductor(model):
    config = LoraConfig(r=1, target_modules=["up"])
    example = torch.randint(0, 13, (2, 4))
    program = adaptc.compile(model, config, example_inputs=example, backend="inductor", training=True)
    with pytest.raises(adaptc.BackendError, match="two or more"):
        program(example)


def test_unknown_backend_is_refused_before_anything_is_captured(model):
    with pytest.raises(adaptc.BackendError, match="eager, inductor"):
        adaptc.compile(model, LoraConfig(target_modules=["up"]), backend="tensorrt")


def test_no_other_adapter_is_bound_to_a_file_that_lacks_the_base(tmp_path: Path) -> None:
    """PiSSA changes the base, and a program's file holds it as it was changed."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5)), torch.randn(3, 7)
    made = [
        adaptc.compile(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=scheme), example_inputs=x)
        for scheme in ("pissa", False)
    ]
    loaded, other = adaptc.load(adaptc.save(made[0], tmp_path / "p.pt2")), adaptc.save_adapter(made[1], tmp_path / "a")
    expected = loaded(x)
    for change in (lambda: adaptc.swap(loaded, other), lambda: loaded.bind(str(other))):
        with pytest.raises(SwapError, match=r"only its own adapter's version of \['0.weight'\].*the original model"):
            change()
    assert torch.equal(loaded(x), expected)
