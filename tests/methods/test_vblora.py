"""VB-LoRA beyond the table of methods: the bank all sites share and train, and files with the best weights only."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import adaptc
from adaptc import CheckpointError, ConfigError, TargetError, VBLoRAConfig
from adaptc.methods.shared_factors.vblora import VBLoRA
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

SIZES = {"r": 5, "num_vectors": 7, "vector_length": 4, "topk": 3}
INDICES = "base_model.model.k.vblora_logits_A_topk_indices"
WEIGHTS = "base_model.model.k.vblora_logits_A_topk_weights"


def test_layers_of_different_sizes_share_a_bank(tmp_path):
    model = peft_chain(peft_config("VBLoRAConfig", **SIZES), tmp_path / "a")
    program = compile_chain(tmp_path / "a")
    torch.testing.assert_close(program(inputs(5)), model(inputs(5)), rtol=1e-10, atol=1e-10)
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    torch.testing.assert_close(load_peft_chain(tmp_path / "b")(inputs(5)), model(inputs(5)))


def test_the_bank_is_trained_by_all_its_sites(tmp_path):
    model = peft_chain(peft_config("VBLoRAConfig", **SIZES), tmp_path)
    program, x = compile_chain(tmp_path, training=True), inputs(5)
    model(x).square().sum().backward()
    program.module()(x).square().sum().backward()
    bank = slots_by_file_key(program)["vblora_vector_bank"]
    expected = model.base_model.vblora_vector_bank["default"].grad
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(bank.grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.long
def test_swaps_to_other_ranks_and_sites(tmp_path):
    configs = [
        peft_config("VBLoRAConfig", **SIZES),
        peft_config("VBLoRAConfig", **{**SIZES, "r": 2, "target_modules": ["k"]}),
        peft_config("VBLoRAConfig", **{**SIZES, "r": 3, "num_vectors": 9, "target_modules": ["q", "v"]}),
    ]
    models = [peft_chain(c, tmp_path / str(i)) for i, c in enumerate(configs)]
    program = compile_chain([tmp_path / str(i) for i in range(3)])
    for i in (1, 0, 2, 1, 2):
        adaptc.swap(program, tmp_path / str(i))
        program.validate()
        torch.testing.assert_close(program(inputs(2)), models[i](inputs(2)), rtol=1e-10, atol=1e-10)
        adaptc.save_adapter(program, tmp_path / f"again{i}")
        assert tensor_files_are_equal(tmp_path / str(i), tmp_path / f"again{i}")


def test_padded_ranks_count_for_nothing():
    method, op = VBLoRA(r=2, vectors=7, length=2, topk=2), Op("linear", (6, 4), torch.ops.aten.linear.default, ())
    assert find_paddings(method, op, "apply")
    assert find_paddings(method, op, "weight")


# -- the best weights alone -------------------------------------------------------------------------------------------


def topk_file(path, **options):
    config = peft_config("VBLoRAConfig", **{**SIZES, "save_only_topk_weights": True, **options})
    return peft_chain(config, path, torch.float32)


@pytest.mark.parametrize("topk", [1, 3, 7])
def test_files_of_the_best_weights(tmp_path, topk):
    model, x = topk_file(tmp_path / "a", topk=topk), inputs(5, torch.float32)
    program = compile_chain(tmp_path / "a", torch.float32)
    torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adaptc.merge(program)(x), model(x), rtol=1e-5, atol=1e-5)
    adaptc.save_adapter(program, tmp_path / "b")
    given, found = load_file(tmp_path / "a" / FILE), load_file(tmp_path / "b" / FILE)
    assert given.keys() == found.keys()
    assert not any(k.endswith(("logits_A", "logits_B")) for k in found)
    for key, t in given.items():
        torch.testing.assert_close(found[key], t, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(load_peft_chain(tmp_path / "b", torch.float32)(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_vector_of_weight_zero_is_no_nan(tmp_path):
    """The last weight is what the others leave. PEFT takes its logarithm even where rounding left less than nothing."""
    topk_file(tmp_path / "a")
    file = copy_adapter_with(tmp_path / "a", tmp_path / "b", lambda t: t[WEIGHTS].copy_(torch.tensor([0.6, 0.4000001])))
    assert compile_chain(file, torch.float32)(inputs(5, torch.float32)).isfinite().all()


@pytest.mark.parametrize(("vectors", "dtype"), [(255, torch.uint8), (256, torch.int16), (2**15, torch.int32)])
def test_indices_have_peft_s_dtype(vectors, dtype):
    method, op = VBLoRA(r=2, vectors=vectors, length=2, only_topk=True), Op("linear", (6, 4))
    values = {n: torch.randn(s.shape) for n, s in method.slots(op).items()}
    written = method.files.write(op, values)
    assert written["vblora_logits_B_topk_indices"].dtype == dtype
    read = method.files.read(op, written)
    W = torch.randn(6, 4)
    torch.testing.assert_close(method.weight(op, W, {**values, **read}, None), method.weight(op, W, values, None))


def test_the_best_weights_cannot_be_trained(tmp_path):
    topk_file(tmp_path)
    with pytest.raises(CheckpointError, match=r"save_only_topk_weights=True.* cannot be trained"):
        compile_chain(tmp_path, torch.float32, training=True)
    config = VBLoRAConfig(**SIZES, target_modules=TARGETS, save_only_topk_weights=True)
    adaptc.save_adapter(compile_chain(config, training=True), tmp_path / "b")
    assert INDICES in load_file(tmp_path / "b" / FILE)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(WEIGHTS), "vblora_logits_A_topk_weights' is missing"),
        (lambda t: t[INDICES].fill_(7), r"indices from 7 to 7, and the bank has 7 vectors"),
        (lambda t: t.update({INDICES: t[INDICES][..., :2].clone()}), "their last sizes must be 3 and 2"),
        (lambda t: t.pop("base_model.vblora_vector_bank"), "'vblora_vector_bank' is missing"),
    ],
)
def test_broken_files_are_refused(tmp_path, change, match):
    topk_file(tmp_path / "a")
    program = compile_chain(tmp_path / "a", torch.float32)
    before = program(inputs(2, torch.float32))
    with pytest.raises(CheckpointError, match=match):
        adaptc.swap(program, copy_adapter_with(tmp_path / "a", tmp_path / "b", change))
    assert torch.equal(program(inputs(2, torch.float32)), before)


# -- configs ----------------------------------------------------------------------------------------------------------


def test_first_values_are_peft_s(tmp_path):
    options = {**SIZES, "target_modules": ["k"], "init_logits_std": 0.3, "init_vector_bank_bound": 0.5}
    peft_chain(peft_config("VBLoRAConfig", **options), tmp_path / "a", torch.float32, random_values=False, seed=1)
    generator = torch.Generator().manual_seed(1)
    adaptc.save_adapter(compile_chain(VBLoRAConfig(**options), torch.float32, generator=generator), tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")


def test_dropout_acts_on_the_input_and_in_training_only(tmp_path):
    model = peft_chain(peft_config("VBLoRAConfig", **SIZES, vblora_dropout=0.5), tmp_path)
    program, x = compile_chain(tmp_path, training=True), inputs(4)
    torch.testing.assert_close(program(x), model(x), rtol=1e-10, atol=1e-10)
    module, model = program.module(), model.train()
    torch.manual_seed(0)
    first = module(x)
    torch.manual_seed(0)
    torch.testing.assert_close(first, model(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(first, program(x))


def test_lengths_that_do_not_divide_are_refused_with_those_that_do():
    config = VBLoRAConfig(vector_length=5, target_modules=["0"])
    with pytest.raises(TargetError, match=r"24 outputs and 18 inputs; vector_length=5 .* \[1, 2, 3, 6\] are nearest"):
        adaptc.compile(nn.Sequential(nn.Linear(18, 24)), config, example_inputs=torch.randn(2, 18))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"topk": 0}, "topk must be a positive integer"),
        ({"vector_length": 2.0}, "vector_length must be an integer"),
        ({"topk": 9, "num_vectors": 8}, "topk=9 vectors cannot be chosen out of num_vectors=8"),
        ({"vblora_dropout": 1.0}, r"vblora_dropout must lie in \[0, 1\)"),
        ({"bias": "some"}, "'vblora_only'"),
    ],
)
def test_bad_values_are_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        VBLoRAConfig(**options)


def test_config_has_peft_s_fields_and_defaults():
    assert as_stored(VBLoRAConfig(target_modules=TARGETS)) == as_stored(peft.VBLoRAConfig(target_modules=TARGETS))
