"""Supertuning beyond the table of methods: PEFT's places and first values, files without places, illegal options."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import adaptc
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError, SwapError, TargetError
from adaptc.methods.sparse.supertuning import Supertuning
from adaptc.passes.graph.ops import Op
from adaptc.runtime.rank_padding import find_paddings
from tests.support.chain import (
    FILE,
    TARGETS,
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

INDICES = "base_model.model.q.supertuning_indices"
VARIANTS: dict[str, dict[str, Any]] = {
    "largest": {},
    "smallest": {"select_top": False, "sparsity": 0.5},
    "all": {"sparsity": 0.0},
    "hybrid": {"r": 3},
    "hybrid with alpha": {"r": 5, "lora_alpha": 7.0, "lora_dropout": 0.4},
}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_and_files_are_peft_s(name, saved, tmp_path):
    options = {"sparsity": 0.9, "save_precomputed_indices": saved, **VARIANTS[name]}
    model, x = peft_chain(peft_config("SupertuningConfig", **options), tmp_path / "a"), inputs(4)
    program = compile_chain(tmp_path / "a")
    torch.testing.assert_close(program(x), model(x), rtol=1e-10, atol=1e-10)
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    assert (INDICES in load_file(tmp_path / "b" / FILE)) == saved
    torch.testing.assert_close(load_peft_chain(tmp_path / "b")(x), model(x), rtol=1e-10, atol=1e-10)
    merged, theirs = adaptc.merge(program).state_dict, model.merge_and_unload().state_dict()
    for key, value in theirs.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("r", [None, 3])
def test_first_values_are_peft_s(r, zeros, tmp_path):
    options = {"sparsity": 0.8, "r": r, "init_weights": zeros, "target_modules": ["q", "k"]}
    peft_chain(peft_config("SupertuningConfig", **options), tmp_path / "a", torch.float32, random_values=False, seed=1)
    generator = torch.Generator().manual_seed(1)
    config = adaptc.SupertuningConfig(**options)
    adaptc.save_adapter(compile_chain(config, torch.float32, generator=generator), tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")


def test_swaps_to_other_counts_ranks_and_places(tmp_path):
    configs = [
        peft_config("SupertuningConfig", r=5, sparsity=0.9, target_modules=["q", "v"]),
        peft_config("SupertuningConfig", r=3, sparsity=0.5, save_precomputed_indices=False, target_modules=["k"]),
        peft_config("SupertuningConfig", r=7, sparsity=0.97, select_top=False, lora_alpha=3.0),
    ]
    models = [peft_chain(c, tmp_path / str(i)) for i, c in enumerate(configs)]
    program = compile_chain([tmp_path / str(i) for i in range(3)])
    for i in (2, 0, 1, 2, 1):
        adaptc.swap(program, tmp_path / str(i))
        program.validate()
        torch.testing.assert_close(program(inputs(2)), models[i](inputs(2)), rtol=1e-10, atol=1e-10)
    bank = program.bank({str(i): tmp_path / str(i) for i in range(3)})
    rows = bank(inputs(3), adapters=["2", "0", "1"])
    expected = torch.stack([models[k](inputs(3))[i] for i, k in enumerate((2, 0, 1))])
    torch.testing.assert_close(rows, expected, rtol=1e-8, atol=1e-8)


def test_ranks_and_counts_can_be_padded():
    op = Op("linear", (7, 5), torch.ops.aten.linear.default, ())
    assert find_paddings(Supertuning(r=2, hybrid=True, alpha=4.0, sparsity=0.5), op, "weight")
    assert find_paddings(Supertuning(sparsity=0.5), op, "weight")


def test_a_file_without_a_config_tells_counts_and_ranks(tmp_path):
    model = peft_chain(peft_config("SupertuningConfig", r=5, lora_alpha=8.0, sparsity=0.9), tmp_path / "a")
    program = compile_chain(adaptc.SupertuningConfig(target_modules=TARGETS, sparsity=0.7, r=2, lora_alpha=8.0))
    adaptc.swap(program, load_file(tmp_path / "a" / FILE))
    torch.testing.assert_close(program(inputs(2)), model(inputs(2)), rtol=1e-10, atol=1e-10)


def test_dropout_acts_on_the_low_rank_part_alone(tmp_path):
    config = peft_config("SupertuningConfig", r=4, lora_dropout=0.5, sparsity=0.9)
    model, x = peft_chain(config, tmp_path / "a").train(), inputs(4)
    program = compile_chain(tmp_path / "a", training=True)
    module = program.module()
    torch.manual_seed(0)
    first = module(x)
    assert not torch.allclose(first, module(x))
    torch.manual_seed(0)
    torch.testing.assert_close(first, model(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(program(x), model.eval()(x))
    with torch.no_grad():
        for key, t in slots_by_file_key(program).items():
            if "lora_B" in key:
                t.zero_()
    assert torch.equal(module(x), module(x))


def test_places_outside_of_the_matrix_are_refused(tmp_path):
    peft_chain(peft_config("SupertuningConfig", sparsity=0.9), tmp_path / "a")
    program = compile_chain(tmp_path / "a")
    before = program(inputs(2))
    for number in (-1, 240):
        path = copy_adapter_with(tmp_path / "a", tmp_path / f"b{number}", lambda t, n=number: t[INDICES].fill_(n))
        with pytest.raises(CheckpointError, match=rf"holds {number}, and the matrix of shape \(20, 12\) has 240"):
            adaptc.swap(program, path)
    without = copy_adapter_with(tmp_path / "a", tmp_path / "c", lambda t: t.pop(INDICES))
    with pytest.raises((CheckpointError, SwapError), match="supertuning_indices"):
        adaptc.swap(program, without)
    assert torch.equal(program(inputs(2)), before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"sparsity must lie in \[0, 1\)"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"lora_alpha": 4.0}, "lora_alpha=4.0 is the scale of the low-rank part.*set r, too"),
        ({"r": 2, "lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\)"),
    ],
    ids=str,
)
def test_illegal_options_are_named(options, match):
    with pytest.raises(ConfigError, match=f"SupertuningConfig.{match}"):
        adaptc.SupertuningConfig(**options)


def test_dropout_without_a_rank_is_told_of():
    with pytest.warns(AdaptcWarning, match=r"lora_dropout=0.2 has no effect without r"):
        assert not adaptc.SupertuningConfig(lora_dropout=0.2).method("q", "linear").dropout


def test_weights_too_small_and_too_large_are_refused():
    with pytest.raises(TargetError, match=r"'k.weight'.*sparsity=0.999 trains none of the 160 entries"):
        compile_chain(adaptc.SupertuningConfig(sparsity=0.999, target_modules=["k"]))
    assert Supertuning(sparsity=0.99).entries_at(Op("weight", (2**16, 2**15))) == int(2**31 * (1 - 0.99))
    with pytest.raises(TargetError, match="counts the entries of a weight with int32"):
        Supertuning().slots(Op("weight", (2**16, 2**15 + 1)))


def test_fields_and_defaults_are_pefts():
    assert differing_fields(peft.SupertuningConfig(), adaptc.SupertuningConfig()) == {}
    assert differing_fields(peft.SupertuningConfig(r=3), adaptc.SupertuningConfig(r=3)) == {}
