"""TinyLoRA beyond the table of methods: vectors that runs of layers share, and random matrices by layer."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError, ConfigError, TinyLoraConfig
from adaptc.methods.shared_factors.tinylora import TinyLora
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
    randomize,
    slots_by_file_key,
    tensor_files_are_equal,
)
from tests.support.layer_table import LinearAndExperts
from tests.support.subject import loss


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("tying", [0.0, 0.5, 1.0])
def test_runs_of_layers_share_a_vector(tmp_path, tying, saved):
    config = peft_config("TinyLoraConfig", r=3, u=7, weight_tying=tying, save_projection=saved, projection_seed=9)
    model = peft_chain(config, tmp_path / "a")
    program, x = compile_chain(tmp_path / "a"), inputs(5)
    torch.testing.assert_close(program(x), model(x), rtol=1e-10, atol=1e-10)
    keys = {k for k in load_file(tmp_path / "a" / FILE) if "tinylora_v" in k}
    assert len(keys) == {0.0: 3, 0.5: 2, 1.0: 1}[tying]
    found = program.binding.values
    vectors = {found[a.slots["tinylora_v"]].data_ptr() for a in program.adaptation.attachments}
    assert len(vectors) == len(keys)
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    torch.testing.assert_close(load_peft_chain(tmp_path / "b")(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("tying", [0.0, 0.3, 0.5, 0.7, 0.95, 1.0])
def test_runs_are_peft_s(count, tying):
    """By PEFT's code itself, on that many layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.TinyLoraConfig(u=2, r=2, weight_tying=tying, target_modules=["0", *map(str, range(1, count))])
        model = peft.get_peft_model(nn.Sequential(*[nn.Linear(3, 3) for _ in range(count)]), config)
    expected = [int(layer._tinylora_v_key["default"]) for layer in model.base_model.model]
    method = TinyLora(tying=tying)
    assert [method.group_of(i, count) for i in range(count)] == expected
    assert [method.leads_group(i, count) for i in range(count)] == [
        expected.index(g) == i for i, g in enumerate(expected)
    ]


@pytest.mark.long
def test_swaps_to_other_ranks_sites_and_runs(tmp_path):
    configs = [
        peft_config("TinyLoraConfig", r=3, u=7, weight_tying=0.5),
        peft_config("TinyLoraConfig", r=5, u=7, target_modules=["k", "v"], save_projection=False, projection_seed=3),
        peft_config("TinyLoraConfig", r=2, u=7, target_modules=["q", "v"], weight_tying=1.0),
    ]
    models = [peft_chain(c, tmp_path / str(i)) for i, c in enumerate(configs)]
    program = compile_chain([tmp_path / str(i) for i in range(3)])
    for i in (2, 0, 1, 2, 0):
        adaptc.swap(program, tmp_path / str(i))
        program.validate()
        torch.testing.assert_close(program(inputs(2)), models[i](inputs(2)), rtol=1e-10, atol=1e-10)
        adaptc.save_adapter(program, tmp_path / f"again{i}{len(list(tmp_path.iterdir()))}")
    x = inputs(2)
    out = program.bank({"a": tmp_path / "0", "b": tmp_path / "1"})(x, adapters=["b", "a"])
    torch.testing.assert_close(out, torch.stack([models[1](x)[0], models[0](x)[1]]), rtol=1e-9, atol=1e-9)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    torch.testing.assert_close(loaded(x), models[0](x), rtol=1e-10, atol=1e-10)
    adaptc.swap(loaded, tmp_path / "1")
    torch.testing.assert_close(loaded(x), models[1](x), rtol=1e-10, atol=1e-10)
    adaptc.save_adapter(loaded, tmp_path / "last")
    assert tensor_files_are_equal(tmp_path / "1", tmp_path / "last")


