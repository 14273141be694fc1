"""PVeRA beyond the table of methods: its noise, and projections that the whole model shares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError, ConfigError, PveraConfig, TargetError
from adaptc.methods.shared_factors.pvera import Pvera
from adaptc.passes.graph.ops import Op
from adaptc.runtime.rank_padding import find_paddings
from tests.support.chain import (
    FILE,
    TARGETS,
    as_stored,
    compile_chain,
    copy_adapter_with,
    inputs,
    load_peft_chain,
    peft_chain,
    peft_config,
    slots_by_file_key,
    tensor_files_are_equal,
)
from tests.support.subject import loss


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_of_different_sizes_share_projections(tmp_path, dtype, saved):
    config = peft_config("PveraConfig", r=5, save_projection=saved, projection_prng_key=9)
    model = peft_chain(config, tmp_path / "a", dtype)
    program = compile_chain(tmp_path / "a", dtype)
    found = slots_by_file_key(program)
    for name, t in (("pvera_A", model.base_model.pvera_A), ("pvera_B", model.base_model.pvera_B)):
        assert torch.equal(found[name].reshape(t["default"].shape), t["default"])
        assert found[name].dtype == t["default"].dtype
    x = inputs(5, dtype)
    torch.testing.assert_close(program(x), model(x))
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    assert ("base_model.pvera_A" in load_file(tmp_path / "b" / FILE)) == saved
    torch.testing.assert_close(load_peft_chain(tmp_path / "b", dtype)(x), model(x))


@pytest.mark.long
def test_swaps_to_other_ranks_sites_and_projections(tmp_path):
    configs = [
        peft_config("PveraConfig", r=5, target_modules=["q", "v"]),
        peft_config("PveraConfig", r=3, target_modules=["k"], projection_prng_key=4, save_projection=False),
        peft_config("PveraConfig", r=8, target_modules=["k", "v"], projection_prng_key=2, generator_seed=5),
    ]
    models = [peft_chain(c, tmp_path / str(i)) for i, c in enumerate(configs)]
    program = compile_chain([tmp_path / str(i) for i in range(3)])
    for i in (2, 0, 1, 2):
        adaptc.swap(program, tmp_path / str(i))
        program.validate()
        torch.testing.assert_close(program(inputs(2)), models[i](inputs(2)), rtol=1e-10, atol=1e-10)
        adaptc.save_adapter(program, tmp_path / f"again{i}")
        assert tensor_files_are_equal(tmp_path / str(i), tmp_path / f"again{i}")


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("sample", [False, True])
def test_ranks_can_be_padded(kind, sample):
    layer = {
        "linear": Op("linear", (7, 5), torch.ops.aten.linear.default, ()),
        "conv2d": Op("conv2d", (6, 2, 3, 3), torch.ops.aten.conv2d.default, ((1, 1), (1, 1), (1, 1), 3)),
    }[kind]
    assert find_paddings(Pvera(r=2, sample=sample), layer, "apply")
    assert find_paddings(Pvera(r=2, sample=sample), layer, "weight")


def trained_pair(tmp_path, **options: Any) -> tuple[Any, nn.Module]:
    """PEFT's model and a program's module of one adapter, both in training."""
    model = peft_chain(peft_config("PveraConfig", r=5, **options), tmp_path / "a").train()
    return model, compile_chain(tmp_path / "a", training=True).module()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_draws_peft_s_noise_and_inference_none(tmp_path, dropout):
    model, module = trained_pair(tmp_path, pvera_dropout=dropout)
    x, expected = inputs(4), compile_chain(tmp_path / "a")(inputs(4))
    outputs = []
    for p in (model, module):
        torch.manual_seed(0)
        outputs.append(p(x))
        loss(outputs[-1]).backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(found) == 6
    for name, grad in grads.items():
        (own,) = [g for n, g in found.items() if n.split(".")[-3:-1] == name.split(".")[-3:-1]]
        torch.testing.assert_close(own.reshape(grad.shape), grad, rtol=1e-9, atol=1e-9)
        assert grad.abs().min() > 0
    assert not torch.allclose(module(x), module(x))
    assert not torch.allclose(module(x), expected)
    torch.testing.assert_close(module.eval()(x), expected)
    torch.testing.assert_close(model.eval()(x), expected)
    assert not torch.allclose(module.train()(x), expected)


@pytest.mark.long
def test_a_program_in_training_mode_runs_and_merges_as_in_inference(tmp_path):
    peft_chain(peft_config("PveraConfig", r=5), tmp_path / "a")
    program, x, expected = compile_chain(tmp_path / "a", training=True), inputs(4), compile_chain(tmp_path / "a")
    assert [a.form for a in program.adaptation.attachments] == ["apply"] * 3
    torch.testing.assert_close(program(x), expected(x))
    torch.testing.assert_close(adaptc.merge(program)(x), expected(x))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    torch.testing.assert_close(loaded(x), expected(x))
    module = loaded.module()
    module.train()
    assert not torch.allclose(module(x), module(x))


def test_inference_stays_finite_where_the_variance_overflows(tmp_path):
    peft_chain(peft_config("PveraConfig", r=5), tmp_path / "a", torch.float32)
    huge = copy_adapter_with(
        tmp_path / "a",
        tmp_path / "b",
        lambda t: t.update({n: torch.cat([v[:5], v[5:] * 1e6]) for n, v in t.items() if n.endswith("lambda_d")}),
    )
    program = compile_chain(huge, torch.float32, training=True)
    module = program.module()
    x = inputs(4, torch.float32)
    assert not module(x).isfinite().all()
    module.eval()
    assert module(x).isfinite().all()
    torch.testing.assert_close(module(x), compile_chain(tmp_path / "a", torch.float32)(x))


def test_sampling_in_inference_draws_peft_s_noise(tmp_path):
    config = peft_config("PveraConfig", r=5, sample_at_inference=True)
    model = peft_chain(config, tmp_path / "a")
    program, x = compile_chain(tmp_path / "a"), inputs(4)
    for p in (program, program.module().eval()):
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(p(x), expected, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(p(x), p(x))
    merged = adaptc.merge(program)
    torch.testing.assert_close(merged(x), copy.deepcopy(model).merge_and_unload()(x), rtol=1e-10, atol=1e-10)
    assert torch.equal(merged(x), merged(x))
    with pytest.raises(ConfigError, match="would lose its dropout or noise"):
        compile_chain(tmp_path / "a", form="weight")


def test_the_mean_and_the_variance_have_their_own_halves():
    """Against the formula, at a convolution with groups, where PEFT has no PVeRA."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 9, 3, groups=3)).double()
    x = torch.randn(2, 6, 5, 7).double()
    config = PveraConfig(r=4, target_modules=["0"], init_weights=False)
    program = adaptc.compile(model, config, example_inputs=x, training=True)
    found = {n.rpartition(".")[2]: t.detach() for n, t in slots_by_file_key(program).items()}
    weight, down, d = model[0].weight, found["pvera_A"], found["pvera_lambda_d"]
    parts = []
    module = program.module()
    torch.manual_seed(3)
    noise = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    for g in range(3):
        own = x[:, 2 * g : 2 * g + 2]
        mean, logvar = (nn.functional.conv2d(own, (d[i].unsqueeze(-1) * down[i]).reshape(4, 2, 3, 3)) for i in range(2))
        hidden = mean + noise[:, 4 * g : 4 * g + 4] * (logvar / 2).exp()
        up = (found["pvera_lambda_b"].unsqueeze(-1) * found["pvera_B"])[3 * g : 3 * g + 3]
        parts.append(torch.einsum("brhw,or->bohw", hidden, up))
    expected = nn.functional.conv2d(x, weight, model[0].bias, groups=3) + torch.cat(parts, 1)
    torch.manual_seed(3)
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


