"""OSF beyond the table of methods: projected gradients, first values, ranks, several adapters, illegal options."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcWarning, ConfigError, TargetError
from adaptc.methods.orthogonal.osf import Osf
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

VARIANTS: dict[str, dict[str, Any]] = {
    "half": {},
    "integer": {"effective_rank": 5},
    "share": {"effective_rank": 0.3},
    "float above one": {"effective_rank": 5.9},
    "pattern": {"effective_rank": 2, "rank_pattern": {"k": 7, "q|v": 0.9, "v": 1}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_projected_gradients_and_files_are_peft_s(name, tmp_path):
    options = VARIANTS[name]
    model, x = peft_chain(peft_config("OSFConfig", **options), tmp_path / "a"), inputs(4)
    program = compile_chain(tmp_path / "a", training=True)
    torch.testing.assert_close(program(x), model(x), rtol=1e-9, atol=1e-9)
    module = program.module()
    module(x).square().sum().backward()
    model(x).square().sum().backward()
    grads = {n.removeprefix("base_model.model.").replace(".default", ""): p.grad for n, p in model.named_parameters()}
    found = slots_by_file_key(program)
    assert {k for k, t in found.items() if t.grad is not None} == {k for k, g in grads.items() if g is not None}
    for key, t in found.items():
        if t.grad is not None:
            scale = float(t.grad.abs().max())
            torch.testing.assert_close(t.grad / scale, grads[key] / scale, rtol=1e-9, atol=1e-9)
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    torch.testing.assert_close(load_peft_chain(tmp_path / "b")(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_values_are_peft_s(dtype, init, tmp_path):
    options = {"effective_rank": 5, "target_modules": ["q", "k"], "init_weights": init}
    peft_chain(peft_config("OSFConfig", **options), tmp_path / "a", dtype, random_values=False, seed=1)
    generator = torch.Generator().manual_seed(1)
    adaptc.save_adapter(compile_chain(adaptc.OSFConfig(**options), dtype, generator=generator), tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("target", ["q", "k", "square"])
@pytest.mark.parametrize("form", ["apply", "weight"])
def test_training_leaves_the_largest_singular_directions_alone(target, form):
    """Every gradient of U is at right angles to the largest left singular vectors, and of V to the right ones."""
    torch.manual_seed(2)
    net = chain() if target != "square" else nn.Sequential()
    if target == "square":
        net.add_module("square", nn.Linear(12, 12).double())
    config = adaptc.OSFConfig(effective_rank=4, target_modules=[target])
    program = adaptc.compile(net, config, example_inputs=inputs(3), training=True, form=form)
    program.module()(inputs(5)).square().sum().backward()
    found = slots_by_file_key(program)
    left, _, right = torch.linalg.svd(net.get_submodule(target).weight.detach(), full_matrices=False)
    for name, along in (("U_low", left[:, :4].T), ("V_low", right[:4].T)):
        grad = found[f"{target}.osf_svd_params.{name}"].grad
        grad = grad if name == "U_low" else grad.T
        overlap = along @ grad if name == "U_low" else along.T @ grad
        assert float(overlap.abs().max()) < 1e-5 * float(grad.abs().max())
        assert float(grad.abs().max()) > 1e-3
    assert found[f"{target}.osf_svd_params.S_low"].grad.abs().max() > 1e-3


def test_a_program_that_does_not_train_has_no_projections():
    config = adaptc.OSFConfig(target_modules=["q", "k"])
    counts = [
        sum(n.op == "call_function" for n in compile_chain(config, training=t).graph.nodes) for t in (False, True)
    ]
    assert counts[0] < counts[1]


def test_a_fresh_adapter_changes_nothing_also_in_half_precision():
    for dtype in (torch.float64, torch.bfloat16):
        program = compile_chain(adaptc.OSFConfig(target_modules=["q", "v"]), dtype, form="weight")
        assert torch.equal(program(inputs(3, dtype)), adaptc.unload(program)(inputs(3, dtype)))


def test_several_adapters_all_act(tmp_path):
    """PEFT runs the first of its active adapters, and merges them all."""
    models = [peft_chain(peft_config("OSFConfig", effective_rank=k), tmp_path / str(k)) for k in (3, 6)]
    program = adaptc.compile(chain(), {"a": tmp_path / "3", "b": tmp_path / "6"}, example_inputs=inputs(3))
    state = chain().state_dict()
    for model in models:
        merged = model.merge_and_unload().state_dict()
        state = {k: v + merged[k] - chain().state_dict()[k] for k, v in state.items()}
    expected = torch.func.functional_call(chain(), state, inputs(3))
    torch.testing.assert_close(program(inputs(3)), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adaptc.merge(program)(inputs(3)), expected, rtol=1e-9, atol=1e-9)


def test_a_model_without_a_table_is_adapted_at_all_linear_layers(tmp_path):
    program = compile_chain(adaptc.OSFConfig())
    assert {a.module for a in program.adaptation.attachments} == {"q", "k", "v", "o"}
    model = peft.get_peft_model(chain(), peft.OSFConfig())
    assert {n for n, m in model.base_model.model.named_children() if hasattr(m, "osf_svd_params")} == {*"qkvo"}


@pytest.mark.parametrize(
    ("kept", "message"),
    [(8, "effective_rank=8 keeps 8 of the 8"), (1.0, "effective_rank=1.0 keeps 8 of the 8"), (0.1, "keeps 0 of the 8")],
)
def test_ranks_that_leave_nothing_are_refused(kept, message):
    with pytest.raises(TargetError, match=rf"'k.weight'.*{message}.*1 to 7 fit"):
        compile_chain(adaptc.OSFConfig(effective_rank=kept, target_modules=["k"]))
    with pytest.raises(TargetError, match="none fits: leave this layer out"):
        Osf().slots(Op("weight", (1, 9)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"effective_rank": 0}, "effective_rank must be a positive number"),
        ({"effective_rank": -0.5}, "effective_rank must be a positive number"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be a positive number"),
        ({"effective_rank": "x"}, "effective_rank must be"),
    ],
    ids=str,
)
def test_illegal_options_are_named(options, match):
    with pytest.raises(ConfigError, match=f"OSFConfig.{match}"):
        adaptc.OSFConfig(**options)


def test_patterns_are_checked():
    with pytest.raises(TargetError, match=r"rank_pattern: 'z' matches no adapted module"):
        compile_chain(adaptc.OSFConfig(target_modules=["q"], rank_pattern={"z": 3}))
    with pytest.raises(ConfigError, match="is not a valid regular expression"):
        compile_chain(adaptc.OSFConfig(target_modules=["q"], rank_pattern={"(": 3}))
    with pytest.warns(AdaptcWarning, match="target_svd_config=.* has no effect in PEFT neither"):
        adaptc.OSFConfig(target_svd_config={"q.weight": 3})


def test_fields_and_defaults_are_pefts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert differing_fields(peft.OSFConfig(), adaptc.OSFConfig()) == {}


@pytest.mark.parametrize("target", ["q", "k"])
def test_adapters_that_are_swapped_in_train_with_projections_too(target, tmp_path):
    """The slot that the projection reads belongs to the program, and follows the weight for every adapter."""
    config = adaptc.OSFConfig(effective_rank=4, target_modules=[target], init_weights=False)
    program, source = compile_chain(config, training=True), compile_chain(config.replace(effective_rank=5))
    adaptc.swap(program, adaptc.save_adapter(source, tmp_path))
    vectors = [t for k, t in slots_by_file_key(program).items() if "osf_vectors" in k]
    assert [bool(t.any()) for t in vectors] == [True]
    assert not [k for k in slots_by_file_key(source) if "osf_vectors" in k]
    program.module()(inputs(5)).square().sum().backward()
    grad = slots_by_file_key(program)[f"{target}.osf_svd_params.U_low"].grad
    left = torch.linalg.svd(chain().get_submodule(target).weight.detach(), full_matrices=False).U[:, :5]
    assert float((left.T @ grad).abs().max()) < 1e-5 * float(grad.abs().max())


def test_experts_train_with_projections_too():
    torch.manual_seed(0)
    net = LAYERS["experts"].model((5, 7)).double()
    config = adaptc.OSFConfig(effective_rank=2, target_parameters=["layer.matrices"], init_weights=False)
    x = torch.randn(3, 5).double()
    program = adaptc.compile(net, config, example_inputs=x, training=True)
    program.module()(x).square().sum().backward()
    grads = slots_by_file_key(program)["layer.osf_svd_params.U_low"].grad
    left = torch.linalg.svd(net.layer.matrices.detach(), full_matrices=False).U[..., :2]
    assert float((left.mT @ grads).abs().max()) < 1e-5 * float(grads.abs().max())
