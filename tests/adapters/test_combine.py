"""What combinations are, whoever computes them: linear, exact where they are said to be, independent of orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc.adapters.from_program import as_adapter_object
from tests.support.combining import IDS, TARGETS, Net, changes, load_peft_adapter, net, peft_model, save_adapters
from tests.support.subject import adapter_parameters

KINDS = ["up", "mix", "turned", "down"]


def made(seed: int, r: int, **options: Any) -> adaptc.Adapter:
    """An adapter of the small model with random factors."""
    prog = adaptc.compile(net(), adaptc.LoraConfig(**{"r": r, "target_modules": KINDS, **options}), example_inputs=IDS)
    randomize(prog, seed)
    return as_adapter_object(prog)


def randomize(prog: adaptc.AdaptedProgram, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in adapter_parameters(prog).values():
            t.copy_(torch.randn(t.shape, generator=g, dtype=t.dtype) * 0.5)


def deltas(adapter: adaptc.Adapter) -> dict[str, Tensor]:
    """What a merge of the adapter adds to each tensor of the model, in float64."""
    base = net().double()
    merged = adaptc.merge(adaptc.compile(base, adapter, example_inputs=IDS)).state_dict
    return {k: merged[k] - v for k, v in base.state_dict().items() if not torch.equal(merged[k], v)}


def close(got: dict[str, Tensor], want: dict[str, Tensor], tol: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=tol * max(1.0, float(value.abs().max())))


def weighted(*terms: tuple[float, dict[str, Tensor]]) -> dict[str, Tensor]:
    keys = dict.fromkeys(k for _, d in terms for k in d)
    return {k: sum(w * d[k] for w, d in terms if k in d) for k in keys}  # type: ignore[misc]


ADAPTERS = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "patterns": {"r": 2, "rank_pattern": {"up": 5, "down": 1}, "alpha_pattern": {"mix": 9}},
    "fewer": {"r": 3, "target_modules": ["up", "down"]},
    "by expression": {"r": 2, "target_modules": "up|mix"},
    "with biases": {"r": 3, "target_modules": ["up", "turned"], "lora_bias": True},
}


@pytest.fixture(scope="module")
def adapters() -> dict[str, tuple[adaptc.Adapter, dict[str, Tensor]]]:
    found = {n: made(i, **o) for i, (n, o) in enumerate(ADAPTERS.items())}
    return {n: (a, deltas(a)) for n, a in found.items()}


@pytest.mark.long
def test_the_sum_is_exact_whatever_differs(adapters: Any, tmp_path: Path):
    weights = [0.5, -0.3, 1.1, 2.0, -1.0, 0.7]
    pairs = [(a, w) for (a, _), w in zip(adapters.values(), weights, strict=True)]
    want = weighted(*((w, d) for (_, d), w in zip(adapters.values(), weights, strict=True)))
    for options in ({"method": "cat"}, {"method": "svd", "svd_rank": 40}):
        found = adaptc.combine(pairs, **options)
        close(deltas(found), want, 3e-5)
        assert not found.config.use_rslora
        again = adaptc.load_adapter(adaptc.save_adapter(found, tmp_path / options["method"]))
        close(deltas(again), want, 3e-5)
        prog = adaptc.compile(net(), found, example_inputs=IDS)
        torch.testing.assert_close(
            load_peft_adapter(tmp_path / options["method"])(IDS), prog(IDS), rtol=1e-4, atol=1e-4
        )


@pytest.mark.few(7)
@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties", "dare_ties", "magnitude_prune", "dare_linear_svd"])
def test_of_one_adapter_it_is_the_adapter_times_the_weight(adapters: Any, name: str, method: str):
    adapter, delta = adapters[name]
    density = {} if method in ("linear", "cat", "svd") else {"density": 1.0}
    found = adaptc.combine([(adapter, -0.7)], method=method, **density)
    close(deltas(found), weighted((-0.7, delta)), 2e-5)


@pytest.mark.long
def test_arithmetic_is_that_of_the_changes(adapters: Any):
    (a, da), (b, db) = adapters["patterns"], adapters["rslora"]
    close(deltas(a + b), weighted((1, da), (1, db)), 2e-5)
    close(deltas(a - b), weighted((1, da), (-1, db)), 2e-5)
    close(deltas(2 * a - b / 4), weighted((2, da), (-0.25, db)), 2e-5)
    close(deltas(-a * 0.5), weighted((-0.5, da)), 2e-5)
    assert (-a).tensors["up.lora_A.weight"].shape == a.tensors["up.lora_A.weight"].shape
    with pytest.raises(TypeError):
        a + 1  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(adaptc.ConfigError, match="divided by zero"):
        a / 0
    with pytest.raises(adaptc.ConfigError, match="must be finite"):
        float("nan") * a


def test_the_nearest_of_a_rank_is_that_of_the_whole_decomposition(adapters: Any):
    """Products are decomposed by their factors, which must give what the matrices would."""
    (a, da), (b, db) = adapters["plain"], adapters["rslora"]
    found = deltas(adaptc.combine([(a, 1.0), (b, 0.4)], method="svd", svd_rank=2))
    for name, delta in weighted((1.0, da), (0.4, db)).items():
        flat = delta.flatten(1)
        u, s, v = torch.linalg.svd(flat, full_matrices=False)
        best = (u[:, :2] * s[:2]) @ v[:2]
        torch.testing.assert_close(found[name].flatten(1), best, rtol=0, atol=3e-5)


class Stacked(nn.Module):
    """Experts in one parameter, and a convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(3, 6, 5))
        self.grouped = nn.Conv1d(6, 9, 3, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(torch.einsum("bti,eoi->bot", x, torch.tanh(self.experts.weight) * self.experts.weight))


@pytest.mark.long
@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties_svd"])
def test_experts_and_groups_are_blocks_of_their_own(method: str):
    torch.manual_seed(3)
    model, x = Stacked().double(), torch.randn(2, 4, 5, dtype=torch.float64)

    def adapter(r: int, seed: int) -> adaptc.Adapter:
        options: dict[str, Any] = {"target_modules": ["grouped"], "target_parameters": ["experts.weight"]}
        prog = adaptc.compile(model, adaptc.LoraConfig(r=r, **options), example_inputs=x)
        randomize(prog, seed)
        return as_adapter_object(prog)

    def of(a: adaptc.Adapter) -> dict[str, Tensor]:
        merged = adaptc.merge(adaptc.compile(model, a, example_inputs=x)).state_dict
        start = adaptc.merge(adaptc.compile(model, 0.0001 * a, example_inputs=x)).state_dict
        return {k: merged[k] - start[k] for k in ("experts.weight", "grouped.weight")}

    a, b = adapter(3, 1), adapter(6, 2)
    full: dict[str, Any] = {"svd_rank": 18} if method.endswith("svd") else {}
    full |= {"density": 1.0} if "ties" in method else {}
    found = adaptc.combine([(a, 0.5), (b, -2.0)], method=method, **full)
    assert not torch.allclose(adaptc.compile(model, found, example_inputs=x)(x), model(x))
    if method in ("cat", "svd"):
        want = weighted((0.5, of(a)), (-2.0, of(b)))
        close(of(found), want, 2e-3)


@given(
    weights=st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 0.05), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    method=st.sampled_from(["cat", "svd", "linear", "ties", "magnitude_prune_svd", "ties_svd"]),
)
def test_the_order_is_of_no_matter(weights: list[float], order: list[int], method: str):
    g = torch.Generator().manual_seed(0)
    parts = []
    for r in (2, 2, 3):
        a, b = torch.randn(r, 7, generator=g), torch.randn(5, r, generator=g)
        config = adaptc.LoraConfig(r=r, target_modules=["a"])
        parts.append(adaptc.Adapter(config, {"a.lora_A.weight": a, "a.lora_B.weight": b}))
    options: dict[str, Any] = {"method": method} | ({} if method in ("cat", "svd", "linear") else {"density": 0.5})
    pairs = list(zip(parts, weights, strict=True))

    def product(adapter: adaptc.Adapter) -> Tensor:
        return adapter.tensors["a.lora_B.weight"] @ adapter.tensors["a.lora_A.weight"]

    one = product(adaptc.combine(pairs, **options))
    other = product(adaptc.combine([pairs[i] for i in order], **options))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


