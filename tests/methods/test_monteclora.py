"""MonteCLoRA beyond the table of methods: PEFT's samples of A, and its loss, where both draw the same numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, ConfigError, LoraConfig, MontecloraConfig, TargetError
from adaptc.errors import AdaptcWarning
from adaptc.methods.lora_family.variants.monteclora import CHI_SQUARED, STD_PRIOR
from tests.support.chain import FILE, as_stored, compile_chain, inputs, load_peft_chain, peft_chain, peft_config
from tests.support.oracle import assert_differs
from tests.support.repeated_linear import trained_tensors
from tests.support.subject import loss

R, SAMPLES = 3, 5
#: PEFT takes roots in float32
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def sampled(**options: Any) -> Any:
    """PEFT's config with noise that is large enough to be seen."""
    own = {"num_samples": SAMPLES, "sample_scaler": 0.3, "kl_loss_weight": 0.01, "dirichlet_prior": 0.4}
    more = options.pop("others", {})
    config = peft.MontecloraConfig(**{**own, **options})
    return peft_config("LoraConfig", **{"r": R, "lora_alpha": 5, "monteclora_config": config, **more})


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "")


def give_draws(theirs: nn.Module, seed: int) -> None:
    """Let PEFT's next call use the numbers that a program draws from the global generator after this seed."""
    torch.manual_seed(seed)
    for module in theirs.modules():
        if "lora_monteclora_sampler" in dict(module.named_children()):
            own = module.lora_monteclora_sampler["default"]
            r, n, width = own.out_features, own.num_samples, own.in_features
            chi_squared = torch.randn(r, r, dtype=torch.float64).square().sum(-1)
            normal = torch.randn(n, dtype=torch.float64)
            samples = torch.randn(n, r, width, dtype=torch.float64).mT
            own.sampler.buffer = [{"z_mvn": samples, "z_wishart": torch.diag(chi_squared), "z_dirichlet": normal}]
            own.sampler.index, own.sampler.buffer_size = 0, 1


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {plain_name(n): t for n, t in (*module.named_parameters(), *module.named_buffers()) if "lora_" in n}


