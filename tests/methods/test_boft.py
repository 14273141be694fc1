"""BOFT: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc
import tests.support.block_diagonal  # noqa: F401  # PEFT has several factors only with its extension
from adaptc.methods.orthogonal.boft import Boft
from adaptc.passes.graph.ops import Op
from tests.support.custom_models import OneLayer

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(24, 11), torch.linspace(-2, 3, 72).reshape(3, 24)),
    "conv2d": (lambda: nn.Conv2d(4, 7, 3, padding=1), torch.linspace(-2, 3, 120).reshape(1, 4, 6, 5)),
}


def model(layer: str = "linear") -> OneLayer:
    torch.manual_seed(3)
    return OneLayer(LAYERS[layer][0]()).eval()


def options(**changes: Any) -> dict[str, Any]:
    return {"target_modules": ["layer"], **changes}


def by_peft(path: Path, layer: str = "linear", **changes: Any) -> peft.PeftModel:
    """A random adapter of PEFT's, saved to ``path``."""
    torch.manual_seed(4)
    wrapped = peft.get_peft_model(model(layer), peft.BOFTConfig(**options(init_weights=False, **changes))).eval()
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "boft_" in n:
                p.copy_(torch.randn(p.shape))
    wrapped.save_pretrained(str(path))
    return wrapped


def compiled(adapter: Any, layer: str = "linear", **more: Any) -> adaptc.AdaptedProgram:
    return adaptc.compile(model(layer), adapter, example_inputs=LAYERS[layer][1], **more)


def test_fields_and_defaults_are_pefts():
    theirs = vars(peft.BOFTConfig())
    ours = {k: v for k, v in vars(adaptc.BOFTConfig()).items() if k not in ("peft_version", "target_parameters")}
    assert ours == {k: theirs[k] for k in ours}
    assert set(theirs) - set(ours) == {"peft_type", "peft_version"}


@pytest.mark.long
@pytest.mark.parametrize("layer", list(LAYERS))
def test_one_seed_gives_what_peft_gives(layer):
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(model(layer), peft.BOFTConfig(**options(init_weights=False)))
    torch.manual_seed(7)
    program = compiled(adaptc.BOFTConfig(**options(init_weights=False)), layer)
    expected = {n: p.detach() for n, p in wrapped.named_parameters() if "boft_" in n}
    found = {f"base_model.model.{n}": t for n, t in program.binding.values.items()}
    assert len(expected) == 2
    for name, value in expected.items():
        assert torch.equal(found[name], value)