SUMMED = {
    "c3a": adaptc.C3AConfig(block_size=1, target_modules=["up", "down"]),
    "fourierft": adaptc.FourierFTConfig(n_frequency=9, target_modules=["up", "down"]),
    "waveft": adaptc.WaveFTConfig(n_frequency=9, target_modules=["up", "down"]),
    "miss": adaptc.MissConfig(r=3, target_modules=["up", "down"]),
}


@pytest.mark.long
@pytest.mark.parametrize("name", list(SUMMED))
def test_methods_that_are_linear_in_a_tensor_are_summed(name: str, tmp_path: Path):
    found = []
    for seed in range(2):
        prog = adaptc.compile(net(), SUMMED[name], example_inputs=IDS)
        randomize(prog, seed)
        found.append(adaptc.load_adapter(adaptc.save_adapter(prog, tmp_path / str(seed))))
    one, other = found
    close(deltas(one - 0.5 * other), weighted((1, deltas(one)), (-0.5, deltas(other))), 2e-5)
    assert deltas(one)


@pytest.mark.long
def test_tensors_trained_whole_are_averaged(tmp_path: Path):
    config = peft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"])
    paths = save_adapters(peft_model([config, config]), tmp_path)
    one, other = map(adaptc.load_adapter, paths)
    found = adaptc.combine([(one, 0.25), (other, 0.75)])
    key = "down.weight"
    torch.testing.assert_close(found.tensors[key], 0.25 * one.tensors[key] + 0.75 * other.tensors[key])
    prog = adaptc.compile(net(), found, example_inputs=IDS)
    theirs = load_peft_adapter(adaptc.save_adapter(found, tmp_path / "mix"))
    torch.testing.assert_close(prog(IDS), theirs(IDS), rtol=1e-4, atol=1e-5)
    with pytest.raises(adaptc.ConfigError, match=r"'down.weight' is trained whole.*sum to 2"):
        one + other
    assert adaptc.combine([(one, 1.0), (made(1, 2), -3.0)]).tensors[key].equal(one.tensors[key])


