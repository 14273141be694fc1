"""MiSS: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc
from adaptc.runtime.rank_padding import find_paddings
from tests.support.custom_models import OneLayer

X = torch.linspace(-2, 3, 5 * 15).reshape(5, 15)
FILE = "adapter_model.safetensors"


def net(inputs: int = 15, outputs: int = 21) -> nn.Module:
    torch.manual_seed(3)
    return OneLayer(nn.Linear(inputs, outputs)).eval()


def config(**options: Any) -> adaptc.MissConfig:
    return adaptc.MissConfig(target_modules=["layer"], **options)


def compile(adapter: Any, **options: Any) -> adaptc.AdaptedProgram:
    return adaptc.compile(net(), adapter, example_inputs=X, **options)


def by_peft(path: Path, seed: int = 1, **options: Any) -> peft.PeftModel:
    """A random adapter of PEFT's, saved to ``path``."""
    model = peft.get_peft_model(net(), peft.MissConfig(target_modules=["layer"], **options)).eval()
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "miss_" in name:
            nn.init.normal_(p, std=0.3)
    model.save_pretrained(str(path))
    return model


def as_bone(path: Path) -> None:
    """The adapter in ``path`` as PEFT wrote it before MiSS was there."""
    data = json.loads((path / "adapter_config.json").read_text())
    for name in ("miss_dropout", "mini_r"):
        del data[name]
    (path / "adapter_config.json").write_text(json.dumps(data | {"peft_type": "BONE"}))
    tensors = load_file(path / FILE)
    save_file({k.replace("miss_block", "bone_block"): t for k, t in tensors.items()}, path / FILE)


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 3, "init_weights": "bat"}])
def test_files_of_bone_are_read_and_written_as_miss(options, tmp_path):
    model = by_peft(tmp_path / "bone", **options)
    as_bone(tmp_path / "bone")
    program = compile(tmp_path / "bone")
    torch.testing.assert_close(program(X), model(X))
    written = adaptc.save_adapter(program, tmp_path / "miss")
    again = peft.PeftModel.from_pretrained(net(), str(written)).eval()
    torch.testing.assert_close(again(X), model(X))
    other = by_peft(tmp_path / "other", seed=2, **options)
    as_bone(tmp_path / "other")
    adaptc.swap(program, tmp_path / "other")
    torch.testing.assert_close(program(X), other(X))


def test_both_names_of_a_tensor_at_once(tmp_path):
    by_peft(tmp_path, r=4)
    tensors = load_file(tmp_path / FILE)
    save_file({**tensors, **{k.replace("miss_", "bone_"): t.clone() for k, t in tensors.items()}}, tmp_path / FILE)
    with pytest.raises(adaptc.CheckpointError, match="same tensor"):
        compile(tmp_path)


def test_modes_belong_to_the_adapter(tmp_path):
    """PEFT keeps one mode for all adapters of a layer, and fails when they differ."""
    kinds = {
        "a": {"r": 4},
        "b": {"r": 3, "init_weights": "bat"},
        "c": {"r": 5, "init_weights": "mini", "mini_r": 7},
        "d": {"r": 15, "init_weights": "mini", "mini_r": 3},
    }
    models = {n: by_peft(tmp_path / n, seed=i, **k) for i, (n, k) in enumerate(kinds.items())}
    program = compile([tmp_path / n for n in kinds])
    for name in ("d", "b", "a", "c"):
        adaptc.swap(program, tmp_path / name)
        torch.testing.assert_close(program(X), models[name](X))
        torch.testing.assert_close(adaptc.merge(program)(X), models[name](X))


def test_blocks_of_another_size_need_a_program_compiled_for_them(tmp_path):
    by_peft(tmp_path, r=1, init_weights="bat")
    program = compile(config(r=3, init_weights="bat"))
    with pytest.raises(adaptc.SwapError, match="miss_block"):
        adaptc.swap(program, tmp_path)


def test_the_rank_of_a_bare_state_dict_is_that_of_its_tensors(tmp_path):
    model = by_peft(tmp_path, r=7)
    program = compile(config(r=4))
    adaptc.swap(program, load_file(tmp_path / FILE))
    torch.testing.assert_close(program(X), model(X))
    torch.testing.assert_close(adaptc.merge(program)(X), model(X))


def test_first_values_are_those_of_peft():
    first, second = net(), net()
    torch.manual_seed(4)
    options = {"target_modules": ["layer"], "r": 4, "init_weights": False}
    wrapped = peft.get_peft_model(first, peft.MissConfig(**options)).eval()
    torch.manual_seed(4)
    program = adaptc.compile(second, adaptc.MissConfig(**options), example_inputs=X)
    torch.testing.assert_close(program(X), wrapped(X), rtol=1e-6, atol=1e-6)


def test_dropout_is_that_of_peft(tmp_path):
    """With one seed the same inputs are dropped, if r divides them: PEFT drops the padding it needs otherwise too."""
    model = by_peft(tmp_path, r=5, miss_dropout=0.4).train()
    module = compile(tmp_path, training=True, form="apply").module()
    outputs: list[Tensor] = []
    for m in (model, module):
        torch.manual_seed(8)
        m.train()
        outputs += [m(X), m(X)]
        m.eval()
    torch.testing.assert_close(outputs[:2], outputs[2:])
    assert not torch.allclose(outputs[0], outputs[1])
    torch.testing.assert_close(module(X), model(X))


def test_dropout_in_bat(tmp_path):
    """PEFT has the option and ignores it. Here it drops inputs of the change, and what is kept is scaled up."""
    model = by_peft(tmp_path, r=3, init_weights="bat", miss_dropout=0.5)
    program = compile(tmp_path, training=True, form="apply")
    module = program.module()
    module.eval()
    torch.testing.assert_close(module(X), model(X))
    module.train()
    torch.manual_seed(8)
    found = module(X)
    torch.manual_seed(8)
    dropped = nn.functional.dropout(X, 0.5)
    weights, base = adaptc.merge(program).state_dict, net()
    change = nn.functional.linear(dropped, weights["layer.weight"] - base.layer.weight)
    torch.testing.assert_close(found, torch.tanh(base.layer(X) + change))


def test_packages_may_pad_the_rank():
    program = compile(config(r=4))
    (a,) = program.adaptation.attachments
    for form in ("apply", "weight"):
        assert find_paddings(a.method, program.ops[a.id], form)


def test_refusals():
    for options, why in (
        ({"r": 0}, "r must be a positive integer"),
        ({"mini_r": True}, "mini_r must be an integer"),
        ({"miss_dropout": 1.0}, "must lie in"),
        ({"init_weights": "batt"}, "True, False, 'bat' or 'mini', got 'batt'"),
        ({"bias": "some"}, "bias must be"),
    ):
        with pytest.raises(adaptc.ConfigError, match=why):
            config(**options)
    for options, why in (
        ({"r": 4, "init_weights": "bat"}, r"'layer.weight'.*\(21, 15\).*r=4 does not divide both; r may be 1, 3"),
        ({"r": 4, "init_weights": "mini", "mini_r": 5}, "mini_r=5 .* along 21 outputs.* mini_r may be 1, 3, 7, 21"),
        ({"r": 16}, "at most 15, the inputs of this weight, got r=16"),
    ):
        with pytest.raises(adaptc.TargetError, match=why):
            compile(config(**options))
