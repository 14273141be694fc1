"""PSOFT beyond the table of methods: PEFT's outputs, gradients and files in float32, first values, and illegal options.

PEFT refuses weights in float64, so the generic checks have no oracle for it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc.errors import AdaptcWarning, ConfigError, TargetError
from adaptc.methods.orthogonal.psoft import Psoft
from adaptc.passes.graph.ops import Op
from tests.support.chain import (
    chain,
    compile_chain,
    inputs,
    load_peft_chain,
    peft_chain,
    peft_config,
    slots_by_file_key,
    tensor_files_are_equal,
)
from tests.support.layer_table import LAYERS
from tests.support.spectral import differing_fields

F32 = torch.float32
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pissa": {"ab_svd_init": "pissa_init", "psoft_mag_a": False},
    "lowrank": {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 2, "random_seed": 7},
    "series": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3},
    "short series": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 2, "psoft_mag_b": False},
    "limit": {"use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
    "free": {"psoft_orth": False},
}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def trained_by_peft(path: Path, **options: Any) -> Any:
    """PEFT's model of the chain with a random adapter, saved to ``path``."""
    model = peft_chain(peft_config("PsoftConfig", r=5, **options), path, F32, random_values=False)
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.3)
    model.save_pretrained(str(path))
    return model


@pytest.mark.few(3)
@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_gradients_merges_and_files_are_peft_s(name, tmp_path):
    model, x = trained_by_peft(tmp_path / "a", **VARIANTS[name]), inputs(4, F32)
    program = compile_chain(tmp_path / "a", F32, training=True)
    expected = model(x)
    close(program(x), expected)
    assert not torch.allclose(expected, chain(F32)(x), rtol=1e-2, atol=1e-2)
    module = program.module().eval()
    module(x).square().sum().backward()
    expected.square().sum().backward()
    grads = {n.removeprefix("base_model.model.").replace(".default", ""): p.grad for n, p in model.named_parameters()}
    found = {k: t.grad for k, t in slots_by_file_key(program).items() if t.grad is not None}
    assert set(found) == {k for k, g in grads.items() if g is not None}
    for key, grad in found.items():
        close(grad, grads[key])
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    close(load_peft_chain(tmp_path / "b", F32)(x), program(x))
    merged, theirs = adaptc.merge(program).state_dict, model.merge_and_unload().state_dict()
    for key, value in theirs.items():
        close(merged[key], value)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_first_values_are_peft_s(tmp_path, orthogonal):
    options = {"r": 5, "target_modules": ["q", "k"], "init_weights": False, "psoft_orth": orthogonal}
    peft_chain(peft_config("PsoftConfig", **options), tmp_path / "a", F32, random_values=False, seed=1)
    generator = torch.Generator().manual_seed(1)
    adaptc.save_adapter(compile_chain(adaptc.PsoftConfig(**options), F32, generator=generator), tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")


def test_a_low_rank_svd_leaves_the_global_generator_as_it_was():
    method, op = Psoft(r=3, niter=2), Op("linear", (7, 5), torch.ops.aten.linear.default)
    W = torch.randn(7, 5)
    before = torch.get_rng_state()
    first = method.frozen_factors(op, W, F32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert all(torch.equal(t, first[n]) for n, t in method.frozen_factors(op, W, F32).items())


def test_alpha_has_no_effect_in_peft_neither(tmp_path):
    with pytest.warns(AdaptcWarning, match="psoft_alpha=7 has no effect since the frozen factors are divided"):
        config = adaptc.PsoftConfig(r=5, psoft_alpha=7, target_modules=["q", "k", "v"])
    model = trained_by_peft(tmp_path / "a", psoft_alpha=7)
    program = compile_chain(config, F32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adaptc.swap(program, tmp_path / "a")
    close(program(inputs(3, F32)), model(inputs(3, F32)))


def test_a_rotation_keeps_lengths_and_an_orthogonal_a():
    method, op = Psoft(r=4, has_a=False, has_b=False), Op("linear", (7, 5), torch.ops.aten.linear.default)
    torch.manual_seed(0)
    W = torch.randn(7, 5, dtype=torch.float64)
    values = method.init(op, W, torch.float64).slots
    A, B = values["psoft_A"], values["psoft_B"]
    torch.testing.assert_close(A @ A.T, torch.eye(4).double(), rtol=0, atol=1e-6)
    new = method.weight(op, W, {**values, "psoft_R.weight": torch.randn(6).double()}, torch.tensor(1.0).double())
    rest = W - B @ A
    torch.testing.assert_close((new - rest) @ A.T @ A, new - rest, rtol=0, atol=1e-6)
    # The rotated rows of A are orthogonal, so that each column of B keeps its length.
    torch.testing.assert_close((new - rest).norm(), B.norm(), rtol=1e-6, atol=0)


def test_dropout_acts_in_training_also_at_groups_of_a_convolution(tmp_path):
    for layer, target in (("linear", "layer"), ("conv2d_groups", "layer")):
        kind = LAYERS[layer]
        args = tuple(a.float() for a in kind.args((15, 21), 3))
        config = adaptc.PsoftConfig(r=4, psoft_dropout=0.5, init_weights=False, target_modules=[target])
        program = adaptc.compile(kind.model((15, 21)).float(), config, example_inputs=args, training=True)
        module = program.module()
        assert not torch.allclose(module(*args), module(*args)), layer
        module.eval()
        close(module(*args), program(*args))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"psoft_alpha": 0}, "psoft_alpha must be a positive integer, got 0"),
        ({"psoft_svd_lowrank_niter": -1}, "niter must be an integer of at least 0"),
        ({"psoft_dropout": 1.0}, r"psoft_dropout must lie in \[0, 1\)"),
        ({"ab_svd_init": "lora"}, "ab_svd_init must be"),
        ({"psoft_svd": "quick"}, "psoft_svd must be"),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms must be 2 or more"),
        ({"use_cayley_neumann": True, "cayley_neumann_eps": 1.0}, "cayley_neumann_eps must lie between 0 and 1"),
    ],
    ids=str,
)
def test_illegal_options_are_named(options, match):
    with pytest.raises(ConfigError, match=f"PsoftConfig.*{match}"):
        adaptc.PsoftConfig(**options)


@pytest.mark.parametrize(
    "options", [{"random_seed": 3}, {"cayley_neumann_eps": 0.5}, {"use_cayley_neumann": True, "psoft_orth": False}]
)
def test_options_without_an_effect_are_told_of(options):
    with pytest.warns(AdaptcWarning, match=f"{next(iter(options))}=.* has no effect without"):
        adaptc.PsoftConfig(**options)


def test_weights_that_do_not_fit():
    with pytest.raises(TargetError, match=r"'k.weight'.*r=9 is more than a matrix of shape \(8, 20\) has; r=8"):
        compile_chain(adaptc.PsoftConfig(r=9, target_modules=["k"]), F32)
    model = nn.Sequential(nn.Linear(3, 5))
    model[0].weight.data[1, 1] = torch.nan
    with pytest.raises(ConfigError, match=r"decomposes the weight, and this one of shape .* is not finite"):
        adaptc.compile(model, adaptc.PsoftConfig(r=2, target_modules=["0"]), example_inputs=torch.ones(2, 3))


def test_fields_and_defaults_are_pefts():
    assert differing_fields(peft.PsoftConfig(), adaptc.PsoftConfig()) == {}
