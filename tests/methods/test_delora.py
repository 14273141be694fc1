"""DeLoRA: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc.methods.weight_dependent.delora import Delora
from adaptc.passes.graph.ops import Op
from adaptc.runtime.rank_padding import find_paddings
from tests.support.chain import (
    TARGETS,
    chain,
    compile_chain,
    inputs,
    load_peft_chain,
    peft_chain,
    peft_config,
    slots_by_file_key,
    tensor_files_are_equal,
)
from tests.support.custom_models import OneLayer
from tests.support.subject import assert_close, loss

LINEAR = Op("linear", (7, 5), torch.ops.aten.linear.default)


def factors(r: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random slots at ``LINEAR``."""
    torch.manual_seed(5)
    shapes = {"delora_A": (r, 5), "delora_B": (7, r), "delora_lambda": (1,), "delora_w_norm": (5,)}
    return {n: torch.rand(s).to(dtype) - 0.4 for n, s in shapes.items()}


@pytest.mark.parametrize("init", [True, False])
def test_first_values_and_files_are_peft_s(init, tmp_path):
    """The lengths of the weight's columns are in the file, and what training starts from is the same bit by bit."""
    options = {"r": 5, "delora_lambda": 7, "init_weights": init, "rank_pattern": {"k": 3}, "lambda_pattern": {"v": 2.5}}
    peft_chain(peft_config("DeloraConfig", **options), tmp_path / "a", torch.float32, random_values=False, seed=1)
    config = adaptc.DeloraConfig(target_modules=TARGETS, **options)
    program = compile_chain(config, torch.float32, generator=torch.Generator().manual_seed(1))
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    slots = slots_by_file_key(program)
    assert torch.equal(slots["k.delora_w_norm"], chain(torch.float32).k.weight.norm(dim=0))
    assert [slots[f"{n}.delora_lambda"].item() for n in TARGETS] == [7, 7, 2.5]
    assert [slots[f"{n}.delora_A"].shape[0] for n in TARGETS] == [5, 3, 5]
    assert_close(load_peft_chain(tmp_path / "b", torch.float32)(inputs(3).float()), program(inputs(3).float()), 1e-5)


@pytest.mark.long
def test_adapters_of_other_ranks_and_bounds(tmp_path):
    """A program takes them by a swap. The lengths are those of the file, whatever the weight is now."""
    models = [
        peft_chain(peft_config("DeloraConfig", r=r, delora_lambda=bound), tmp_path / str(r))
        for r, bound in ((4, 3), (6, 0.5))
    ]
    program = compile_chain(adaptc.DeloraConfig(r=2, target_modules=TARGETS))
    for r, model in ((4, models[0]), (6, models[1])):
        adaptc.swap(program, tmp_path / str(r))
        assert_close(program(inputs(4)), model(inputs(4)), 1e-10)
        adaptc.save_adapter(program, tmp_path / f"again {r}")
        assert tensor_files_are_equal(tmp_path / str(r), tmp_path / f"again {r}")
    other = chain()
    with torch.no_grad():
        other.k.weight.mul_(3)
    found = adaptc.compile(other, tmp_path / "4", example_inputs=inputs(3))(inputs(4))
    assert_close(found, peft.PeftModel.from_pretrained(other, str(tmp_path / "4")).eval()(inputs(4)), 1e-10)


def test_the_change_is_bounded_and_lengths_do_not_count():
    slots = factors()
    slots["delora_w_norm"] = torch.ones(5, dtype=torch.float64)
    W, scale = torch.zeros(7, 5, dtype=torch.float64), torch.tensor(1 / 3, dtype=torch.float64)
    change = Delora(3).weight(LINEAR, W, slots, scale)
    assert 0 < float(change.norm()) <= float(slots["delora_lambda"].abs())
    lengths = torch.tensor([3.0, 0.25, 90.0], dtype=torch.float64)
    other = {**slots, "delora_A": slots["delora_A"] * lengths.unsqueeze(1), "delora_B": slots["delora_B"] / lengths}
    assert_close(Delora(3).weight(LINEAR, W, other, scale), change, 1e-12)


