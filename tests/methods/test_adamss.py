"""AdaMSS beyond the table of methods: PEFT's outputs, gradients, files and first values; scikit-learn's clusters."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import adaptc
from adaptc.errors import AdaptcError, AdaptcWarning, CheckpointError, ConfigError
from tests.support.chain import (
    FILE,
    TARGETS,
    Chain,
    chain,
    compile_chain,
    copy_adapter_with,
    inputs,
    load_peft_chain,
    peft_chain,
    peft_config,
    slots_by_file_key,
    tensor_files_are_equal,
)
from tests.support.spectral import differing_fields

VARIANTS: dict[str, dict[str, Any]] = {
    "one term": {"r": 6, "num_subspaces": 3},
    "more terms than rows": {"r": 7, "num_subspaces": 4, "subspace_rank": 5},
    "all vectors": {"r": 100, "num_subspaces": 2, "subspace_rank": 2, "random_seed": 5},
    "dynamic": {"r": 6, "num_subspaces": 3, "subspace_rank": 4, "use_dynamic_rank": True, "svd_threshold": 0.4},
}


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match=r"pip install 'adaptc\[clusters\]'"):
        compile_chain(adaptc.AdamssConfig(r=6, num_subspaces=3, target_modules=["q"]))


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_gradients_merges_and_files_are_peft_s(name, tmp_path):
    model, x = peft_chain(peft_config("AdamssConfig", **VARIANTS[name]), tmp_path / "a"), inputs(4)
    program = compile_chain(tmp_path / "a", training=True)
    torch.testing.assert_close(program(x), model(x), rtol=1e-9, atol=1e-9)
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    torch.testing.assert_close(load_peft_chain(tmp_path / "b")(x), model(x), rtol=1e-9, atol=1e-9)
    module = program.module()
    module(x).square().sum().backward()
    model(x).square().sum().backward()
    found = slots_by_file_key(program)
    for target in TARGETS:
        a, b = (found[f"{target}.adamss_{n}"].grad for n in "AB")
        layer = model.get_submodule(f"base_model.model.{target}")
        start = 0
        for k, (their_a, their_b) in enumerate(zip(layer.adamss_A["default"], layer.adamss_B["default"], strict=True)):
            rows, terms = their_b.shape
            torch.testing.assert_close(a[k, :terms, : their_a.shape[1]], their_a.grad, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(b[start : start + rows, :terms], their_b.grad, rtol=1e-8, atol=1e-8)
            assert not a[k, terms:].any()
            assert not b[start : start + rows, terms:].any()
            start += rows
    merged, theirs = adaptc.merge(program).state_dict, model.merge_and_unload().state_dict()
    for key, value in theirs.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.few(2)
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_first_values_are_peft_s(name, zeros, tmp_path):
    options = {**VARIANTS[name], "init_weights": "orthogonal" if zeros else None, "target_modules": ["q", "v"]}
    peft_chain(peft_config("AdamssConfig", **options), tmp_path / "a", random_values=False, seed=2)
    net, x = chain(), inputs(3)
    torch.manual_seed(2)
    program = adaptc.compile(net, adaptc.AdamssConfig(**options), example_inputs=x)
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    again = compile_chain(adaptc.AdamssConfig(**options), generator=torch.Generator().manual_seed(1))
    assert bool(torch.equal(again(inputs(2)), chain()(inputs(2)))) == zeros


def test_layers_without_a_bias_are_peft_s(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 11, bias=False), nn.Tanh(), nn.Linear(11, 9)).double()
    nn.init.zeros_(net[2].bias)
    config = peft_config("AdamssConfig", r=5, num_subspaces=2, target_modules=["0", "2"], init_weights=None)
    x = torch.randn(3, 7).double()
    expected = net(x)
    model = peft.get_peft_model(copy.deepcopy(net), config).eval()
    model.save_pretrained(str(tmp_path / "a"))
    program = adaptc.compile(net, tmp_path / "a", example_inputs=x)
    torch.testing.assert_close(program(x), model(x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, model(x), rtol=1e-4, atol=1e-4)
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")


def test_swaps_to_other_sizes(tmp_path):
    configs = [
        peft_config("AdamssConfig", r=6, num_subspaces=3, target_modules=["q", "v"]),
        peft_config("AdamssConfig", r=4, num_subspaces=5, subspace_rank=3, target_modules=["k"]),
        peft_config("AdamssConfig", r=8, num_subspaces=2, subspace_rank=2),
    ]
    models = [peft_chain(c, tmp_path / str(i)) for i, c in enumerate(configs)]
    program = compile_chain([tmp_path / str(i) for i in range(3)])
    for i in (2, 0, 1, 2, 1):
        adaptc.swap(program, tmp_path / str(i))
        program.validate()
        torch.testing.assert_close(program(inputs(2)), models[i](inputs(2)), rtol=1e-9, atol=1e-9)


def test_a_file_of_another_weight_is_refused(tmp_path):
    peft_chain(peft_config("AdamssConfig", r=6, num_subspaces=3), tmp_path / "a")
    program = compile_chain(tmp_path / "a")
    torch.manual_seed(9)
    other = Chain().double().eval()
    with pytest.raises(CheckpointError, match="the weight is not the one that the adapter was trained on"):
        adaptc.compile(other, tmp_path / "a", example_inputs=inputs(3))
    before = program(inputs(2))
    key = "base_model.model.q.adamss_{}"

    def changed(name: str, change: Any) -> Path:
        return copy_adapter_with(tmp_path / "a", tmp_path / name, change)

    for name, change, message in (
        ("b", lambda t: t.pop(key.format("A.1")), "adamss_A"),
        ("c", lambda t: t.update({key.format("newB"): torch.zeros(6, 15)}), r"adamss_newB has shape \(6, 15\)"),
        ("d", lambda t: t.update({key.format("A.0"): torch.zeros(2, 6)}), "adamss_A.0 and adamss_B.0 have shapes"),
        ("e", lambda t: t.update({key.format("B.2"): torch.zeros(31, 1)}), "rows, not 20"),
    ):
        with pytest.raises(CheckpointError, match=message):
            adaptc.swap(program, changed(name, change))
    assert torch.equal(program(inputs(2)), before)


def test_rows_that_are_equal_have_too_few_clusters():
    model = nn.Sequential(nn.Linear(3, 7, bias=False))
    nn.init.zeros_(model[0].weight)
    config = adaptc.AdamssConfig(r=1, num_subspaces=3, target_modules=["0"])
    with pytest.raises(ConfigError, match="num_subspaces=3 asks for 3: rows are equal"):
        adaptc.compile(model, config, example_inputs=torch.ones(2, 3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"num_subspaces": 0}, "num_subspaces must be a positive integer"),
        ({"subspace_rank": -1}, "subspace_rank must be a positive integer"),
        ({"init_weights": "zeros"}, "init_weights must be"),
        ({"init_weights": True}, "init_weights must be"),
        ({"use_asa": True, "mask_interval": 0}, "mask_interval must be a positive integer"),
        ({"use_asa": True, "asa_target_subspaces": 0}, "asa_target_subspaces must be a positive integer"),
        ({"use_asa": True, "init_warmup": 9, "final_warmup": 9}, " leaves no steps.*init_warmup=9 must be less than"),
        ({"use_asa": True, "asa_importance_beta": 1.0}, r"asa_importance_beta must lie in \[0, 1\)"),
        ({"use_asa": True, "asa_schedule_exponent": 0.0}, "asa_schedule_exponent must be positive"),
    ],
    ids=str,
)
def test_illegal_options_are_named(options, match):
    with pytest.raises(ConfigError, match=f"AdamssConfig.?{match}"):
        adaptc.AdamssConfig(**options)


@pytest.mark.parametrize("options", [{"mask_interval": 7}, {"svd_threshold": 0.5}], ids=str)
def test_options_without_an_effect_are_told_of(options):
    with pytest.warns(AdaptcWarning, match=f"{next(iter(options))}=.* has no effect without"):
        adaptc.AdamssConfig(**options)


def test_fields_and_defaults_are_pefts():
    assert differing_fields(peft.AdamssConfig(), adaptc.AdamssConfig()) == {}
    assert adaptc.AdamssConfig(init_weights=False).init_weights is None


ASA: dict[str, Any] = {
    "r": 6,
    "num_subspaces": 4,
    "subspace_rank": 2,
    "use_asa": True,
    "init_weights": None,
    "init_warmup": 0,
    "final_warmup": 4,
    "mask_interval": 4,
    "target_modules": TARGETS,
}


def test_clusters_leave_as_in_peft(tmp_path):
    """PEFT keeps one cluster less than it is asked for, so it is asked for one more here."""
    model = peft_chain(peft_config("AdamssConfig", **ASA, asa_target_subspaces=6), tmp_path / "a").train()
    config = adaptc.AdamssConfig(**ASA, asa_target_subspaces=5)
    program = compile_chain(config, training=True)
    adaptc.swap(program, load_file(tmp_path / "a" / FILE))
    module, allocator = program.module(), adaptc.training.SubspaceAllocator(program)
    both = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (module, model)]
    for step in range(8):
        for m, optimizer in zip((module, model), both, strict=True):
            optimizer.zero_grad()
            m(inputs(step + 1)).square().sum().backward()
            optimizer.step()
        allocator.update_and_allocate(step)
        model.base_model.update_and_allocate(step)
        assert len(allocator.active_clusters) == (12 if step < 4 else 5)
    theirs = {
        (target, k)
        for target in TARGETS
        for k, p in enumerate(model.get_submodule(f"base_model.model.{target}").adamss_A["default"])
        if p.requires_grad
    }
    assert set(allocator.active_clusters) == theirs
    model.save_pretrained(str(tmp_path / "b"))
    adaptc.save_adapter(program, tmp_path / "c")
    ours, expected = (load_file(tmp_path / d / FILE) for d in "cb")
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-8, atol=1e-8)


def test_clusters_that_left_keep_their_values_under_weight_decay_and_momentum():
    """The number falls by the schedule, and never rises."""
    config = adaptc.AdamssConfig(**{**ASA, "mask_interval": 1, "asa_target_subspaces": 3, "asa_schedule_exponent": 1.0})
    program = compile_chain(config, training=True)
    module, allocator = program.module(), adaptc.training.SubspaceAllocator(program)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    counts, kept = [], {}
    for step in range(7):
        optimizer.zero_grad()
        module(inputs(step + 1)).square().sum().backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        counts.append(len(allocator.active_clusters))
        for cluster, values in allocator._left.items():
            first = kept.setdefault(cluster, [v.clone() for v in values])
            assert all(torch.equal(a, b) for a, b in zip(first, allocator._parameters(cluster), strict=True))
    assert counts == [12, 9, 7, 5, 3, 3, 3]
    assert len(kept) == 9


def test_an_allocator_refuses_what_it_cannot_train(tmp_path):
    plain = compile_chain(adaptc.AdamssConfig(r=6, num_subspaces=3, target_modules=["q"]), training=True)
    with pytest.raises(AdaptcError, match="not ADAMSS with use_asa"):
        adaptc.training.SubspaceAllocator(plain)
    with pytest.raises(AdaptcError, match="is not trainable"):
        adaptc.training.SubspaceAllocator(compile_chain(adaptc.AdamssConfig(**ASA, inference_mode=True)))
    program = compile_chain(adaptc.AdamssConfig(**ASA), training=True)
    allocator = adaptc.training.SubspaceAllocator(program)
    with pytest.raises(AdaptcError, match="adamss_A has no gradient: call update_and_allocate after"):
        allocator.update_and_allocate(0)
    adaptc.swap(program, adaptc.save_adapter(program, tmp_path))
    with pytest.raises(AdaptcError, match="swapped since the allocator was made"):
        allocator.update_and_allocate(0)


def test_the_callback_for_trainer_calls_the_allocator():
    config = adaptc.AdamssConfig(**{**ASA, "mask_interval": 1, "final_warmup": 2, "asa_target_subspaces": 2})
    program = compile_chain(config, training=True)
    module, callback = program.module(), adaptc.training.trainer_callback(program)
    callback.on_train_begin(SimpleNamespace(should_save=False), SimpleNamespace(), None, model=module)
    for step in range(3):
        module.zero_grad()
        module(inputs(step + 1)).square().sum().backward()
        callback.on_optimizer_step(None, SimpleNamespace(global_step=step), None)
    assert len(callback.allocator.active_clusters) == 2
