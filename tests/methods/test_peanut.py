"""PEANuT: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

import adaptc
from adaptc.methods.weight_dependent.peanut import Peanut
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
from tests.support.subject import assert_close, assert_valid, loss

#: those with parameters, which are refused
LEARNED = ("prelu", "xielu")
LINEAR = Op("linear", (7, 5), torch.ops.aten.linear.default)
IDS = torch.tensor([[3, 9, 22], [0, 4, 9], [7, 7, 1], [11, 2, 3]])


def network(h: Tensor, f: Any, encoders: list[Tensor], decoders: list[Tensor]) -> Tensor:
    """The formula: encoders, then decoders with what the encoder of their level was given."""
    levels = [f(h)]
    for e in encoders:
        levels.append(f(levels[-1] @ e.T))
    h = levels.pop()
    for d in decoders:
        h = f(h @ d.T) + levels.pop()
    return h


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("depth", [0, 2])
def test_first_values_and_files_are_peft_s(depth, init, tmp_path):
    options = {"r": 5, "depth": depth, "init_weights": init}
    peft_chain(peft_config("PeanutConfig", **options), tmp_path / "a", torch.float32, random_values=False, seed=1)
    config = adaptc.PeanutConfig(target_modules=TARGETS, **options)
    program = compile_chain(config, torch.float32, generator=torch.Generator().manual_seed(1))
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    names = ["peanut_A.weight", "peanut_B.weight"]
    names += [f"peanut_{kind}.{i}.weight" for kind in ("encoders", "decoders") for i in range(depth)]
    assert set(slots_by_file_key(program)) == {f"{t}.{n}" for t in TARGETS for n in names}
    assert_close(load_peft_chain(tmp_path / "b", torch.float32)(inputs(3).float()), program(inputs(3).float()), 1e-5)


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - set(LEARNED)))
def test_every_activation(name):
    """The change of the weight is the formula's, around the layer too."""
    torch.manual_seed(5)
    method = Peanut(r=3, depth=2, activation=name)
    slots = {n: torch.randn(s.shape, dtype=torch.float64) for n, s in method.slots(LINEAR).items()}
    W, x = torch.randn(7, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    a, b, *inner = slots.values()
    hidden = network((a @ W).T, ACT2FN[name], inner[:2], inner[2:])
    expected = W + 0.5 * b @ hidden.T
    scale = torch.tensor(0.5, dtype=torch.float64)
    assert_close(method.weight(LINEAR, W, slots, scale), expected, 1e-12)
    assert_close(method.call_adapted(LINEAR, x, W, None, slots, scale), x @ expected.T, 1e-12)
    assert adaptc.PeanutConfig(act_fn=name).method("up", "linear").activation == name


def test_every_activation_of_peft_s_is_known():
    assert {n for n in ACT2FN if any(True for _ in ACT2FN[n].parameters())} == set(LEARNED)


@pytest.mark.parametrize("name", LEARNED)
def test_activations_with_parameters_are_refused(name):
    """PEFT makes a module of them anew in each call, so nothing of it is ever trained or saved."""
    with pytest.raises(adaptc.ConfigError, match=rf"act_fn='{name}' is not supported.*no file holds.*'leaky_relu'"):
        adaptc.PeanutConfig(act_fn=name)


@pytest.mark.long
def test_an_activation_is_part_of_the_code(tmp_path):
    """Adapters of another activation or depth need regions of their own, ranks and factors do not."""
    kinds = {
        "a": {"r": 4},
        "b": {"r": 4, "act_fn": "tanh"},
        "c": {"r": 3, "depth": 1},
        "d": {"r": 6, "depth": 1, "scaling": 0.25},
    }
    models = {n: peft_chain(peft_config("PeanutConfig", **k), tmp_path / n) for n, k in kinds.items()}
    program = compile_chain([tmp_path / n for n in kinds])
    assert len(program.adaptation.attachments) == 3 * len(TARGETS)
    for name in ("d", "b", "a", "c"):
        adaptc.swap(program, tmp_path / name)
        assert_close(program(inputs(4)), models[name](inputs(4)), 1e-10)
        assert_close(adaptc.merge(program)(inputs(4)), models[name](inputs(4)), 1e-10)
    with pytest.raises(adaptc.SwapError, match="peanut"):
        adaptc.swap(compile_chain(tmp_path / "a"), tmp_path / "b")


@pytest.mark.long
@pytest.mark.parametrize("form", ["auto", "weight"])
def test_changes_of_several_add_up(form, tmp_path):
    """Each network reads the model's own weight, not what the one before made of it; gradients and merge too."""
    names = ("one", "two")
    for i, name in enumerate(names):
        peft_chain(peft_config("PeanutConfig", r=3 + i, depth=i, act_fn="tanh"), tmp_path / name, seed=i)
    program = compile_chain({n: tmp_path / n for n in names}, training=True, form=form)
    assert_valid(program)
    wrapped = peft.PeftModel.from_pretrained(chain(), str(tmp_path / "one"), adapter_name="one", is_trainable=True)
    wrapped.load_adapter(str(tmp_path / "two"), adapter_name="two", is_trainable=True)
    wrapped.base_model.set_adapter(list(names))
    want = wrapped.eval()(inputs(4))
    assert_close(program(inputs(4)), want, 1e-10)
    alone = adaptc.compile(adaptc.merge(compile_chain(tmp_path / "one")), tmp_path / "two")
    assert not torch.allclose(alone(inputs(4)), want, rtol=1e-3)  # one after the other is something else
    assert_close(adaptc.merge(program)(inputs(4)), want, 1e-10)
    module = program.module().eval()
    for out in (module(inputs(4)), want):
        loss(out).backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in wrapped.named_parameters() if "peanut_" in n}
    assert set(grads) == set(expected)
    assert len(grads) == len(TARGETS) * (2 + 4)
    for name, grad in expected.items():
        assert_close(grads[name], grad, 1e-9)