@pytest.mark.parametrize("init", [True, "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_first_values_are_peft_s(tmp_path, init, dtype):
    options: dict[str, Any] = {"r": 9, "u": 7, "init_weights": init, "weight_tying": 0.5, "init_v_bound": 0.5}
    options["target_modules"] = [*TARGETS, "o"]  # in two runs of two
    peft_chain(peft_config("TinyLoraConfig", **options), tmp_path / "a", dtype, random_values=False, seed=1)
    generator = torch.Generator().manual_seed(1)
    adaptc.save_adapter(compile_chain(TinyLoraConfig(**options), dtype, generator=generator), tmp_path / "b")
    found, expected = (load_file(tmp_path / name / FILE) for name in "ba")
    assert found.keys() == expected.keys()
    for key, t in expected.items():
        assert torch.equal(found[key].to(t.dtype), t), key
    assert expected["base_model.model.k.tinylora_A"].shape == (8, 20)  # a layer with 8 outputs has no ninth term


def test_values_that_peft_leaves_as_they_are_in_memory_are_random():
    config = TinyLoraConfig(r=2, u=50, init_weights=False, target_modules=TARGETS)
    one, two = (
        slots_by_file_key(compile_chain(config, generator=torch.Generator().manual_seed(0)))["tinylora_v.1"]
        for _ in range(2)
    )
    assert torch.equal(one, two)
    assert 0.5 < float(one.detach().std()) < 1.5


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(13, 6), nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.table(x))


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_embedding_shares_a_vector_with_a_linear_layer(tmp_path, dropout):
    torch.manual_seed(0)
    base, ids = Embedded().double(), torch.arange(12).reshape(3, 4)
    config = peft_config(
        "TinyLoraConfig", r=2, u=5, weight_tying=1.0, target_modules=["table", "up"], tinylora_dropout=dropout
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
        randomize({n: p for n, p in model.named_parameters() if p.requires_grad})
        model.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    program = adaptc.compile(Embedded().double(), tmp_path, example_inputs=ids, training=True)
    module, found = program.module(), []
    for m in (model.train(), module.train()):
        torch.manual_seed(3)
        out = m(ids)
        loss(out).backward()
        (grad,) = [p.grad for p in m.parameters() if p.grad is not None]
        found.append((out, grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.eval()(ids), model.eval()(ids), rtol=1e-9, atol=1e-9)
    merged = adaptc.merge(program)
    torch.testing.assert_close(merged(ids), model(ids), rtol=1e-9, atol=1e-9)


def test_experts_share_a_vector_with_other_layers(tmp_path):
    torch.manual_seed(0)
    model, x = LinearAndExperts().double(), torch.randn(3, 5).double()
    config = TinyLoraConfig(
        r=2, u=5, weight_tying=1.0, target_modules=["up"], target_parameters=["layer.matrices"], init_weights="uniform"
    )
    program = adaptc.compile(model, config, example_inputs=x)
    found = slots_by_file_key(program)
    left, values, right = torch.linalg.svd(model.layer.matrices.float(), full_matrices=False)
    expected = left[..., :2].double() @ torch.diag_embed(values[:, :2].double()) @ right[:, :2].double()
    torch.testing.assert_close(found["layer.tinylora_B"] @ found["layer.tinylora_A"], expected, rtol=1e-5, atol=1e-5)
    new = {}
    for name, key in (("up.weight", "up"), ("layer.matrices", "layer")):
        mixed = torch.einsum("i,ijk->jk", found["tinylora_v.0"], found[f"{key}.tinylora_P"])
        new[name] = model.get_parameter(name) + found[f"{key}.tinylora_B"] @ mixed @ found[f"{key}.tinylora_A"]
    torch.testing.assert_close(program(x), torch.func.functional_call(model, new, x))
    adaptc.save_adapter(program, tmp_path)
    adaptc.swap(program, tmp_path)
    torch.testing.assert_close(program(x), torch.func.functional_call(model, new, x))


def test_missing_and_surplus_vectors_are_refused(tmp_path):
    peft_chain(peft_config("TinyLoraConfig", r=3, u=7), tmp_path / "a")
    program = compile_chain(tmp_path / "a")
    before, last = program(inputs(2)), "base_model.tinylora_v.2"
    with pytest.raises(CheckpointError, match=r"tinylora_v.2' is missing"):
        adaptc.swap(program, copy_adapter_with(tmp_path / "a", tmp_path / "b", lambda t: t.pop(last)))
    surplus = copy_adapter_with(tmp_path / "a", tmp_path / "c", lambda t: t.update({f"{last}9": t[last].clone()}))
    with pytest.raises(adaptc.SwapError, match=r"tinylora_v.29"):
        adaptc.swap(program, surplus)
    assert torch.equal(program(inputs(2)), before)


def test_weights_that_cannot_be_decomposed_are_refused():
    model = nn.Sequential(nn.Linear(5, 7))
    nn.init.constant_(model[0].weight, float("inf"))
    with pytest.raises(ConfigError, match=r"^'0': .*the weight of shape \(7, 5\) is not finite"):
        adaptc.compile(model, TinyLoraConfig(target_modules=["0"]), example_inputs=torch.randn(2, 5))


def test_ranks_can_be_padded():
    method, op = TinyLora(r=2, count=3), Op("linear", (7, 9), torch.ops.aten.linear.default, ())
    assert find_paddings(method, op, "apply")
    assert find_paddings(method, op, "weight")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"u": 0}, "u must be a positive integer, got 0"),
        ({"weight_tying": 1.5}, r"weight_tying must lie in \[0, 1\], got 1.5"),
        ({"tinylora_dropout": 1.0}, r"tinylora_dropout must lie in \[0, 1\)"),
        ({"init_weights": "normal"}, "init_weights must be True, False or 'uniform', got 'normal'"),
        ({"init_v_bound": -1.0}, "init_v_bound must not be negative, got -1.0"),
        ({"bias": "some"}, "'tinylora_only'"),
    ],
)
def test_bad_values_are_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        TinyLoraConfig(**options)


def test_config_has_peft_s_fields_and_defaults():
    config = peft_config("TinyLoraConfig", target_modules=["q"])
    assert as_stored(TinyLoraConfig(target_modules=["q"])) == as_stored(config)