def test_a_seed_of_the_noise_is_refused_where_noise_is_drawn(tmp_path):
    with pytest.raises(ConfigError, match=r"generator_seed=3 .* as with sample_at_inference.*torch\.manual_seed"):
        PveraConfig(sample_at_inference=True, generator_seed=3)
    config = PveraConfig(r=4, generator_seed=3, target_modules=TARGETS)
    compile_chain(config)
    with pytest.raises(ConfigError, match=r"generator_seed=3 .* as in training"):
        compile_chain(config, training=True)
    peft_chain(peft_config("PveraConfig", r=4, generator_seed=3), tmp_path / "a")
    program = compile_chain(PveraConfig(r=4, target_modules=TARGETS), training=True)
    with pytest.raises(ConfigError, match=r"generator_seed=3 .* as in training"):
        adaptc.swap(program, tmp_path / "a")


class Blocked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.layer(x)
        return y + x.sum(-1, keepdim=True)


def test_layers_where_noise_has_no_place_are_refused():
    x = torch.randn(3, 5)
    config = PveraConfig(r=4, target_modules=["layer"])
    adaptc.compile(Blocked(), config, example_inputs=x)
    with pytest.raises(ConfigError, match="would lose its dropout or noise"):
        adaptc.compile(Blocked(), config, example_inputs=x, training=True)
    model = nn.Sequential(nn.ConvTranspose1d(5, 7, 3))
    with pytest.raises(TargetError, match="PVeRA adds noise to what a layer computes"):
        adaptc.compile(model, PveraConfig(target_modules=["0"]), example_inputs=torch.randn(2, 5, 4))