def test_an_embedding_sends_the_columns_it_reads():
    """The network has as many inputs as there are tokens, and not as the vocabulary has."""
    torch.manual_seed(2)
    model = OneLayer(nn.Embedding(23, 15, padding_idx=9)).double()
    with torch.no_grad():
        model.layer.weight[9] = 1.5  # a model may have trained this row
    config = adaptc.PeanutConfig(r=3, depth=1, act_fn="silu", target_modules=["layer"], init_weights=False)
    grads: list[list[Tensor | None]] = []
    state: dict[str, Tensor] = {}
    for form in ("apply", "weight"):
        program = adaptc.compile(model, config, example_inputs=IDS, training=True, form=form)
        if grads:
            adaptc.swap(program, state)
        else:
            state = {k: t.detach().clone() for k, t in slots_by_file_key(program).items()}
        assert any(tuple(n.meta["val"].shape[-2:]) == (23, 3) for n in program.graph.nodes if "val" in n.meta) == (
            form == "weight"
        )
        a, b, e, d = (t.double() for t in state.values())
        table = model.layer.weight.detach()
        table = table + network(table @ a.T, nn.functional.silu, [e], [d]) @ b.T
        assert_close(program(IDS), torch.tanh(table[IDS]), 1e-9)
        module = program.module().eval()
        loss(module(IDS)).backward()
        grads.append([p.grad for _, p in sorted(module.named_parameters()) if p.grad is not None])
    assert_close(*grads, 1e-9)
    assert len(grads[0]) == 4


def test_around_a_layer_the_change_is_no_matrix():
    program = compile_chain(adaptc.PeanutConfig(r=3, target_modules=["q"]), form="apply")
    added = [n for n in program.graph.nodes if "adaptc" in n.meta.get("custom", {})]
    views = ("t", "reshape", "view", "transpose")
    sizes = {str(tuple(n.meta["val"].shape)) for n in added if n.target.overloadpacket.__name__ not in views}
    assert "(12, 3)" in sizes
    assert not sizes & {"(20, 12)", "(12, 20)"}


def test_ranks_can_be_padded():
    """With activations that do not take zero to zero, too: B has no column for such a row."""
    for activation in ("relu", "sigmoid"):
        for form in ("apply", "weight"):
            assert find_paddings(Peanut(r=2, depth=1, activation=activation), LINEAR, form)


def test_a_factor_is_one_on_the_change(tmp_path):
    model = peft_chain(peft_config("PeanutConfig", r=3, scaling=2.0), tmp_path / "a")
    program = compile_chain(tmp_path / "a")
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    for module in model.modules():
        if hasattr(module, "peanut_A"):
            module.scaling["default"] *= 0.25
    with program.scaled(0.25):
        assert_close(program(inputs(4)), model(inputs(4)), 1e-10)


def refused() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"r": 0}, "PeanutConfig.r must be a positive integer"),
        ({"depth": -1}, "PeanutConfig.depth must be an integer of at least 0"),
        ({"depth": 10**6}, "PeanutConfig.depth must be at most 1000"),
        ({"act_fn": "rely"}, r"act_fn must be one of gelu, .*, got 'rely' \(nearest: 'relu'\)"),
        ({"scaling": float("inf")}, "scaling"),
        ({"init_weights": "gaussian"}, "init_weights must be True or False"),
    ]


@pytest.mark.parametrize(("options", "why"), refused(), ids=lambda v: str(v)[:20])
def test_refusals(options, why):
    with pytest.raises(adaptc.ConfigError, match=why):
        adaptc.PeanutConfig(**options)


def test_a_file_of_another_depth_is_refused(tmp_path: Path):
    peft_chain(peft_config("PeanutConfig", r=3, depth=2), tmp_path)
    program = compile_chain(adaptc.PeanutConfig(r=3, depth=1, target_modules=TARGETS))
    with pytest.raises(adaptc.SwapError, match="peanut_"):
        adaptc.swap(program, tmp_path)
