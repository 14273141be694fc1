"""RandLoRA beyond the table of methods: bases that the whole model shares, and that files repeat under every site."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file

import adaptc
from adaptc import CheckpointError, ConfigError, RandLoraConfig, SwapError
from adaptc.methods.shared_factors.randlora import RandLora, draw_bases
from adaptc.passes.graph.ops import Op
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

KINDS = [{}, {"sparse": True}, {"very_sparse": True}, {"sparse": True, "very_sparse": True}]


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("kind", KINDS[:3], ids=["dense", "sparse", "very_sparse"])
def test_layers_of_different_sizes_share_bases(tmp_path, kind, saved):
    dtype = torch.bfloat16 if kind == {} and not saved else torch.float64
    config = peft_config("RandLoraConfig", r=5, randlora_alpha=3, save_projection=saved, projection_prng_key=9, **kind)
    model = peft_chain(config, tmp_path / "a", dtype)
    program = compile_chain(tmp_path / "a", dtype)
    for name, t in (("randlora_A", model.base_model.randlora_A), ("randlora_B", model.base_model.randlora_B)):
        assert torch.equal(slots_by_file_key(program)[name], t["default"])
    x = inputs(5, dtype)
    torch.testing.assert_close(program(x), model(x))
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    keys = set(load_file(tmp_path / "b" / FILE))
    assert {k for k in keys if k.endswith("randlora_B")} == (
        {f"base_model.{p}randlora_B" for p in ("", "model.q.", "model.k.", "model.v.")} if saved else set()
    )
    again = load_peft_chain(tmp_path / "b", dtype)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_bases_are_drawn_as_peft_draws_them(tmp_path, kind, dtype):
    options = {"r": 3, "projection_prng_key": 5, **kind}
    model = peft_chain(peft_config("RandLoraConfig", **options), tmp_path, dtype)
    found = RandLoraConfig(**options).method("", "linear")
    found = RandLora.sharing.settle_shared_sizes([(found, Op("linear", s)) for s in ((20, 12), (8, 20), (16, 8))])[1]
    drawn = found.init(Op("linear", (8, 20)), torch.zeros(8, 20, dtype=dtype), torch.float64).slots
    assert torch.equal(drawn["randlora_A"], model.base_model.randlora_A["default"].double())
    assert torch.equal(drawn["randlora_B"], model.base_model.randlora_B["default"].double())


def test_swaps_to_other_sites_and_bases(tmp_path):
    configs = [
        peft_config("RandLoraConfig", r=5, target_modules=["q", "v"], randlora_alpha=2),
        peft_config("RandLoraConfig", r=5, target_modules=["k"], save_projection=False, sparse=True, randlora_alpha=9),
        peft_config("RandLoraConfig", r=3, target_modules=["k", "v"], projection_prng_key=2, randlora_alpha=3),
    ]
    models = [peft_chain(c, tmp_path / str(i)) for i, c in enumerate(configs)]
    program = compile_chain([tmp_path / str(i) for i in range(3)])
    for i in (2, 0, 1, 2, 1):
        adaptc.swap(program, tmp_path / str(i))
        program.validate()
        torch.testing.assert_close(program(inputs(2)), models[i](inputs(2)), rtol=1e-10, atol=1e-10)
        adaptc.save_adapter(program, tmp_path / f"again{i}")
        assert tensor_files_are_equal(tmp_path / str(i), tmp_path / f"again{i}")


def test_another_rank_needs_code_of_its_own(tmp_path):
    peft_chain(peft_config("RandLoraConfig", r=5), tmp_path / "a")
    peft_chain(peft_config("RandLoraConfig", r=3), tmp_path / "b")
    program = compile_chain(tmp_path / "a")
    with pytest.raises(SwapError, match=r"at 'q' was compiled for r=5, and the adapter has r=3; .*compile\(model, \["):
        adaptc.swap(program, tmp_path / "b")


@pytest.mark.long
def test_copies_of_a_basis_that_differ_are_refused(tmp_path):
    peft_chain(peft_config("RandLoraConfig", r=5), tmp_path / "a")
    key = "base_model.model.k.randlora_A"
    other = copy_adapter_with(tmp_path / "a", tmp_path / "b", lambda t: t.update({key: t[key] + 1}))
    with pytest.raises(CheckpointError, match=r"'k\.randlora_A' and 'randlora_A' are one tensor"):
        compile_chain(other)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        # Which has no type in common with others: as long as the values are the same, so are the tensors.
        narrow = copy_adapter_with(
            tmp_path / "a", tmp_path / str(kind), lambda t, kind=kind: t.update({key: t[key].to(kind)})
        )
        with pytest.raises(CheckpointError, match=r"'k\.randlora_A' and 'randlora_A' are one tensor"):
            compile_chain(narrow)
    fewer = copy_adapter_with(tmp_path / "a", tmp_path / "c", lambda t: t.pop(key))
    assert torch.equal(compile_chain(fewer)(inputs(2)), compile_chain(tmp_path / "a")(inputs(2)))


@pytest.mark.parametrize("init", [True, False])
def test_first_values_are_peft_s(tmp_path, init):
    options = {"r": 7, "target_modules": ["k"], "init_weights": init}
    peft_chain(peft_config("RandLoraConfig", **options), tmp_path / "a", torch.float32, random_values=False, seed=1)
    generator = torch.Generator().manual_seed(1)
    adaptc.save_adapter(compile_chain(RandLoraConfig(**options), torch.float32, generator=generator), tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")


def test_dropout_acts_on_the_input_and_in_training_only(tmp_path):
    config = peft_config("RandLoraConfig", r=5, randlora_alpha=3, randlora_dropout=0.5)
    model = peft_chain(config, tmp_path)
    program, x = compile_chain(tmp_path, training=True), inputs(4)
    torch.testing.assert_close(program(x), model(x), rtol=1e-10, atol=1e-10)
    module, model = program.module(), model.train()
    torch.manual_seed(0)
    first = module(x)
    torch.manual_seed(0)
    torch.testing.assert_close(first, model(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(first, program(x))


def test_bases_without_spread_are_refused():
    """PEFT divides by a standard deviation of zero, or by that of one number."""
    with pytest.raises(ConfigError, match="r=1 and projection_prng_key=0 give a dense basis of 1 equal values"):
        draw_bases(0, 1, 1, 3, "", torch.bfloat16)
    drawn = torch.rand(2, generator=torch.Generator().manual_seed(4))
    assert float((drawn - 0.5).abs().max()) < 1 / 3  # what lies within becomes zero
    with pytest.raises(ConfigError, match=r"projection_prng_key=4 give a sparse basis.* take another key or rank"):
        draw_bases(4, 1, 2, 3, "sparse", torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": -1}, "r must be a positive integer, got -1"),
        ({"randlora_dropout": -0.1}, r"randlora_dropout must lie in \[0, 1\)"),
        ({"projection_prng_key": "a"}, "projection_prng_key must be an integer"),
        ({"bias": "some"}, "'randlora_only'"),
    ],
)
def test_bad_values_are_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        RandLoraConfig(**options)


def test_config_has_peft_s_fields_and_defaults():
    assert as_stored(RandLoraConfig(target_modules=TARGETS)) == as_stored(peft.RandLoraConfig(target_modules=TARGETS))
