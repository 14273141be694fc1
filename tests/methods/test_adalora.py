"""AdaLoRA beyond the table of methods: first values, options, and a training run against PEFT's, step by step."""

from __future__ import annotations

import dataclasses
import json
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc import AdaLoraConfig, AdaptcError, ConfigError
from adaptc.binding.bind import file_tensors
from adaptc.methods.lora_family.adalora import AdaLora
from adaptc.passes.graph.ops import Op
from tests.support.cover import examples
from tests.support.layer_table import Experts

TARGETS = ["up", "conv", "down"]
SCHEDULE = {"init_r": 5, "target_r": 2, "tinit": 3, "tfinal": 5, "deltaT": 2, "total_step": 20, "beta2": 0.7}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 18)
        self.conv = nn.Conv2d(2, 5, (2, 3))
        self.down = nn.Linear(10, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x)).reshape(-1, 2, 3, 3)
        return self.down(torch.tanh(self.conv(h)).flatten(1))


class NetWithLoss(Net):
    """PEFT adds the penalty to the ``loss`` of an output that has one."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return types.SimpleNamespace(loss=nn.functional.mse_loss(super().forward(x), y))


def net(kind: type[Net] = Net) -> Net:
    torch.manual_seed(3)
    return kind().double()


def by_peft(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(7)
    config = peft.AdaLoraConfig(**{"target_modules": TARGETS, "total_step": 9, **options})
    wrapped = peft.get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        p.requires_grad_("lora_" in name)  # above all bases but those in float32 PEFT trains its number of ranks, too
    return wrapped


def compiled(seed: int = 7, **options: Any) -> adaptc.AdaptedProgram:
    config, model = AdaLoraConfig(**{"target_modules": TARGETS, "total_step": 9, **options}), net()
    torch.manual_seed(seed)
    return adaptc.compile(model, config, example_inputs=torch.zeros(3, 7).double(), training=True)


def slots(program: adaptc.AdaptedProgram) -> dict[str, Tensor]:
    return {n: t for n, t in program.binding.values.items() if "lora_" in n}


def theirs(model: Any) -> dict[str, nn.Parameter]:
    named = model.named_parameters()
    return {n.removeprefix("base_model.model."): p for n, p in named if "lora_" in n}


def tensors_in(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step % 4)
    return torch.randn(6, 7, generator=g).double(), torch.randn(6, 3, generator=g).double()


def same(found: dict[str, Tensor], expected: dict[str, Any], tolerance: float = 0.0) -> None:
    assert sorted(found) == sorted(expected)
    for key, want in expected.items():
        torch.testing.assert_close(found[key].detach(), want.detach(), rtol=tolerance, atol=tolerance, msg=key)


# -- first values and options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, False])
def test_one_seed_gives_what_peft_gives(init):
    wrapped = by_peft(net(), init_lora_weights=init, init_r=3)
    after = torch.rand(3)
    program = compiled(init_lora_weights=init, init_r=3)
    assert torch.equal(after, torch.rand(3))
    same(slots(program), theirs(wrapped))
    assert all(bool(t.any()) != (init and "lora_E" in n) for n, t in slots(program).items())


def test_the_fields_and_defaults_are_pefts():
    def fields(config: Any) -> dict[str, Any]:
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "peft_type"}

    expected = fields(peft.AdaLoraConfig(total_step=1)) | {"runtime_config": None, "peft_version": None}
    assert fields(AdaLoraConfig(total_step=1)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "total_step is required"),
        ({"total_step": 0}, "total_step must be a positive integer"),
        ({"total_step": 9, "tinit": 5, "tfinal": 4}, "tinit=5 must be less than total_step - tfinal = 5"),
        ({"total_step": 9, "orth_reg_weight": -0.1}, "orth_reg_weight must not be negative"),
        ({"total_step": 9, "beta1": 1.0}, "beta1 must lie between 0 and 1"),
        ({"total_step": 9, "beta2": 0}, "beta2 must lie between 0 and 1"),
        ({"total_step": 9, "deltaT": 0}, "deltaT must be a positive integer"),
        ({"total_step": 9, "init_r": 0}, "init_r must be a positive integer"),
        ({"total_step": 9, "target_r": True}, "target_r must be an integer"),
        ({"total_step": 9, "lora_dropout": 1.0}, r"AdaLoraConfig.lora_dropout must lie in \[0, 1\)"),
        ({"total_step": 9, "bias": "some"}, "AdaLoraConfig.bias must be"),
        ({"total_step": 9, "init_lora_weights": "gaussian"}, "'gaussian' does not exist"),
        ({"total_step": 9, "use_dora": True}, r"AdaLoraConfig.use_dora=True is not supported"),
        ({"total_step": 9, "loftq_config": {"loftq_bits": 4}}, "AdaLoraConfig.loftq_config"),
        ({"total_step": 9, "use_rslora": True}, "use_rslora=True is not supported: PEFT ignores it"),
        ({"total_step": 9, "lora_bias": True}, "lora_bias=True is not supported: PEFT ignores it"),
        ({"total_step": 9, "alpha_pattern": {"up": 3}}, "alpha_pattern=.* is not supported: PEFT ignores it"),
        ({"total_step": 9, "rank_pattern": {"up": 3}}, "rank_pattern.'up'.*To choose ranks by hand use LoraConfig"),
        ({"total_step": 9, "init_r": 3, "rank_pattern": {"up.lora_E": [True]}}, "a list of init_r=3 bools"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        AdaLoraConfig(target_modules=["up"], **options)


def test_r_is_said_to_have_no_effect():
    with pytest.warns(adaptc.AdaptcWarning, match="r=4 has no effect; init_r is the rank"):
        config = AdaLoraConfig(target_modules=["up"], total_step=9, r=4)
    assert config.method("up", "linear").r == 12


def test_a_pattern_for_a_module_that_is_not_adapted_is_an_error():
    with pytest.raises(adaptc.TargetError, match="rank_pattern"):
        compiled(init_r=2, rank_pattern={"sideways.lora_E": [True, False]})


@pytest.mark.parametrize("alpha", [0, -3])
def test_without_alpha_the_scale_is_the_rank_it_began_with(alpha):
    """PEFT forgets that rank when it loads an adapter whose ranks were cut."""
    kept = [True, False, True, False]
    method = AdaLora(r=2, alpha=alpha, init_r=4, kept=tuple(kept))
    assert method.scale(Op("linear", (3, 5))) == pytest.approx(1, abs=1e-5)


@settings(max_examples=examples(20), deadline=None)
@given(out=st.integers(2, 11), inner=st.integers(2, 13), r=st.integers(1, 7), groups=st.sampled_from([1, 2, 3]))
def test_zero_terms_and_groups(out, inner, r, groups):
    """Rows of zeros beside the others mean nothing, and each group has its own rows of B, over one A."""
    rest = ([1], [0], [1], groups)
    op = Op("conv1d", (out * groups, inner, 3), torch.ops.aten.conv1d.default, rest)
    method = AdaLora(r=r, init_r=r)
    values = {n: torch.randn(s.shape, dtype=torch.float64) for n, s in method.slots(op).items()}
    W, scale = torch.randn(op.shape, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    new = method.weight(op, W, values, scale)
    assert new.shape == W.shape
    delta = values["lora_B"] @ torch.diag(values["lora_E"][:, 0]) @ values["lora_A"]
    torch.testing.assert_close(new, W + 0.7 * delta.reshape(W.shape))
    pad = {"lora_A": (0, 0, 0, 2), "lora_E": (0, 0, 0, 2), "lora_B": (0, 2)}
    wide = {n: nn.functional.pad(t, pad[n]) for n, t in values.items()}
    torch.testing.assert_close(method.weight(op, W, wide, scale), new)
    x = torch.randn(2, inner * groups, 5, dtype=torch.float64)
    torch.testing.assert_close(method.apply(op, x, op(x, W), W, None, wide, scale), op(x, new))


# -- training ----------------------------------------------------------------------------------------------------------


def ranks(pattern: dict[str, Any]) -> dict[str, list[bool]]:
    return {k.replace(".default", "").removeprefix("base_model.model."): v for k, v in pattern.items()}


@pytest.mark.long
def test_twenty_steps_are_pefts(tmp_path: Path):
    """Losses, gradients, tensors, cuts and the file."""
    wrapped = by_peft(net(NetWithLoss), **SCHEDULE, init_lora_weights=False)
    program = compiled(**SCHEDULE, init_lora_weights=False)
    same(slots(program), theirs(wrapped))
    module, allocator = program.module(), adaptc.training.RankAllocator(program)
    assert allocator.rank_pattern is None
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.03) for m in (module, wrapped)]
    patterns: list[Any] = []
    for step in range(20):
        x, y = batch(step)
        loss = nn.functional.mse_loss(module(x), y) + adaptc.training.orthogonal_loss(program)
        expected = wrapped.base_model(x, y).loss  # a PeftModel without a task forgets the penalty
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        loss.backward()
        expected.backward()
        grads = {n: p.grad for n, p in theirs(wrapped).items()}
        same({n: t.grad for n, t in slots(program).items()}, grads, 1e-8)
        for optimizer in optimizers:
            optimizer.step()
        allocator.update_and_allocate(step)
        wrapped.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        same(slots(program), theirs(wrapped), 1e-8)
        for name, p in theirs(wrapped).items():
            if "lora_E" in name:
                assert torch.equal(slots(program)[name] == 0, p == 0), (step, name)
        found = wrapped.peft_config["default"].rank_pattern
        assert (allocator.rank_pattern is None) == (found is None)
        if found is not None:
            assert allocator.rank_pattern == ranks(found)
        patterns.append(allocator.rank_pattern)
    counts = [sum(sum(m) for m in p.values()) for p in patterns if p is not None]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 6
    assert counts[0] == 12
    assert patterns[15] == patterns[19]
    assert patterns[8] != patterns[15]

    x = batch(0)[0]
    before = program(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match.*|.*LoRA tensor.*invalid shape.*")
        wrapped.save_pretrained(str(tmp_path / "peft"))
        ours = adaptc.save_adapter(program, tmp_path / "ours")
        same(
            load_file(ours / "adapter_model.safetensors"), load_file(tmp_path / "peft/adapter_model.safetensors"), 2e-5
        )
        stored = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "peft")]
        assert stored[0]["rank_pattern"] == stored[1]["rank_pattern"] == patterns[-1]
        for directory in (ours, tmp_path / "peft"):
            loaded = peft.PeftModel.from_pretrained(net(), str(directory))
            torch.testing.assert_close(loaded(x), before, rtol=1e-6, atol=1e-6)
            again = adaptc.compile(net(), directory, example_inputs=x)
            torch.testing.assert_close(again(x), before, rtol=1e-9, atol=1e-9)
            same(tensors_in(adaptc.save_adapter(again, tmp_path / "back")), tensors_in(directory))

    # A program on disk still knows which terms are left, and so does one that swaps to the file.
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    torch.testing.assert_close(loaded(x), before, rtol=0, atol=0)
    same(tensors_in(adaptc.save_adapter(loaded, tmp_path / "c")), tensors_in(ours))
    other = compiled(init_r=3, seed=1)
    adaptc.swap(other, ours)
    torch.testing.assert_close(other(x), before, rtol=1e-9, atol=1e-9)
    same(tensors_in(adaptc.save_adapter(other, tmp_path / "d")), tensors_in(ours))


def importance_only(program: adaptc.AdaptedProgram, scores: dict[str, list[float]]) -> Callable[[], None]:
    """Gradients that give the terms of each site these scores."""

    def fill() -> None:
        for name, p in slots(program).items():
            module, _, slot = name.removesuffix(".default").rpartition(".")
            p.grad = torch.zeros_like(p)
            if slot == "lora_E":
                with torch.no_grad():
                    p.copy_(torch.ones_like(p))
                p.grad = torch.tensor(scores[module], dtype=p.dtype).reshape(p.shape)

    return fill


def test_a_site_may_lose_all_its_terms(tmp_path: Path):
    """Its tensors in the file are empty, as in PEFT's, and it computes the base."""
    options = {"init_r": 2, "target_r": 1, "total_step": 3, "deltaT": 1, "init_lora_weights": False}
    program = compiled(**options)
    fill = importance_only(program, {"up": [0.0, 0.0], "conv": [3.0, 2.0], "down": [5.0, 1e-6]})
    allocator = adaptc.training.RankAllocator(program)
    for step in range(1, 5):
        fill()
        allocator.update_and_allocate(step)
    assert allocator.rank_pattern == {
        "up.lora_E": [False, False],
        "conv.lora_E": [True, True],
        "down.lora_E": [True, False],
    }
    assert adaptc.report(program)
    directory = adaptc.save_adapter(program, tmp_path / "a")
    shapes = {k.removeprefix("base_model.model."): tuple(t.shape) for k, t in tensors_in(directory).items()}
    assert shapes["up.lora_A"] == (0, 7)
    assert shapes["up.lora_B"] == (18, 0)
    assert shapes["down.lora_E"] == (1, 1)
    x = batch(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's on empty tensors, PEFT's on patterns
        expected = peft.PeftModel.from_pretrained(net(), str(directory))(x)
    assert not torch.allclose(expected, net()(x))
    again = adaptc.compile(net(), directory, example_inputs=x)
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-6)
    same(tensors_in(adaptc.save_adapter(again, tmp_path / "b")), tensors_in(directory))
    torch.testing.assert_close(adaptc.merge(again)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_the_allocator_says_what_it_needs():
    program = compiled(**SCHEDULE)
    allocator = adaptc.training.RankAllocator(program)
    with pytest.raises(AdaptcError, match=r"up.lora_A has no gradient: call .* after loss.backward"):
        allocator.update_and_allocate(1)
    with pytest.raises(AdaptcError, match="no step before this one"):
        allocator.update_and_allocate(15)
    with pytest.raises(AdaptcError, match="after the last in which ranks are cut, and none were"):
        allocator.update_and_allocate(16)
    adaptc.swap(program, file_tensors(program.spec(), program.binding))
    with pytest.raises(AdaptcError, match="swapped since the allocator was made"):
        allocator.update_and_allocate(1)
    with pytest.raises(ConfigError, match="target_r=8 is greater than init_r=3"):
        adaptc.training.RankAllocator(compiled(init_r=3))
    with pytest.raises(AdaptcError, match="'up' is not trainable"):
        adaptc.training.RankAllocator(compiled(**SCHEDULE, inference_mode=True))
    lora = adaptc.compile(net(), adaptc.LoraConfig(target_modules=["up"]), example_inputs=torch.zeros(3, 7).double())
    with pytest.raises(AdaptcError, match="of type LORA, not ADALORA"):
        adaptc.training.orthogonal_loss(lora)


def test_what_was_cut_is_not_cut_again(tmp_path: Path):
    program = compiled(**SCHEDULE, init_lora_weights=False)
    program.install(program.binding)
    adaptc.training.RankAllocator(program)._store_rank_pattern(
        {f"{m}.lora_E": [True, False, True, False, False] for m in TARGETS}
    )
    directory = adaptc.save_adapter(program, tmp_path)
    again = adaptc.compile(net(), directory, example_inputs=torch.zeros(3, 7).double(), training=True)
    with pytest.raises(AdaptcError, match="'up' has rank 2 of init_r=5"):
        adaptc.training.RankAllocator(again)
    assert adaptc.training.orthogonal_loss(again).requires_grad


def test_the_user_config_stays_as_it_was():
    config = AdaLoraConfig(target_modules=TARGETS, **{**SCHEDULE, "tinit": 0, "deltaT": 1})
    program = adaptc.compile(net(), config, example_inputs=torch.zeros(3, 7).double(), training=True)
    allocator = adaptc.training.RankAllocator(program)
    for p in slots(program).values():
        p.grad = torch.ones_like(p)
    allocator.update_and_allocate(1)
    assert allocator.rank_pattern is not None
    assert config.rank_pattern is None


def test_experts_are_cut_one_by_one(tmp_path: Path):
    """A term stays in the file while one expert needs it, and is zero for the others."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.layer = Experts(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    options = {"init_r": 3, "target_r": 1, "total_step": 2, "target_parameters": ["layer.matrices"]}
    config = AdaLoraConfig(**options, target_modules=[], init_lora_weights=False)
    x = torch.randn(4, 7)
    program = adaptc.compile(Model(), config, example_inputs=x, training=True)
    A, E, B = (program.binding.values[f"layer.lora_{n}.default"] for n in "AEB")
    assert A.shape == (3, 3, 7)
    assert E.shape == (3, 3, 1)
    assert B.shape == (3, 5, 3)
    a = adaptc.training.orthogonal_loss(program)
    eye = torch.eye(3)
    norms = [(p - eye).norm() for i in range(3) for p in (A[i] @ A[i].T, B[i].T @ B[i])]
    torch.testing.assert_close(a, 0.5 * torch.stack(norms).mean())
    allocator = adaptc.training.RankAllocator(program)
    for step in (1, 2):
        for p in (A, B):
            p.grad = torch.zeros_like(p)
        with torch.no_grad():
            E.fill_(1.0)
        E.grad = torch.tensor([[0.1, 5, 0.2], [0.3, 4, 0.4], [0, 1, 2]]).unsqueeze(-1)
        allocator.update_and_allocate(step)
    assert E.squeeze(-1).tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]
    file = adaptc.save_adapter(program, tmp_path)
    assert tensors_in(file)["base_model.model.layer.lora_A"].shape == (3, 2, 7)
    again = adaptc.compile(Model(), file, example_inputs=x)
    torch.testing.assert_close(again(x), program(x))


@pytest.mark.long
def test_both_weights_of_multihead_attention_have_ranks_of_their_own(tmp_path: Path):
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    config = AdaLoraConfig(target_modules=["attention"], init_r=2, target_r=1, total_step=2, init_lora_weights=False)
    program = adaptc.compile(Attending(), config, example_inputs=torch.randn(3, 4, 6), training=True)
    sites = {"attention": [3.0, 2.0], "attention.base_layer.out_proj": [0.0, 1e-6]}
    fill, allocator = importance_only(program, sites), adaptc.training.RankAllocator(program)
    for step in (1, 2):
        fill()
        allocator.update_and_allocate(step)
    assert allocator.rank_pattern == {f"{k}.lora_E": [v[0] > 0, v[1] > 1] for k, v in sites.items()}
    x = torch.randn(2, 5, 6)
    again = adaptc.compile(Attending(), adaptc.save_adapter(program, tmp_path), example_inputs=x)
    torch.testing.assert_close(again(x), program(x))