@pytest.mark.parametrize("value", [0.0, 1e-7])
def test_short_vectors_are_divided_by_the_least_length(value):
    """As in PEFT: a vector of zeros stays one, and gradients stay finite."""
    slots = factors()
    with torch.no_grad():
        slots["delora_A"][1], slots["delora_B"][:, 2] = value, value
    leaves = {n: t.requires_grad_() for n, t in slots.items() if n != "delora_w_norm"}
    W = torch.zeros(7, 5, dtype=torch.float64)
    found = Delora(3).weight(LINEAR, W, slots, torch.tensor(1 / 3, dtype=torch.float64))
    a, b, bound, lengths = slots.values()
    divisor = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
    expected = (b @ torch.diag(bound / 3 / divisor) @ a) * lengths
    assert_close(found, expected, 1e-12)
    grads, wanted = (torch.autograd.grad(loss(t), [*leaves.values()], retain_graph=True) for t in (found, expected))
    assert_close(grads, wanted, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_short_and_long_vectors(dtype):
    """PEFT divides by a product of lengths there, which is zero in float16, and has NaN."""
    slots = factors(dtype=dtype)
    slots["delora_A"][0] *= 5e4 / float(slots["delora_A"][0].abs().max())  # whose length is above float16's numbers
    slots["delora_A"][0, 1:3] = 5e4
    slots["delora_A"][1], slots["delora_B"][:, 1] = 1e-6, 1e-6
    W, scale, exact = torch.zeros(7, 5, dtype=dtype), torch.tensor(1 / 3), {n: t.double() for n, t in slots.items()}
    expected = Delora(3).weight(LINEAR, W.double(), exact, scale.double())
    for found in (
        Delora(3).weight(LINEAR, W, slots, scale),
        Delora(3).apply(LINEAR, torch.eye(5, dtype=dtype), torch.zeros(5, 7, dtype=dtype), W, None, slots, scale).T,
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.01)


@pytest.mark.long
def test_several_add_up_as_in_peft(tmp_path):
    for i, name in enumerate(("one", "two")):
        peft_chain(peft_config("DeloraConfig", r=3 + i), tmp_path / name, seed=i)
    program = compile_chain({n: tmp_path / n for n in ("one", "two")})
    wrapped = peft.PeftModel.from_pretrained(chain(), str(tmp_path / "one"), adapter_name="one")
    wrapped.load_adapter(str(tmp_path / "two"), adapter_name="two")
    wrapped.base_model.set_adapter(["one", "two"])
    want = wrapped.eval()(inputs(4))
    assert_close(program(inputs(4)), want, 1e-10)
    assert_close(adaptc.merge(program)(inputs(4)), want, 1e-10)


def test_dropout_is_peft_s(tmp_path):
    """Single inputs are dropped, whatever the option's name says."""
    peft_chain(peft_config("DeloraConfig", r=3, module_dropout=0.4), tmp_path, seed=2)
    module = compile_chain(tmp_path, training=True).module()
    wrapped = peft.PeftModel.from_pretrained(chain(), str(tmp_path), is_trainable=True)
    x = inputs(4)
    for train in (True, False):
        outputs = []
        for m in (wrapped.train(train), module.train(train)):
            torch.manual_seed(8)
            outputs += [m(x), m(x)]
        assert_close(outputs[:2], outputs[2:], 1e-10)
        assert torch.allclose(outputs[0], outputs[1]) != train


def test_the_bound_is_trained_and_the_lengths_are_not():
    program = compile_chain(adaptc.DeloraConfig(r=3, target_modules=["k"], init_weights=False), training=True)
    module = program.module()
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {
        f"k.delora_{n}.default" for n in ("A", "B", "lambda")
    }
    before = slots_by_file_key(program)["k.delora_w_norm"].clone()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    loss(module(inputs(4))).backward()
    optimizer.step()
    after = slots_by_file_key(program)
    assert after["k.delora_lambda"].item() != 15
    assert torch.equal(after["k.delora_w_norm"], before)


def test_a_factor_is_one_on_the_bound(tmp_path):
    """PEFT has no factor for DeLoRA."""
    peft_chain(peft_config("DeloraConfig", r=3), tmp_path, seed=2)
    program = compile_chain(tmp_path)
    with program.scaled(0.25):
        found = program(inputs(4))
    with torch.no_grad():
        for name, t in slots_by_file_key(program).items():
            t.mul_(0.25 if name.endswith("lambda") else 1)
    assert_close(program(inputs(4)), found, 1e-12)
    with pytest.raises(AssertionError):
        assert_close(compile_chain(tmp_path)(inputs(4)), found, 1e-3)


def test_convolutions_are_matrices():
    torch.manual_seed(6)
    layer, x = nn.Conv1d(6, 9, 3, groups=3).double(), torch.randn(2, 6, 7, dtype=torch.float64)
    config = adaptc.DeloraConfig(r=4, target_modules=["layer"], init_weights=False)
    program = adaptc.compile(OneLayer(layer), config, example_inputs=x)
    (site,) = program.adaptation.attachments
    a, b, bound, lengths = (program.binding.values[f].double() for f in site.slots.values())
    rows = layer.weight.detach().reshape(9, 6)
    assert_close(lengths.double(), rows.norm(dim=0), 1e-6)
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=0)
    weight = (rows + bound / 4 * (b @ a) * lengths).reshape(9, 2, 3)
    expected = torch.tanh(nn.functional.conv1d(x, weight, layer.bias, groups=3))
    assert_close(program(x), expected, 1e-9)


def test_ranks_can_be_padded():
    for form in ("apply", "weight"):
        assert find_paddings(Delora(r=2), LINEAR, form)


def refused() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"r": 0}, "DeloraConfig.r must be a positive integer"),
        ({"rank_pattern": {"up": -1}}, r"rank_pattern\['up'\] must be a positive integer"),
        ({"module_dropout": 1.0}, "module_dropout must lie in"),
        ({"bias": "lora_only"}, "'none', 'all' or 'delora_only'"),
        ({"delora_lambda": float("nan")}, "delora_lambda"),
        ({"lambda_pattern": {"up": "many"}}, r"lambda_pattern\['up'\]"),
        ({"init_weights": "gaussian"}, "init_weights must be True or False"),
    ]


@pytest.mark.parametrize(("options", "why"), refused(), ids=lambda v: str(v)[:20])
def test_refusals(options, why):
    with pytest.raises(adaptc.ConfigError, match=why):
        adaptc.DeloraConfig(**options)


def test_a_pattern_that_matches_nothing_is_told():
    config = adaptc.DeloraConfig(target_modules=TARGETS, lambda_pattern={"o": 3})
    with pytest.raises(adaptc.TargetError, match=r"lambda_pattern: 'o' matches no adapted module"):
        compile_chain(config)


def test_a_file_without_the_lengths_is_refused(tmp_path: Path):
    peft_chain(peft_config("DeloraConfig", r=3), tmp_path)
    program = compile_chain(tmp_path)
    tensors = {k: t for k, t in slots_by_file_key(program).items() if k != "k.delora_w_norm"}
    with pytest.raises(adaptc.CheckpointError, match=r"'k.delora_w_norm' is missing"):
        adaptc.swap(program, tensors)
