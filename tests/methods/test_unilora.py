"""Uni-LoRA beyond the table of methods: one trained vector of the whole model, and the places of its entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.unilora.model import UniLoraModel
from safetensors.torch import load_file
from torch import Tensor

import adaptc
from adaptc import CheckpointError, ConfigError, UniLoraConfig
from adaptc.methods.shared_factors.unilora import UniLora, draw_places
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
from tests.support.subject import loss


@pytest.mark.parametrize(
    ("count", "length", "seed"), [(640, 37, 42), (5, 64, 0), (64, 64, 3), (7, 1, 9), (1003, 100, 5)]
)
def test_places_are_peft_s(count, length, seed):
    expected = UniLoraModel.generate_index(count, length, seed)
    found, scales = draw_places(count, length, seed)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    taken = torch.bincount(expected, minlength=length)
    assert torch.equal(scales, torch.where(taken > 0, taken.float().rsqrt(), 0.0))


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layers_of_different_sizes_share_the_vector(tmp_path, dtype, saved):
    config = peft_config("UniLoraConfig", r=5, theta_d_length=61, proj_seed=9, save_indices=saved)
    model = peft_chain(config, tmp_path / "a", dtype)
    program = compile_chain(tmp_path / "a", dtype)
    found = slots_by_file_key(program)
    for name in TARGETS:
        layer = getattr(model.base_model.model, name)
        for slot in ("indices_A", "indices_B", "scales_A", "scales_B"):
            expected = getattr(layer, f"unilora_{slot}")["default"]
            assert torch.equal(found[f"{name}.unilora_{slot}"].to(expected.dtype), expected)
    x = inputs(5, dtype)
    torch.testing.assert_close(program(x), model(x))
    adaptc.save_adapter(program, tmp_path / "b")
    written = load_file(tmp_path / "b" / FILE)
    assert len(written) == (13 if saved else 1)
    for name, t in load_file(tmp_path / "a" / FILE).items():
        assert torch.equal(written[name].to(t.dtype), t)
    torch.testing.assert_close(load_peft_chain(tmp_path / "b", dtype)(x), model(x))


def test_swaps_to_other_ranks_sites_and_places(tmp_path):
    configs = [
        peft_config("UniLoraConfig", r=5, theta_d_length=61, target_modules=["q", "v"]),
        peft_config("UniLoraConfig", r=3, theta_d_length=61, target_modules=["k"], proj_seed=4, save_indices=True),
        peft_config("UniLoraConfig", r=8, theta_d_length=61, target_modules="k|v", proj_seed=2),
    ]
    models = [peft_chain(c, tmp_path / str(i)) for i, c in enumerate(configs)]
    program = compile_chain([tmp_path / str(i) for i in range(3)])
    for i in (2, 0, 1, 2):
        adaptc.swap(program, tmp_path / str(i))
        program.validate()
        torch.testing.assert_close(program(inputs(2)), models[i](inputs(2)), rtol=1e-10, atol=1e-10)
        adaptc.save_adapter(program, tmp_path / f"again{i}")
        assert tensor_files_are_equal(tmp_path / str(i), tmp_path / f"again{i}")


@pytest.mark.long
def test_a_bank_holds_adapters_of_different_sites(tmp_path):
    configs = [
        peft_config("UniLoraConfig", r=5, theta_d_length=61, target_modules=["q", "v"]),
        peft_config("UniLoraConfig", r=3, theta_d_length=61, target_modules=["k"], proj_seed=4),
    ]
    models = [peft_chain(c, tmp_path / str(i)) for i, c in enumerate(configs)]
    program = compile_chain([tmp_path / str(i) for i in range(2)])
    x = inputs(2)
    out = program.bank({"a": tmp_path / "0", "b": tmp_path / "1"})(x, adapters=["b", "a"])
    torch.testing.assert_close(out, torch.stack([models[1](x)[0], models[0](x)[1]]), rtol=1e-9, atol=1e-9)


@pytest.mark.long
def test_the_program_read_from_a_file_knows_its_places(tmp_path):
    model = peft_chain(peft_config("UniLoraConfig", r=5, theta_d_length=61), tmp_path / "a")
    other = peft_chain(peft_config("UniLoraConfig", r=3, theta_d_length=61, proj_seed=1), tmp_path / "b")
    program = adaptc.load(adaptc.save(compile_chain(tmp_path / "a"), tmp_path / "program.pt2"))
    x = inputs(3)
    torch.testing.assert_close(program(x), model(x), rtol=1e-10, atol=1e-10)
    adaptc.swap(program, tmp_path / "b")
    torch.testing.assert_close(program(x), other(x), rtol=1e-10, atol=1e-10)


def test_indices_in_a_file_count_even_where_they_could_be_drawn(tmp_path):
    config = peft_config("UniLoraConfig", r=5, theta_d_length=61, proj_seed=3, save_indices=True)
    model = peft_chain(config, tmp_path / "a")
    program = compile_chain(UniLoraConfig(r=2, theta_d_length=61, target_modules=TARGETS))
    adaptc.swap(program, load_file(tmp_path / "a" / FILE))
    torch.testing.assert_close(program(inputs(2)), model(inputs(2)), rtol=1e-10, atol=1e-10)


def test_indices_outside_of_the_vector_are_refused(tmp_path):
    peft_chain(peft_config("UniLoraConfig", r=5, theta_d_length=61, save_indices=True), tmp_path / "a")
    program = compile_chain(tmp_path / "a")
    before = program(inputs(2))

    def shift(t: dict[str, Tensor]) -> None:
        t["base_model.model.k.unilora_indices_A"] += 1

    with pytest.raises(CheckpointError, match=r"unilora_indices_A' holds places from 1 to 61, and .* has 61"):
        adaptc.swap(program, copy_adapter_with(tmp_path / "a", tmp_path / "b", shift))
    assert torch.equal(program(inputs(2)), before)


def test_ranks_can_be_padded():
    method, op = UniLora(r=2), Op("linear", (7, 5), torch.ops.aten.linear.default, ())
    assert find_paddings(method, op, "apply")
    assert find_paddings(method, op, "weight")


@pytest.mark.parametrize("init", [True, False])
def test_first_values_are_peft_s(tmp_path, init):
    options = {
        "r": 7,
        "theta_d_length": 53,
        "init_weights": init,
        "init_theta_d_bound": 0.25,
        "target_modules": TARGETS,
    }
    peft_chain(peft_config("UniLoraConfig", **options), tmp_path / "a", torch.float32, random_values=False, seed=1)
    generator = torch.Generator().manual_seed(1)
    adaptc.save_adapter(compile_chain(UniLoraConfig(**options), torch.float32, generator=generator), tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    config = json.loads((Path(tmp_path) / "b" / "adapter_config.json").read_text())
    assert config["proj_seed"] == 42


def test_gradients_of_the_vector_come_from_all_layers(tmp_path):
    model = peft_chain(
        peft_config("UniLoraConfig", r=5, theta_d_length=61, unilora_dropout=0.5), tmp_path / "a"
    ).train()
    module, x = compile_chain(tmp_path / "a", training=True).module(), inputs(4)
    found: list[Any] = []
    for m in (model, module):
        torch.manual_seed(0)
        out = m(x)
        loss(out).backward()
        (grad,) = [p.grad for p in m.parameters() if p.grad is not None]
        found.append((out, grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_each_expert_has_places_of_its_own(tmp_path):
    torch.manual_seed(0)
    model, x = LinearAndExperts().double(), torch.randn(3, 5).double()
    config = UniLoraConfig(
        r=4, theta_d_length=600, target_modules=["up"], target_parameters=["layer.matrices"], init_weights=False
    )
    program = adaptc.compile(model, config, example_inputs=x)
    found = slots_by_file_key(program)
    places, scales = draw_places(4 * (5 + 15) + 3 * 4 * (15 + 7), 600, 42)
    assert torch.equal(found["layer.unilora_indices_A"].flatten(), places[80:260])
    assert torch.equal(found["layer.unilora_indices_B"].flatten(), places[260:])
    entries = found["unilora_theta_d"][places] * scales.double()[places]
    new = {
        "up.weight": model.up.weight + entries[20:80].reshape(15, 4) @ entries[:20].reshape(4, 5),
        "layer.matrices": model.layer.matrices + entries[260:].reshape(3, 7, 4) @ entries[80:260].reshape(3, 4, 15),
    }
    torch.testing.assert_close(program(x), torch.func.functional_call(model, new, x))
    adaptc.save_adapter(program, tmp_path)
    again = adaptc.compile(model, config, example_inputs=x)
    assert not torch.allclose(again(x), program(x))
    adaptc.swap(again, tmp_path)
    torch.testing.assert_close(again(x), program(x), rtol=1e-12, atol=1e-12)


def test_the_config_of_a_file_says_which_sites_it_is_of(tmp_path):
    config = UniLoraConfig(theta_d_length=61, target_modules=TARGETS, exclude_modules=["v"])
    one, x = compile_chain(config), inputs(3)
    program = compile_chain(UniLoraConfig(theta_d_length=61, target_modules=TARGETS))
    adaptc.swap(program, adaptc.save_adapter(one, tmp_path))
    assert {a.partition(".")[0] for a in program.binding.methods} == {"q", "k"}
    torch.testing.assert_close(program(x), one(x), rtol=1e-12, atol=1e-12)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["o"], "exclude_modules": None}))
    with pytest.raises(adaptc.SwapError, match=r"its config names \['o'\], where the program has no site"):
        adaptc.swap(program, tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"theta_d_length": 0}, "theta_d_length must be a positive integer, got 0"),
        ({"proj_seed": -1}, "proj_seed must be an integer of at least 0, got -1"),
        ({"unilora_dropout": 1.0}, r"unilora_dropout must lie in \[0, 1\)"),
        ({"init_theta_d_bound": 0.0}, "init_theta_d_bound must be positive, got 0.0"),
        ({"bias": "some"}, "'unilora_only'"),
    ],
)
def test_bad_values_are_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        UniLoraConfig(**options)


def test_config_has_peft_s_fields_and_defaults():
    assert as_stored(UniLoraConfig(target_modules=["q"])) == as_stored(
        peft_config("UniLoraConfig", target_modules=["q"])
    )