def step(module: nn.Module, x: Tensor, term: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Take one step of gradient descent; return the output, the term of the loss, and the gradients."""
    module.zero_grad()
    out = module(x)
    added = term()
    (loss(out) * 0.01 + added).backward()
    grads = {plain_name(n): p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p -= 0.01 * p.grad
    return out.detach(), added.detach(), grads


@pytest.mark.parametrize("use_entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_training_the_loss_and_files_are_pefts(use_entropy, bias, tmp_path):
    theirs = peft_chain(sampled(use_entropy=use_entropy, others={"lora_bias": bias}), tmp_path / "a").train()
    program = compile_chain(tmp_path / "a", training=True)
    module = program.module()
    for seed in (4, 7, 3):
        x = inputs(seed)
        give_draws(theirs, seed)
        expected = step(theirs, x, theirs.base_model._get_monteclora_loss)
        torch.manual_seed(seed)
        found = step(module, x, lambda: adaptc.training.monteclora_loss(program))
        torch.testing.assert_close(found[:2], expected[:2], **TOLERANCE)
        assert found[2].keys() == expected[2].keys()
        assert len(found[2]) == (15 if bias else 12)
        for name, grad in expected[2].items():
            torch.testing.assert_close(found[2][name], grad, **TOLERANCE)
            assert grad.any()
    own = tensors(module)
    for name, value in tensors(theirs).items():
        torch.testing.assert_close(own[name], value.detach(), **TOLERANCE)
    ours = adaptc.save_adapter(program, tmp_path / "b")
    one, other = (load_file(p / FILE) for p in (ours, tmp_path / "a"))
    assert one.keys() == other.keys()
    assert sum("lora_monteclora_sampler" in k for k in one) == 12
    expected_out = load_peft_chain(ours)(inputs(6))
    torch.testing.assert_close(expected_out, module.eval()(inputs(6)))
    torch.testing.assert_close(compile_chain(ours)(inputs(6)), expected_out)


def test_the_divergence_of_the_weights_has_pefts_sign(tmp_path):
    """Between two Dirichlet distributions it has the other one before the gamma functions."""
    config = sampled(kl_loss_weight=1.0, others={"target_modules": ["q"]})
    theirs = peft_chain(config, tmp_path / "a").train()
    program = compile_chain(tmp_path / "a", training=True)
    own = theirs.base_model.model.q.lora_monteclora_sampler["default"]
    alpha = own.expert_weights_prior.detach().exp()
    prior = torch.full_like(alpha, 0.4)
    right = torch.distributions.kl_divergence(*(torch.distributions.Dirichlet(a) for a in (alpha, prior)))
    turned = right + 2 * (torch.lgamma(alpha) - torch.lgamma(prior)).sum()
    torch.testing.assert_close(own.dirichlet_kl(alpha), turned, **TOLERANCE)
    assert abs(float(right - turned)) > 0.1
    others = own.wishart_kl(torch.diag(own.std_prior.exp())) + own.multivariate_kl(own.gaussian_var_prior)
    found = adaptc.training.monteclora_loss(program)
    torch.testing.assert_close(found, (turned + others).detach(), check_dtype=False, **TOLERANCE)


@pytest.mark.long
def test_the_loss_before_the_first_call_is_that_of_the_file(tmp_path):
    theirs = peft_chain(sampled(use_entropy=True), tmp_path / "a").train()
    give_draws(theirs, 5)
    theirs(inputs(4))
    theirs.save_pretrained(str(tmp_path / "b"))
    program = compile_chain(tmp_path / "b", training=True)
    expected = theirs.base_model._get_monteclora_loss()
    torch.testing.assert_close(adaptc.training.monteclora_loss(program), expected, **TOLERANCE)


def test_inference_is_loras_and_writes_nothing(tmp_path):
    theirs = peft_chain(sampled(), tmp_path / "a")
    program = compile_chain(tmp_path / "a", training=True)
    module, x = program.module(), inputs(4)
    expected = theirs(x)
    before = {n: t.clone() for n, t in tensors(module).items()}
    assert_differs(module(x), expected)
    assert_differs(module(x), module(x))
    drawn = {n: t.clone() for n, t in tensors(module).items()}
    changed = {n for n, t in drawn.items() if not torch.equal(t, before[n])}
    assert {n for n in changed if "monteclora_sampler" in n} == {
        f"{at}.lora_monteclora_sampler.{n}" for at in "qkv" for n in ("gaussian_var_prior", "expert_weights")
    }
    module.eval()
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(program(x), expected)
    assert all(torch.equal(t, drawn[n]) for n, t in tensors(module).items())
    merged = adaptc.merge(program)
    torch.testing.assert_close(merged(x), expected)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    torch.testing.assert_close(loaded(x), expected)
    assert_differs(loaded.module().train()(x), expected)


@pytest.mark.long
def test_variances_are_drawn_as_pefts(tmp_path):
    """PEFT draws Wishart matrices and uses their diagonals, which are chi-squared with r degrees of freedom."""
    theirs = peft_chain(sampled(others={"target_modules": ["q"]}), tmp_path / "a")
    own = theirs.base_model.model.q.lora_monteclora_sampler["default"]
    program = compile_chain(tmp_path / "a", training=True)
    module, count, found = program.module(), 400, list[Tensor]()
    (site,) = program.adaptation.attachments
    x = inputs(1)
    for _ in range(count):
        module(x)
        found.append(program.binding.values[site.slots[CHI_SQUARED]].clone())
    expected = [own.sampler.wish_sampler._bartlett_sampling(torch.Size()).diagonal() for _ in range(count)]
    for draws in (torch.stack(found), torch.stack(expected)):
        assert abs(float(draws.mean()) - R) < 5 * math.sqrt(2 * R / draws.numel())
        assert abs(float(draws.var()) - 2 * R) < 1.5
        assert abs(float(torch.corrcoef(draws.double().T)[0, 1])) < 0.25


def test_first_values_are_pefts(tmp_path):
    config = sampled(others={"target_modules": ["k"]})
    theirs = peft_chain(config, tmp_path / "a", random_values=False, seed=11)
    program = compile_chain(
        LoraConfig.from_dict(as_stored(config) | {"monteclora_config": vars(config.monteclora_config)}),
        generator=torch.Generator().manual_seed(11),
        training=True,
    )
    found = tensors(program.module())
    for name, value in tensors(theirs).items():
        assert torch.equal(found[name], value), name


@pytest.mark.long
def test_adapters_of_other_sizes_are_swapped_and_train(tmp_path):
    peft_chain(sampled(), tmp_path / "a")
    other = peft_chain(sampled(num_samples=2, others={"r": 4}), tmp_path / "b").train()
    program = compile_chain(tmp_path / "a", training=True)
    adaptc.swap(program, tmp_path / "b")
    give_draws(other, 8)
    module, x = program.module(), inputs(4)
    expected = step(other, x, other.base_model._get_monteclora_loss)
    torch.manual_seed(8)
    found = step(module, x, lambda: adaptc.training.monteclora_loss(program))
    torch.testing.assert_close(found[:2], expected[:2], **TOLERANCE)
    for name, grad in expected[2].items():
        torch.testing.assert_close(found[2][name], grad, **TOLERANCE)
    peft_chain(sampled(sample_scaler=0.7), tmp_path / "c")
    with pytest.raises(AdaptcError, match="sample_scaler"):
        adaptc.swap(program, tmp_path / "c")
    adaptc.swap(compile_chain(tmp_path / "a"), tmp_path / "c")


@pytest.mark.long
def test_gradient_checkpointing_draws_the_same():
    options = {"monteclora_config": {"num_samples": SAMPLES, "sample_scaler": 0.3}}
    plain, again = (trained_tensors(on, 6, **options) for on in (False, True))
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert torch.equal(again[name], value), name


@pytest.mark.long
def test_inference_stays_finite_where_the_variance_overflows(tmp_path):
    peft_chain(sampled(), tmp_path / "a")
    program = compile_chain(tmp_path / "a", training=True)
    module, x = program.module(), inputs(4)
    expected = program(x)
    with torch.no_grad():
        for a in program.adaptation.attachments:
            program.binding.values[a.slots[STD_PRIOR]].fill_(1e4)
    assert not module(x).isfinite().all()
    torch.testing.assert_close(module.eval()(x), expected)


def test_the_callback_adds_the_loss_in_training(tmp_path):
    peft_chain(sampled(), tmp_path / "a")
    program = compile_chain(tmp_path / "a", training=True)
    module, callback = program.module(), adaptc.training.trainer_callback(program)
    arguments = SimpleNamespace(should_save=False, predict_with_generate=False)
    callback.on_train_begin(arguments, SimpleNamespace(global_step=0, max_steps=3), None, model=module)
    module.train()
    module(inputs(4))
    torch.testing.assert_close(module.extra_loss(), adaptc.training.monteclora_loss(program))
    module.eval()
    assert module.extra_loss() == 0


def test_the_loss_is_refused_where_there_is_none(tmp_path):
    peft_chain(sampled(), tmp_path / "a")
    with pytest.raises(AdaptcError, match=r"compiled for inference, and draws nothing"):
        adaptc.training.monteclora_loss(compile_chain(tmp_path / "a"))
    with pytest.raises(AdaptcError, match=r"no adapter of MonteCLoRA: its LoraConfig has no monteclora_config"):
        adaptc.training.monteclora_loss(compile_chain(LoraConfig(target_modules=["q"]), training=True))


def test_fields_and_defaults_are_pefts():
    assert vars(MontecloraConfig()) == vars(peft.MontecloraConfig())
    given: list[Any] = [peft.MontecloraConfig(num_samples=3), MontecloraConfig(3), {"num_samples": 3}]
    for value in given:
        config = LoraConfig(monteclora_config=value)
        assert config.monteclora_config == MontecloraConfig(3)
        assert config.to_dict()["monteclora_config"] == vars(peft.MontecloraConfig(num_samples=3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"monteclora_config": {"num_samples": 0}}, r"MontecloraConfig\.num_samples must be a positive integer, got 0"),
        ({"monteclora_config": {"buffer_size": 0}}, r"MontecloraConfig\.buffer_size must be a positive integer"),
        ({"monteclora_config": {"dirichlet_prior": 0.0}}, r"MontecloraConfig\.dirichlet_prior must be positive"),
        ({"monteclora_config": {"samples": 4}}, r"MontecloraConfig has no field 'samples'"),
        ({"monteclora_config": "yes"}, r"monteclora_config must be a MontecloraConfig, or a dict"),
        ({"monteclora_config": {}, "velora_config": {}}, r"velora_config and monteclora_config are variants of LoRA"),
        ({"monteclora_config": {}, "ensure_weight_tying": True}, r"no meaning with monteclora_config"),
    ],
)
def test_illegal_options_are_named(options, match):
    with pytest.raises(ConfigError, match=match):
        LoraConfig(**options)


def test_a_buffer_size_is_told_of():
    with pytest.warns(AdaptcWarning, match=r"MontecloraConfig: buffer_size=9 has no effect"):
        MontecloraConfig(buffer_size=9)


def test_other_layers_are_refused_by_name():
    config = LoraConfig(target_modules=["0"], monteclora_config={})
    for layer, x in ((nn.Embedding(9, 5), torch.tensor([[1, 2]])), (nn.Conv1d(3, 5, 2), torch.randn(2, 3, 7))):
        with pytest.raises(TargetError, match=r"MonteCLoRA acts on the features.*monteclora_config=None"):
            adaptc.compile(nn.Sequential(layer), config, example_inputs=x)
