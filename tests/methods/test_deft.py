"""DEFT: what is particular to it. The checks that hold for every method are in ``test_every_method``.

PEFT computes in float32 whatever the dtype, so it is compared up to float32's rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptc
from adaptc import ConfigError, DeftConfig
from adaptc.methods.weight_dependent.deft import Deft
from adaptc.passes.graph.ops import Op
from adaptc.runtime.rank_padding import find_paddings
from tests.support.chain import (
    FILE,
    TARGETS,
    as_stored,
    chain,
    compile_chain,
    inputs,
    load_peft_chain,
    peft_chain,
    peft_config,
    slots_by_file_key,
    tensor_files_are_equal,
)

#: the last one has more directions than the layers ``k`` and ``o`` have outputs
KINDS: dict[str, dict[str, Any]] = {
    "relu": {"r": 3},
    "relu scaled": {"r": 3, "alpha": 7},
    "qr": {"r": 3, "decomposition_method": "qr", "alpha": 2},
    "para": {"r": 3, "para": True},
    "para qr": {"r": 3, "para": True, "decomposition_method": "qr"},
    "many": {"r": 9, "alpha": 5, "decomposition_method": "qr", "target_modules": ["q", "k", "o"]},
}


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def theirs(path: Path, seed: int | None = None, random_values: bool = True, **options: Any) -> Any:
    return peft_chain(peft_config("DeftConfig", **options), path, torch.float32, random_values, seed)


@pytest.mark.parametrize("kind", list(KINDS))
def test_files_go_both_ways(kind, tmp_path):
    model, x = theirs(tmp_path / "a", **KINDS[kind]), inputs(5, torch.float32)
    program = compile_chain(tmp_path / "a", torch.float32)
    close(program(x), model(x))
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    close(load_peft_chain(tmp_path / "b", torch.float32)(x), model(x))
    merged, changed = adaptc.merge(program).state_dict, model.merge_and_unload().state_dict()
    for name, value in changed.items():
        close(merged[name], value)


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("scheme", [True, False])
def test_first_values_are_peft_s(tmp_path, kind, scheme):
    """P and a random R to the bit; an R that follows from the weight up to the order of sums."""
    options = {"target_modules": TARGETS, **KINDS[kind], "init_weights": scheme, "init_scale": 0.3}
    theirs(tmp_path / "a", seed=1, random_values=False, **options)
    generator = torch.Generator().manual_seed(1)
    program = compile_chain(DeftConfig(**options), torch.float32, generator=generator)
    adaptc.save_adapter(program, tmp_path / "b")
    found, expected = load_file(tmp_path / "b" / FILE), load_file(tmp_path / "a" / FILE)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        exact = "deft_P" in key or not scheme
        torch.testing.assert_close(found[key], value, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    same = torch.allclose(program(inputs(3, torch.float32)), chain(torch.float32)(inputs(3, torch.float32)), atol=1e-6)
    assert same is (scheme and not options.get("para", False))


@pytest.mark.parametrize("kind", ["relu scaled", "qr", "para"])
def test_dropout_is_that_of_peft(kind, tmp_path):
    """It acts on what the injection reads; what is removed is the whole."""
    model = theirs(tmp_path / "a", deft_dropout=0.5, **KINDS[kind]).train()
    module, x = compile_chain(tmp_path / "a", torch.float32, training=True).module(), inputs(4, torch.float32)
    torch.manual_seed(0)
    first, again = module(x), module(x)
    assert torch.allclose(first, again) is (kind == "para")
    torch.manual_seed(0)
    close(first, model(x))
    close(module.eval()(x), model.eval()(x))


def test_adapters_that_act_together_read_the_base_weight(tmp_path):
    """As in PEFT: what one removes does not depend on what the other changed."""
    for i, name in enumerate("ab"):
        path = tmp_path / name
        theirs(path, r=3 + i, decomposition_method=("relu", "qr")[i], target_modules=["q", "v"])
        tensors = load_file(path / FILE)
        torch.manual_seed(i)
        save_file({k: torch.randn_like(t) * 0.4 for k, t in tensors.items()}, path / FILE)
    model = load_peft_chain(tmp_path / "a", torch.float32)
    model.load_adapter(str(tmp_path / "b"), "b")
    model.base_model.set_adapter(["default", "b"])
    x = inputs(3, torch.float32)
    expected = model.eval()(x)
    for form in ("apply", "weight"):
        program = compile_chain({n: tmp_path / n for n in "ab"}, torch.float32, form=form)
        close(program(x), expected)
        close(adaptc.merge(program)(x), expected)


@pytest.mark.long
def test_one_program_serves_all_ranks_and_factors(tmp_path):
    kinds: list[Any] = [{"r": 6, "alpha": 3}, {"r": 2}, {"r": 9, "alpha": 30}]
    models = [theirs(tmp_path / str(i), **k, decomposition_method="qr") for i, k in enumerate(kinds)]
    program = compile_chain(DeftConfig(r=4, decomposition_method="qr", alpha=1, target_modules=TARGETS), torch.float32)
    x = inputs(4, torch.float32)
    for i in (2, 0, 1):
        adaptc.swap(program, tmp_path / str(i))
        close(program(x), models[i](x))
    bank = program.bank({str(i): tmp_path / str(i) for i in range(3)})
    found = bank(x, adapters=["0", "2", None, "1"])
    for row, i in ((0, 0), (1, 2), (3, 1)):
        close(found[row], models[i](x)[row])


@pytest.mark.parametrize("options", [{}, {"decomposition": "qr"}, {"para": True, "decomposition": "qr"}], ids=str)
@pytest.mark.parametrize("form", ["apply", "weight"])
def test_packages_may_pad_the_rank(form, options):
    op = Op("linear", (21, 15), torch.ops.aten.linear.default)
    assert find_paddings(Deft(r=4, **options), op, form)


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_a_column_without_a_direction_does_nothing(method):
    """Its values stay zero in training, and the gradients of the others are finite."""
    config = DeftConfig(r=3, decomposition_method=method, target_modules=["q"], init_weights=False)
    program = compile_chain(config, training=True)
    p, r = (slots_by_file_key(program)[f"q.deft_{n}"] for n in "PR")
    with torch.no_grad():
        p.normal_()
        r.normal_()
        p[:, 1] = 0
    smaller = compile_chain(DeftConfig(r=2, decomposition_method=method, target_modules=["q"]))
    adaptc.swap(smaller, {"q.deft_P": p[:, [0, 2]].detach().clone(), "q.deft_R": r[[0, 2]].detach().clone()})
    module = program.module()
    close(module(inputs(3)), smaller(inputs(3)), 1e-10)
    module(inputs(3)).square().sum().backward()
    assert p.grad is not None
    assert bool(p.grad.isfinite().all())
    assert bool(p.grad[:, 0].any())
    assert method == "relu" or not p.grad[:, 1].any()


def test_removed_directions_are_gone():
    """With para and qr, the outputs of the layer before its bias have no part along P."""
    program = compile_chain(DeftConfig(r=3, decomposition_method="qr", para=True, target_modules=["q"]))
    p = slots_by_file_key(program)["q.deft_P"].detach()
    left = p.T @ adaptc.merge(program).state_dict["q.weight"]
    assert bool((p.T @ chain().q.weight).abs().max() > 1e-3)
    close(left, torch.zeros_like(left), 1e-12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"decomposition_method": "svd"}, "must be 'relu' or 'qr', got 'svd'"),
        ({"deft_dropout": 1.0}, r"deft_dropout must lie in \[0, 1\)"),
        ({"init_scale": -1.0}, "init_scale must be at least 0"),
        ({"bias": "some"}, "'deft_only'"),
    ],
)
def test_bad_values_are_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        DeftConfig(**options)


def test_another_structure_needs_another_program(tmp_path):
    theirs(tmp_path / "a", r=3, para=True)
    program = compile_chain(DeftConfig(r=3, target_modules=TARGETS), torch.float32)
    with pytest.raises(adaptc.AdaptcError, match=r"para|deft_R"):
        adaptc.swap(program, tmp_path / "a")


def test_config_has_peft_s_fields_and_defaults():
    assert as_stored(DeftConfig(target_modules=["q"])) == as_stored(peft_config("DeftConfig", target_modules=["q"]))
