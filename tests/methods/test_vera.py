"""VeRA beyond the table of methods: projections that the whole model shares, in files and drawn again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError, ConfigError, VeraConfig
from adaptc.methods.lora_family.vera import Vera
from adaptc.passes.graph.ops import Op
from adaptc.runtime.rank_padding import paddings
from tests.support.chain import (
    FILE,
    TARGETS,
    as_stored,
    by_peft,
    compiled,
    inputs,
    peft_config,
    reloaded,
    rewritten,
    same_files,
    slots,
)
from tests.support.method_table import Experts


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_of_different_sizes_share_projections(tmp_path, dtype, saved):
    config = peft_config("VeraConfig", r=5, save_projection=saved, projection_prng_key=9)
    model = by_peft(config, tmp_path / "a", dtype)
    program = compiled(tmp_path / "a", dtype)
    found = slots(program)
    for name, t in (("vera_A", model.base_model.vera_A), ("vera_B", model.base_model.vera_B)):
        assert torch.equal(found[name], t["default"])
        assert found[name].dtype == t["default"].dtype
    x = inputs(5, dtype)
    torch.testing.assert_close(program(x), model(x))
    adaptc.save_adapter(program, tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert ("base_model.vera_A" in load_file(tmp_path / "b" / FILE)) == saved
    torch.testing.assert_close(reloaded(tmp_path / "b", dtype)(x), model(x))


def test_swaps_to_other_ranks_sites_and_projections(tmp_path):
    configs = [
        peft_config("VeraConfig", r=5, target_modules=["q", "v"]),
        peft_config("VeraConfig", r=3, target_modules=["k"], projection_prng_key=4, save_projection=False),
        peft_config("VeraConfig", r=8, target_modules=["k", "v"], projection_prng_key=2),
    ]
    models = [by_peft(c, tmp_path / str(i)) for i, c in enumerate(configs)]
    program = compiled([tmp_path / str(i) for i in range(3)])
    for i in (2, 0, 1, 2, 1):
        adaptc.swap(program, tmp_path / str(i))
        program.validate()
        torch.testing.assert_close(program(inputs(2)), models[i](inputs(2)), rtol=1e-10, atol=1e-10)
        adaptc.save_adapter(program, tmp_path / f"again{i}")
        assert same_files(tmp_path / str(i), tmp_path / f"again{i}")


def test_ranks_can_be_padded():
    method, op = Vera(r=2), Op("linear", (7, 5), torch.ops.aten.linear.default, ())
    assert paddings(method, op, "apply")
    assert paddings(method, op, "weight")


def test_projections_in_a_file_count_even_where_they_could_be_drawn(tmp_path):
    model = by_peft(peft_config("VeraConfig", r=5, projection_prng_key=3), tmp_path / "a")
    program = compiled(VeraConfig(r=2, target_modules=TARGETS, save_projection=False))
    adaptc.swap(program, load_file(tmp_path / "a" / FILE))
    torch.testing.assert_close(program(inputs(2)), model(inputs(2)), rtol=1e-10, atol=1e-10)


def test_missing_and_small_projections_are_refused(tmp_path):
    by_peft(peft_config("VeraConfig", r=5), tmp_path / "a")
    program = compiled(tmp_path / "a")
    before = program(inputs(2))
    without = rewritten(tmp_path / "a", tmp_path / "b", lambda t: t.pop("base_model.vera_A"))
    with pytest.raises(CheckpointError, match=r"vera_A.* is missing"):
        adaptc.swap(program, without)
    short = rewritten(
        tmp_path / "a", tmp_path / "c", lambda t: t.update({"base_model.vera_B": t["base_model.vera_B"][:19].clone()})
    )
    with pytest.raises(CheckpointError, match=r"vera_B.*\(19, 5\), expected \(20, 5\)"):
        adaptc.swap(program, short)
    assert torch.equal(program(inputs(2)), before)


@pytest.mark.parametrize("init", [True, False])
def test_first_values_are_peft_s(tmp_path, init):
    options = {"r": 7, "target_modules": ["k"], "init_weights": init, "d_initial": 0.25}
    by_peft(peft_config("VeraConfig", **options), tmp_path / "a", torch.float32, randomly=False, seed=1)
    generator = torch.Generator().manual_seed(1)
    adaptc.save_adapter(compiled(VeraConfig(**options), torch.float32, generator=generator), tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")


def test_writing_to_a_program_leaves_other_programs_their_projections():
    config = VeraConfig(r=4, target_modules=TARGETS)
    first = compiled(config)
    expected = slots(first)["vera_A"].clone()
    slots(first)["vera_A"].zero_()
    assert torch.equal(slots(compiled(config))["vera_A"], expected)


def test_dropout_acts_on_the_input_and_in_training_only(tmp_path):
    by_peft(peft_config("VeraConfig", r=5, vera_dropout=0.5), tmp_path / "a")
    program, x = compiled(tmp_path / "a", training=True), inputs(4)
    module, expected = program.module(), compiled(tmp_path / "a")(x)
    torch.manual_seed(0)
    first = module(x)
    assert not torch.allclose(first, module(x))
    assert not torch.allclose(first, expected)
    model = by_peft(peft_config("VeraConfig", r=5, vera_dropout=0.5), tmp_path / "b").train()
    torch.manual_seed(0)
    torch.testing.assert_close(first, model(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(program(x), expected)
    torch.testing.assert_close(adaptc.merge(program)(x), expected)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 15)
        self.layer = Experts(15, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.up(x)))


def test_experts_share_the_projections_of_the_other_layers(tmp_path):
    torch.manual_seed(0)
    model, x = Mixed().double(), torch.randn(3, 5).double()
    config = VeraConfig(r=4, target_modules=["up"], target_parameters=["layer.matrices"], init_weights=False)
    program = adaptc.compile(model, config, example_inputs=x)
    found = slots(program)
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