@pytest.mark.long
def test_programs_states_and_what_is_bound_are_adapters(adapters: Any, tmp_path: Path):
    (a, da), (b, db) = adapters["plain"], adapters["fewer"]
    want = weighted((0.5, da), (0.5, db))
    prog = adaptc.compile(net(), a, example_inputs=IDS)
    bound = prog.bind(b)
    close(deltas(adaptc.combine([(prog, 0.5), (bound, 0.5)], method="cat")), want)
    state = {f"base_model.model.{k}": t for k, t in b.tensors.items()}
    close(deltas(adaptc.combine([(bound, 0.5), (state, 0.5)], method="cat", config=b.config)), db)
    with pytest.raises(adaptc.AdaptcError, match=r"give what prog.bind\(...\) returned"):
        adaptc.combine([(prog.binding, 0.5)])


@pytest.mark.long
def test_what_is_made_owns_nothing_of_a_program(adapters: Any):
    """A swap to an adapter copies: what becomes of either does not reach the other."""
    a, _ = adapters["plain"]
    prog = adaptc.compile(net(), a, example_inputs=IDS)
    out, before = prog(IDS), {k: t.clone() for k, t in a.tensors.items()}
    module = adaptc.compile(net(), a, example_inputs=IDS, training=True).module()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    assert all(torch.equal(a.tensors[k], t) for k, t in before.items())
    torch.testing.assert_close(prog(IDS), out)


def test_a_site_is_made_of_those_that_have_it():
    wrapped = peft_model([peft.LoraConfig(r=2, target_modules=["up"]), peft.LoraConfig(r=2, target_modules=["down"])])
    assert set(changes(wrapped, "0")) == {"up"}
    assert {*TARGETS} == {n for n, _ in Net().named_children()}