@given(
    runs=st.integers(1, 3),
    half=st.integers(1, 3),
    factors=st.integers(1, 4),
    by_count=st.booleans(),
    seed=st.integers(0, 99),
)
def test_butterflies_are_pefts(runs, half, factors, by_count, seed):
    n, b = runs * half * 2**factors, 2 * half
    sizes = {"boft_block_size": 0, "boft_block_num": n // b} if by_count else {"boft_block_size": b}
    torch.manual_seed(seed)
    linear = nn.Linear(n, 7).double()
    config = {"boft_n_butterfly_factor": factors, **sizes}
    wrapped = peft.get_peft_model(nn.Sequential(linear), peft.BOFTConfig(target_modules=["0"], **config)).double()
    slots: dict[str, Tensor] = {}
    for name, p in wrapped.named_parameters():
        if "boft_" in name:
            nn.init.normal_(p)
            slots[name.split(".")[-2]] = p.detach().clone().requires_grad_()
    x = torch.randn(3, n, dtype=torch.float64)
    method, op = adaptc.BOFTConfig(**config).method("0", "linear"), Op("linear", (7, n), torch.ops.aten.linear.default)
    assert {k: s.shape for k, s in method.slots(op).items()} == {k: tuple(t.shape) for k, t in slots.items()}
    expected = wrapped(x)
    W, bias = linear.weight.detach(), linear.bias.detach()
    outside = method.call_adapted(op, x, W, bias, slots, None)
    torch.testing.assert_close(outside, expected, rtol=1e-10, atol=1e-10)
    turned = method.weight(op, W, slots, None)
    torch.testing.assert_close(nn.functional.linear(x, turned, bias), expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(expected)
    (outside * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, p in wrapped.named_parameters():
        if "boft_" in name:
            torch.testing.assert_close(slots[name.split(".")[-2]].grad, p.grad, rtol=1e-9, atol=1e-9)


def test_scaled_without_its_bias(tmp_path):
    """A layer with a bias: what is scaled is the product alone, in every form."""
    wrapped, x = by_peft(tmp_path, boft_block_size=6), LAYERS["linear"][1]
    for form in ("apply", "weight"):
        torch.testing.assert_close(compiled(tmp_path, form=form)(x), wrapped(x), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_a_file_with_one_factor_where_the_config_says_two(tmp_path, monkeypatch):
    """What PEFT writes and reads where its extension does not compile: the factors there are mean what they mean."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)
    wrapped = by_peft(tmp_path, boft_n_butterfly_factor=2)
    assert wrapped.base_model.model.layer.boft_R["default"].shape == (1, 6, 4, 4)
    x, key = LAYERS["linear"][1], "base_model.model.layer.boft_R"
    program = compiled(adaptc.BOFTConfig(boft_n_butterfly_factor=2, target_modules=["layer"]))
    as_made = load_file(adaptc.save_adapter(program, tmp_path / "as made") / "adapter_model.safetensors")
    assert as_made[key].shape == (2, 6, 4, 4)
    adaptc.swap(program, tmp_path)
    reread = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
    for i, own in enumerate((program, compiled(tmp_path), reread)):
        torch.testing.assert_close(own(x), wrapped(x), rtol=1e-4, atol=1e-5)
        again = adaptc.save_adapter(own, tmp_path / str(i))
        assert load_file(again / "adapter_model.safetensors")[key].shape == (1, 6, 4, 4)
        theirs = peft.PeftModel.from_pretrained(model(), str(again)).eval()
        torch.testing.assert_close(theirs(x), wrapped(x))

    trained = compiled(tmp_path, training=True)
    module = trained.module()
    module(x).square().sum().backward()
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.sub_(p.grad * 0.1)
    written = load_file(adaptc.save_adapter(trained, tmp_path / "trained") / "adapter_model.safetensors")
    assert written[key].shape == (2, 6, 4, 4)  # the second one turns now
    torch.testing.assert_close(compiled(tmp_path / "trained")(x), trained(x))
    two = {k: torch.cat([t, t, t]) if "boft_R" in k else t for k, t in written.items()}
    save_file(two, tmp_path / "adapter_model.safetensors")
    with pytest.raises(adaptc.CheckpointError, match=r"boft_R.*expected \(2, 6, 4, 4\)"):
        compiled(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boft_block_size": 5}, r"width 24 by boft_block_size=5; one of \[1, 2, 3, 4, 6, 8, 12, 24\] fits"),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, r"boft_block_size=3 .*one of \[2, 4, 6, 12\] fits"),
        ({"boft_block_size": 0, "boft_block_num": 9}, r"boft_block_num=9; one of \[1, 2, 3, 4, 6, 8, 12, 24\] fits"),
        ({"boft_block_size": 0, "boft_block_num": 6, "boft_n_butterfly_factor": 3}, r"one of \[4, 12\] fits"),
        ({"boft_n_butterfly_factor": 5}, "none fits: use fewer factors"),
    ],
)
def test_sizes_that_do_not_divide(changes, message):
    with pytest.raises(adaptc.TargetError, match=message):
        compiled(adaptc.BOFTConfig(**options(**changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boft_block_num": 3}, "one of boft_block_size and boft_block_num"),
        ({"boft_block_size": 0}, "one of boft_block_size and boft_block_num"),
        ({"boft_n_butterfly_factor": 0}, "must be 1 or more"),
        ({"bias": "oft_only"}, "'boft_only'"),
        ({"boft_dropout": -0.1}, "boft_dropout must lie in"),
        ({"init_weights": "normal"}, "init_weights must be True or False"),
    ],
)
def test_refused_options(changes, message):
    with pytest.raises(adaptc.ConfigError, match=message):
        adaptc.BOFTConfig(**options(**changes))


def test_dropout_acts_in_training_alone(tmp_path):
    wrapped, x = by_peft(tmp_path, boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.5), LAYERS["linear"][1]
    program = compiled(tmp_path, training=True)
    outs = [program.module().train()(x) for _ in range(12)]
    assert len({tuple(o.detach().flatten().tolist()) for o in outs}) > 1
    torch.testing.assert_close(program.module().eval()(x), wrapped(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adaptc.merge(program)(x), wrapped(x), rtol=1e-4, atol=1e-5)


def test_dropout_leaves_blocks_as_they_are():
    """All blocks with probability 1, and then nothing but the scale is left."""
    method = Boft(size=3, dropout=1.0, training=True)
    op, s = Op("linear", (7, 15)), torch.randn(7, 1, dtype=torch.float64)
    W = torch.randn(7, 15, dtype=torch.float64)
    slots = {"boft_R": torch.randn(1, 5, 3, 3, dtype=torch.float64), "boft_s": s}
    torch.testing.assert_close(method.weight(op, W, slots, None), s * W)
    assert not torch.allclose(method.evaluated().weight(op, W, slots, None), s * W, rtol=1e-2, atol=1e-2)
