"""IA3: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.ia3 import IA3Layer
from torch import Tensor, nn

import adaptc
from adaptc.binding.sources.configs import as_config
from adaptc.passes.graph.ops import Op
from tests.support.families import FAMILIES


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up_proj = nn.Linear(5, 11)
        self.down_proj = nn.Linear(11, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.up_proj(x)))


X = torch.linspace(-2, 3, 15).reshape(3, 5)
BOTH = ["up_proj", "down_proj"]


def compile(adapter: Any, **options: Any) -> adaptc.AdaptedProgram:
    return adaptc.compile(Net().eval(), adapter, example_inputs=X, **options)


def by_peft(path: Path, feedforward: Any, seed: int = 1) -> peft.PeftModel:
    """A random adapter of PEFT's, saved to ``path``."""
    config = peft.IA3Config(target_modules=BOTH, feedforward_modules=feedforward)
    model = peft.get_peft_model(Net(), config).eval()
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "ia3_l" in name:
            nn.init.normal_(p)
    model.save_pretrained(str(path))
    return model


@pytest.mark.parametrize("feedforward", [["down_proj"], ".*own_.*", "own_proj", [], BOTH])
def test_feedforward_modules_match_as_in_peft(feedforward, tmp_path):
    model = by_peft(tmp_path, feedforward)
    program = compile(tmp_path)
    torch.testing.assert_close(program(X), model(X))
    shapes = {k: v.shape for k, v in model.state_dict().items() if "ia3_l" in k}
    for a in program.adaptation.attachments:
        (slot,) = a.method.slots(program.ops[a.id]).values()
        assert slot.shape == tuple(shapes[f"base_model.model.{a.key}.ia3_l.default"])


def test_a_list_names_endings_even_of_a_part():
    """PEFT asks whether a name ends with an entry, not where its parts begin."""
    config = adaptc.IA3Config(target_modules=".*_proj", feedforward_modules=["wn_proj"])
    made = {n: config.method(n, "linear").feedforward for n in ("a.up_proj", "a.down_proj")}
    assert made == {"a.up_proj": False, "a.down_proj": True}


def test_feedforward_belongs_to_the_adapter(tmp_path):
    """Two adapters that scale different sides of one layer: PEFT gives the second the side of the first."""
    first, second = by_peft(tmp_path / "a", ["down_proj"]), by_peft(tmp_path / "b", ["up_proj"], seed=2)
    expected = [first(X), second(X)]
    program = compile([tmp_path / "a", tmp_path / "b"])
    for path, y in zip(("a", "b", "a"), (*expected, expected[0]), strict=True):
        adaptc.swap(program, tmp_path / path)
        torch.testing.assert_close(program(X), y)
        torch.testing.assert_close(adaptc.merge(program)(X), y)


def test_another_side_needs_a_program_compiled_for_it(tmp_path):
    by_peft(tmp_path / "a", ["down_proj"])
    by_peft(tmp_path / "b", ["up_proj"])
    program = compile(tmp_path / "a")
    before = program(X)
    with pytest.raises(adaptc.SwapError, match="ia3_l"):
        adaptc.swap(program, tmp_path / "b")
    assert torch.equal(program(X), before)


def test_first_values_are_those_of_peft():
    config = {"target_modules": BOTH, "feedforward_modules": ["down_proj"], "init_ia3_weights": False}
    model, net = Net().eval(), Net().eval()
    torch.manual_seed(4)
    wrapped = peft.get_peft_model(model, peft.IA3Config(**config)).eval()
    torch.manual_seed(4)
    program = adaptc.compile(net, adaptc.IA3Config(**config), example_inputs=X)
    assert torch.equal(program(X), wrapped(X))


def test_unmerge_survives_factors_of_zero():
    """PEFT divides by the factors."""
    program = compile(adaptc.IA3Config(target_modules=BOTH, feedforward_modules=["down_proj"]))
    zero = {
        "up_proj.ia3_l": torch.zeros(11, 1),
        "down_proj.ia3_l": torch.tensor([[0.0, *range(1, 11)]]),
    }
    adaptc.swap(program, zero)
    merged = adaptc.merge(program)
    assert not merged.state_dict["up_proj.bias"].any()
    torch.testing.assert_close(merged(X), Net().down_proj.bias.expand(3, -1))
    unloaded = adaptc.unload(adaptc.unmerge(merged))
    assert all(torch.equal(v, Net().state_dict()[k]) for k, v in unloaded.state_dict.items())


def test_inputs_of_grouped_convolutions():
    """Each group has channels of its own, though the weight has one group's columns only."""
    conv = nn.Conv2d(6, 9, 3, groups=3)
    target = torch.ops.aten.conv2d.default
    op = Op("conv2d", tuple(conv.weight.shape), target, ((1, 1), (0, 0), (1, 1), 3))
    method = adaptc.IA3Config(feedforward_modules="x").method("x", "conv2d")
    factors = torch.randn(1, 6, 1, 1)
    x = torch.randn(2, 6, 5, 4)
    made = method.weight(op, conv.weight, {"ia3_l": factors}, None)
    torch.testing.assert_close(op(x, made, conv.bias), conv(x * factors))


def test_refusals():
    with pytest.raises(adaptc.ConfigError, match=r"\['dwn_proj'\] are not \(nearest: \['down_proj'"):
        adaptc.IA3Config(target_modules=BOTH, feedforward_modules=["dwn_proj"])
    with pytest.raises(adaptc.ConfigError, match="not a valid regular expression"):
        adaptc.IA3Config(target_modules=BOTH, feedforward_modules="(")
    with pytest.raises(adaptc.TargetError, match=r"'dwn_proj' ends no name of a module; nearest: \['down_proj'"):
        compile(adaptc.IA3Config(target_modules="all-linear", feedforward_modules=["dwn_proj"]))
    with pytest.raises(adaptc.ConfigError, match=r"feedforward_modules is None.* or say \[\] for none"):
        compile(adaptc.IA3Config(target_modules=BOTH))


@pytest.mark.long
@pytest.mark.parametrize("targets", [None, ["q_proj"], ["layers.0.mlp.down_proj", "k_proj"], ".*_proj"])
def test_defaults_of_a_model_are_those_of_peft(targets, tmp_path):
    family = FAMILIES["llama"]
    model, inputs = family.build().eval(), family.inputs(2, 5)
    program = adaptc.compile(model, adaptc.IA3Config(target_modules=targets), example_inputs=inputs)
    found = {a.module: a.method.feedforward for a in program.adaptation.attachments}
    modules = peft.get_peft_model(model, peft.IA3Config(target_modules=targets)).base_model.model.named_modules()
    assert found == {n: m.is_feedforward for n, m in modules if isinstance(m, IA3Layer)}
    written = as_config(adaptc.save_adapter(program, tmp_path))
    assert {n: written.method(n, "linear").feedforward for n in found} == found
    peft.IA3Config.from_pretrained(str(tmp_path))


def test_config_has_the_fields_of_peft(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = compile(adaptc.IA3Config(target_modules=BOTH, feedforward_modules=["down_proj"]))
        loaded = peft.IA3Config.from_pretrained(str(adaptc.save_adapter(program, tmp_path)))
    assert loaded.feedforward_modules == {"down_proj"}
