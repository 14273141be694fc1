"""GLoRA: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError, ConfigError, GloraConfig, TargetError
from adaptc.methods.weight_dependent.glora import Glora
from adaptc.passes.graph.ops import Op
from adaptc.runtime.rank_padding import find_paddings
from tests.support.chain import FILE, as_stored, peft_config, randomize, tensor_files_are_equal
from tests.support.subject import loss, quiet

TARGETS = ["bare", "layer"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "config_D_E": "vector"},
    "vector": {"config_A_B": "vector", "config_C": "vector"},
    "constant": {"config_A_B": "constant", "config_C": "none"},
    "no bias": {"r": 2, "config_C": "none", "config_D_E": "none"},
}


class Pair(nn.Module):
    """A layer without a bias, and one with."""

    def __init__(self) -> None:
        super().__init__()
        self.bare, self.layer = nn.Linear(5, 7, bias=False), nn.Linear(7, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.bare(x)))


def pair(dtype: torch.dtype = torch.float64) -> Pair:
    torch.manual_seed(3)
    return Pair().to(dtype).eval()


def inputs(batch: int) -> Tensor:
    torch.manual_seed(batch)
    return torch.randn(batch, 5, dtype=torch.float64)


def compile(adapter: Any, **options: Any) -> adaptc.AdaptedProgram:
    return adaptc.compile(pair(), adapter, example_inputs=inputs(3), **options)


def by_peft(path: Path, seed: int = 4, **options: Any) -> Any:
    """PEFT's model of the pair with random tensors, saved to ``path``."""
    with quiet():
        model = peft.get_peft_model(pair(), peft.GloraConfig(**{"target_modules": TARGETS, **options})).eval()
    randomize({n: p for n, p in model.named_parameters() if p.requires_grad}, seed)
    model.save_pretrained(str(path))
    return model


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", list(KINDS))
def test_files_go_both_ways(kind, tmp_path):
    """PEFT's files hold zeros for the parts that a layer has not, and so do these."""
    model, x = by_peft(tmp_path / "a", **KINDS[kind]), inputs(5)
    program = compile(tmp_path / "a")
    close(program(x), model(x))
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    assert any(k.endswith("bare.glora_C.zeros") for k in load_file(tmp_path / "b" / FILE))
    with quiet():
        loaded = peft.PeftModel.from_pretrained(pair(), str(tmp_path / "b")).eval()
        assert not loaded.load_adapter(str(tmp_path / "b"), "default").unexpected_keys
    close(loaded(x), program(x))
    merged, changed = adaptc.merge(program), model.merge_and_unload()
    for name, value in changed.state_dict().items():
        close(merged.state_dict[name], value)
    assert "bare.bias" not in merged.state_dict


def test_gradients_are_peft_s_at_both_layers(tmp_path):
    model, x = by_peft(tmp_path, **KINDS["lora"]), inputs(5)
    loss(model(x)).backward()
    module = compile(tmp_path, training=True).module().eval()
    loss(module(x)).backward()
    found = {n.replace(".default", ""): p.grad for n, p in module.named_parameters() if p.requires_grad}
    expected = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert {f"base_model.model.{n}" for n in found} == set(expected)
    for name, grad in found.items():
        close(grad, expected[f"base_model.model.{name}"])


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("scheme", [True, False])
def test_first_values_are_peft_s(kind, scheme, tmp_path):
    options = {"target_modules": TARGETS, "init_weights": scheme, **KINDS[kind]}
    base = pair(torch.float32)
    torch.manual_seed(1)
    with quiet():
        peft.get_peft_model(base, peft.GloraConfig(**options)).save_pretrained(str(tmp_path / "a"))
    generator = torch.Generator().manual_seed(1)
    x = inputs(3).float()
    program = adaptc.compile(pair(torch.float32), GloraConfig(**options), example_inputs=x, generator=generator)
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    assert torch.allclose(program(x), pair(torch.float32)(x), atol=1e-6) is scheme