def test_projections_in_a_file_count_even_where_they_could_be_drawn(tmp_path):
    model = peft_chain(peft_config("PveraConfig", r=5, projection_prng_key=3), tmp_path / "a")
    program = compile_chain(PveraConfig(r=2, target_modules=TARGETS, save_projection=False))
    adaptc.swap(program, load_file(tmp_path / "a" / FILE))
    torch.testing.assert_close(program(inputs(2)), model(inputs(2)), rtol=1e-10, atol=1e-10)


def test_tensors_without_two_halves_are_refused(tmp_path):
    peft_chain(peft_config("PveraConfig", r=5), tmp_path / "a")
    program = compile_chain(tmp_path / "a")
    before = program(inputs(2))
    odd = copy_adapter_with(
        tmp_path / "a", tmp_path / "b", lambda t: t.update({n: v[:9] for n, v in t.items() if n.endswith("lambda_d")})
    )
    with pytest.raises(CheckpointError, match=r"pvera_lambda_d' has shape \(9,\); its first size must be even"):
        adaptc.swap(program, odd)
    without = copy_adapter_with(tmp_path / "a", tmp_path / "c", lambda t: t.pop("base_model.pvera_A"))
    with pytest.raises(CheckpointError, match=r"pvera_A.* is missing"):
        adaptc.swap(program, without)
    assert torch.equal(program(inputs(2)), before)


@pytest.mark.parametrize("init", [True, False])
def test_first_values_are_peft_s(tmp_path, init):
    options = {"r": 7, "target_modules": ["k"], "init_weights": init, "d_initial": 0.25}
    peft_chain(peft_config("PveraConfig", **options), tmp_path / "a", torch.float32, random_values=False, seed=1)
    generator = torch.Generator().manual_seed(1)
    adaptc.save_adapter(compile_chain(PveraConfig(**options), torch.float32, generator=generator), tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"pvera_dropout": 1.0}, r"pvera_dropout must lie in \[0, 1\)"),
        ({"projection_prng_key": 1.5}, "projection_prng_key must be an integer"),
        ({"sample_at_inference": 1}, "sample_at_inference must be True or False"),
        ({"bias": "some"}, "'pvera_only'"),
    ],
)
def test_bad_values_are_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        PveraConfig(**options)


def test_config_has_peft_s_fields_and_defaults():
    assert as_stored(PveraConfig(target_modules=["q"])) == as_stored(peft_config("PveraConfig", target_modules=["q"]))
