"""VeRA beyond the table of methods: projections that the whole model shares, in files and drawn again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import adaptc
from adaptc import CheckpointError, ConfigError, VeraConfig
from adaptc.methods.shared_factors.vera import Vera
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
from tests.support.layer_table import LinearAndExperts


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_of_different_sizes_share_projections(tmp_path, dtype, saved):
    config = peft_config("VeraConfig", r=5, save_projection=saved, projection_prng_key=9)
    model = peft_chain(config, tmp_path / "a", dtype)
    program = compile_chain(tmp_path / "a", dtype)
    found = slots_by_file_key(program)
    for name, t in (("vera_A", model.base_model.vera_A), ("vera_B", model.base_model.vera_B)):
        assert torch.equal(found[name], t["default"])
        assert found[name].dtype == t["default"].dtype
    x = inputs(5, dtype)
    torch.testing.assert_close(program(x), model(x))
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    assert ("base_model.vera_A" in load_file(tmp_path / "b" / FILE)) == saved
    torch.testing.assert_close(load_peft_chain(tmp_path / "b", dtype)(x), model(x))


def test_swaps_to_other_ranks_sites_and_projections(tmp_path):
    configs = [
        peft_config("VeraConfig", r=5, target_modules=["q", "v"]),
        peft_config("VeraConfig", r=3, target_modules=["k"], projection_prng_key=4, save_projection=False),
        peft_config("VeraConfig", r=8, target_modules=["k", "v"], projection_prng_key=2),
    ]
    models = [peft_chain(c, tmp_path / str(i)) for i, c in enumerate(configs)]
    program = compile_chain([tmp_path / str(i) for i in range(3)])
    for i in (2, 0, 1, 2, 1):
        adaptc.swap(program, tmp_path / str(i))
        program.validate()
        torch.testing.assert_close(program(inputs(2)), models[i](inputs(2)), rtol=1e-10, atol=1e-10)
        adaptc.save_adapter(program, tmp_path / f"again{i}")
        assert tensor_files_are_equal(tmp_path / str(i), tmp_path / f"again{i}")


def test_ranks_can_be_padded():
    method, op = Vera(r=2), Op("linear", (7, 5), torch.ops.aten.linear.default, ())
    assert find_paddings(method, op, "apply")
    assert find_paddings(method, op, "weight")


def test_projections_in_a_file_count_even_where_they_could_be_drawn(tmp_path):
    model = peft_chain(peft_config("VeraConfig", r=5, projection_prng_key=3), tmp_path / "a")
    program = compile_chain(VeraConfig(r=2, target_modules=TARGETS, save_projection=False))
    adaptc.swap(program, load_file(tmp_path / "a" / FILE))
    torch.testing.assert_close(program(inputs(2)), model(inputs(2)), rtol=1e-10, atol=1e-10)


def test_missing_and_small_projections_are_refused(tmp_path):
    peft_chain(peft_config("VeraConfig", r=5), tmp_path / "a")
    program = compile_chain(tmp_path / "a")
    before = program(inputs(2))
    without = copy_adapter_with(tmp_path / "a", tmp_path / "b", lambda t: t.pop("base_model.vera_A"))
    with pytest.raises(CheckpointError, match=r"vera_A.* is missing"):
        adaptc.swap(program, without)
    short = copy_adapter_with(
        tmp_path / "a", tmp_path / "c", lambda t: t.update({"base_model.vera_B": t["base_model.vera_B"][:19].clone()})
    )
    with pytest.raises(CheckpointError, match=r"vera_B.*\(19, 5\), expected \(20, 5\)"):
        adaptc.swap(program, short)
    assert torch.equal(program(inputs(2)), before)


@pytest.mark.parametrize("init", [True, False])
def test_first_values_are_peft_s(tmp_path, init):
    options = {"r": 7, "target_modules": ["k"], "init_weights": init, "d_initial": 0.25}
    peft_chain(peft_config("VeraConfig", **options), tmp_path / "a", torch.float32, random_values=False, seed=1)
    generator = torch.Generator().manual_seed(1)
    adaptc.save_adapter(compile_chain(VeraConfig(**options), torch.float32, generator=generator), tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")


def test_writing_to_a_program_leaves_other_programs_their_projections():
    config = VeraConfig(r=4, target_modules=TARGETS)
    first = compile_chain(config)
    expected = slots_by_file_key(first)["vera_A"].clone()
    slots_by_file_key(first)["vera_A"].zero_()
    assert torch.equal(slots_by_file_key(compile_chain(config))["vera_A"], expected)


def test_dropout_acts_on_the_input_and_in_training_only(tmp_path):
    peft_chain(peft_config("VeraConfig", r=5, vera_dropout=0.5), tmp_path / "a")
    program, x = compile_chain(tmp_path / "a", training=True), inputs(4)
    module, expected = program.module(), compile_chain(tmp_path / "a")(x)
    torch.manual_seed(0)
    first = module(x)
    assert not torch.allclose(first, module(x))
    assert not torch.allclose(first, expected)
    model = peft_chain(peft_config("VeraConfig", r=5, vera_dropout=0.5), tmp_path / "b").train()
    torch.manual_seed(0)
    torch.testing.assert_close(first, model(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(program(x), expected)
    torch.testing.assert_close(adaptc.merge(program)(x), expected)


def test_experts_share_the_projections_of_the_other_layers(tmp_path):
    torch.manual_seed(0)
    model, x = LinearAndExperts().double(), torch.randn(3, 5).double()
    config = VeraConfig(r=4, target_modules=["up"], target_parameters=["layer.matrices"], init_weights=False)
    program = adaptc.compile(model, config, example_inputs=x)
    found = slots_by_file_key(program)
    assert {n: tuple(t.shape) for n, t in found.items()} == {
        "up.vera_lambda_b": (15,),
        "up.vera_lambda_d": (4,),
        "layer.vera_lambda_b": (3, 7),
        "layer.vera_lambda_d": (3, 4),
        "vera_A": (4, 15),
        "vera_B": (15, 4),
    }
    A, B = found["vera_A"], found["vera_B"]
    new = {"up.weight": found["up.vera_lambda_d"].unsqueeze(-1) * A[:, :5]}
    new["up.weight"] = model.up.weight + found["up.vera_lambda_b"].unsqueeze(-1) * B @ new["up.weight"]
    each = found["layer.vera_lambda_b"].unsqueeze(-1) * B[:7], found["layer.vera_lambda_d"].unsqueeze(-1) * A
    new["layer.matrices"] = model.layer.matrices + each[0] @ each[1]
    torch.testing.assert_close(program(x), torch.func.functional_call(model, new, x))
    adaptc.save_adapter(program, tmp_path)
    adaptc.swap(program, tmp_path)
    torch.testing.assert_close(program(x), torch.func.functional_call(model, new, x))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": True}, "r must be an integer, got True"),
        ({"vera_dropout": 1.0}, r"vera_dropout must lie in \[0, 1\)"),
        ({"projection_prng_key": 1.5}, "projection_prng_key must be an integer"),
        ({"bias": "some"}, "'vera_only'"),
    ],
)
def test_bad_values_are_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        VeraConfig(**options)


def test_config_has_peft_s_fields_and_defaults():
    assert as_stored(VeraConfig(target_modules=["q"])) == as_stored(peft_config("VeraConfig", target_modules=["q"]))