def test_adapters_that_act_together_read_the_base(tmp_path):
    """As in PEFT: what one adds depends neither on the weight nor on the bias that the other made."""
    for seed, (name, kind) in enumerate({"a": "lora", "b": "vector"}.items()):
        by_peft(tmp_path / name, seed, **KINDS[kind])
    with quiet():
        model = peft.PeftModel.from_pretrained(pair(), str(tmp_path / "a"), "a")
        model.load_adapter(str(tmp_path / "b"), "b")
    model.base_model.set_adapter(["a", "b"])
    x = inputs(3)
    expected = model.eval()(x)
    program = compile({n: tmp_path / n for n in "ab"})
    close(program(x), expected)
    merged = adaptc.merge(program)
    close(merged(x), expected)
    assert torch.equal(adaptc.unmerge(merged)(x), program(x))


@pytest.mark.long
def test_one_program_serves_all_ranks(tmp_path):
    ranks = (6, 1, 4)
    models = [by_peft(tmp_path / str(i), i, r=r) for i, r in enumerate(ranks)]
    program = compile(GloraConfig(r=3, target_modules=TARGETS))
    x = inputs(4)
    for i in (2, 0, 1):
        adaptc.swap(program, tmp_path / str(i))
        close(program(x), models[i](x))
    bank = program.bank({str(i): tmp_path / str(i) for i in range(3)})
    found = bank(x, adapters=["0", "2", None, "1"])
    close(found, torch.stack([models[0](x)[0], models[2](x)[1], pair()(x)[2], models[1](x)[3]]))


def test_values_where_the_config_has_nothing_are_refused(tmp_path):
    """PEFT reads them into what it calls zeros, and adds them."""
    by_peft(tmp_path, **KINDS["constant"])
    tensors = load_file(tmp_path / FILE)
    key = next(k for k in tensors if k.endswith("layer.glora_C.zeros"))
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"'glora_C.zeros' stands for a part that the config leaves out"):
        compile(tmp_path)


def test_files_without_the_zeros_are_read(tmp_path):
    model, x = by_peft(tmp_path, **KINDS["constant"]), inputs(3)
    tensors = load_file(tmp_path / FILE)
    save_file({k: t for k, t in tensors.items() if not k.endswith("zeros")}, tmp_path / FILE)
    close(compile(tmp_path)(x), model(x))


def test_a_saved_program_and_its_layers_without_a_bias(tmp_path):
    model, x = by_peft(tmp_path / "a", **KINDS["lora"]), inputs(3)
    loaded = adaptc.load(adaptc.save(compile(tmp_path / "a"), tmp_path / "program.pt2"))
    close(loaded(x), model(x))
    adaptc.save_adapter(loaded, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.pair(x)


def test_layers_inside_a_block(tmp_path):
    """The bias of a layer inside a block is changed before the block, from the same weight."""
    model, x = by_peft(tmp_path, **KINDS["vector"]), inputs(3)
    inner = Inside().double().eval()
    inner.pair.load_state_dict(pair().state_dict())
    tensors = {k.replace("base_model.model.", "pair."): t for k, t in load_file(tmp_path / FILE).items()}
    program = adaptc.compile(inner, GloraConfig(target_modules=TARGETS, **KINDS["vector"]), example_inputs=x)
    adaptc.swap(program, tensors)
    close(program(x), model(x))
    close(adaptc.merge(program)(x), model(x))


def test_packages_may_pad_the_rank():
    assert find_paddings(Glora(r=4), Op("linear", (21, 15), torch.ops.aten.linear.default), "weight")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"config_A_B": "matrix"}, "config_A_B must be one of lora, vector, constant, none, got 'matrix'"),
        ({"config_C": "constant"}, "config_C must be one of lora, vector, none"),
        ({"config_D_E": "lora"}, "config_D_E must be one of vector, constant, none"),
        (dict.fromkeys(("config_A_B", "config_C", "config_D_E"), "none"), "there is nothing to train"),
        ({"bias": "some"}, "'glora_only'"),
    ],
)
def test_bad_values_are_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        GloraConfig(**options)


def test_a_layer_with_nothing_to_adapt_is_refused():
    with pytest.raises(TargetError, match=r"'bare.weight'.*config_A_B='none' adapts the bias alone"):
        compile(GloraConfig(config_A_B="none", target_modules=TARGETS))


def test_config_has_peft_s_fields_and_defaults():
    assert as_stored(GloraConfig(target_modules=["q"])) == as_stored(peft_config("GloraConfig", target_modules=["q"]))
