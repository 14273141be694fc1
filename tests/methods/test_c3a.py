"""C3A: illegal options, PEFT's first values, its rule for patterns, circulant blocks, two adapters on one weight."""

from __future__ import annotations

import hypothesis.strategies as st
import peft
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import adaptc
from adaptc.errors import ConfigError, TargetError
from adaptc.methods.sparse.c3a import C3A
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.merging.merge_pass import Merge
from adaptc.passes.graph.ops import Op
from tests.support.cover import examples
from tests.support.pass_checks import attach, export, random_values
from tests.support.spectral import differing_fields

BAD = [
    {"block_size": 0},
    {"block_size": 2.0},
    {"block_size_pattern": {"a": False}},
    {"init_weights": None},
    {"init_weights": "orthogonal"},
    {"init_weights": 1},
    {"bias": 3},
]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.ModuleDict({"up": nn.Linear(6, 12), "down": nn.Linear(12, 18)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["down"](torch.tanh(self.inner["up"](x)))


X = torch.linspace(-2, 3, 24).reshape(4, 6)


def compiled(**options):
    return adaptc.compile(
        Two().eval(), adaptc.C3AConfig(**{"target_modules": ["up", "down"], **options}), example_inputs=X
    )


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_illegal_options_are_named(bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=rf"C3AConfig\.{name}"):
        adaptc.C3AConfig(**bad)


def test_fields_and_defaults_are_pefts():
    assert differing_fields(peft.C3AConfig(), adaptc.C3AConfig()) == {}


def test_block_sizes_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"inner\.up\.weight.*block_size=4 .*the divisors of 6 do"):
        compiled(block_size=4)
    compiled(block_size=4, block_size_pattern={"up": 3, "down": 6})
    with pytest.raises(TargetError, match="two axes"):
        C3A().slots(Op("weight", (512,)))


@pytest.mark.few(2)
@pytest.mark.parametrize("scheme", [True, False, "xavier_uniform", "kaiming_uniform", "gaussian"])
def test_first_values_are_pefts(scheme):
    options = {"target_modules": ["up", "down"], "block_size": 3, "init_weights": scheme}
    model = Two()
    torch.manual_seed(4)
    theirs = peft.get_peft_model(model, peft.C3AConfig(**options))
    after = torch.rand(3)
    program_model = Two().eval()
    torch.manual_seed(4)
    program = adaptc.compile(program_model, adaptc.C3AConfig(**options), example_inputs=X)
    assert torch.equal(torch.rand(3), after)
    for a, layer in zip(program.adaptation.attachments, theirs.base_model.model.inner.values(), strict=True):
        assert torch.equal(program.binding.values[a.slots["c3a_kernel"]], layer.c3a_kernel["default"])


@pytest.mark.parametrize("pattern", [{"up": 2}, {"inner.down": 6}, {r"inn\w+\.down": 6}, {"up|down": 2}])
def test_patterns_are_read_as_peft_reads_them(pattern):
    options = {"target_modules": ["up", "down"], "block_size": 3, "block_size_pattern": pattern}
    if pattern == {r"inn\w+\.down": 6}:  # nothing is in front of the name that the dot could be behind
        with pytest.raises(TargetError, match="block_size_pattern"):
            compiled(**options)
        return
    theirs = peft.get_peft_model(Two(), peft.C3AConfig(**options)).base_model.model.inner
    found = {a.module: a.method.block for a in compiled(**options).adaptation.attachments}
    assert found == {f"inner.{n}": m.block_size["default"] for n, m in theirs.items()}
    assert set(found.values()) != {3}


@settings(max_examples=examples(25), deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.sampled_from(["linear", "addmm", "weight"]))
def test_blocks_are_circulant(rows, columns, block, kind):
    """Each row of a block is the one above it, turned by one; the apply form is the same map."""
    op, method = Op(kind, (rows * block, columns * block), torch.ops.aten.linear.default), C3A(block)
    kernel = torch.randn(rows, columns, block, dtype=torch.float64)
    W = torch.randn(op.shape, dtype=torch.float64)
    blocks = [torch.cat([torch.stack([k.roll(i) for i in range(block)]) for k in row], 1) for row in kernel]
    expected = W + torch.cat(blocks) / (columns * block)
    torch.testing.assert_close(method.weight(op, W, {"c3a_kernel": kernel}, None), expected, rtol=1e-13, atol=1e-13)
    if method.has_apply(op):
        x, b = torch.randn(2, 3, columns * block, dtype=torch.float64), torch.randn(rows * block, dtype=torch.float64)
        y = method.apply(op, x, op(x, W, b), W, b, {"c3a_kernel": kernel}, None)
        torch.testing.assert_close(y, op(x, expected, b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("forms", [("apply", "apply"), ("weight", "apply"), ("weight", "weight")])
def test_two_adapters_add_up(forms):
    """PEFT feeds the second one with what the first one computed."""
    layer = nn.Linear(6, 6).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    program = export(nn.Sequential(layer), x)
    made = [attach(program, "0.weight", C3A(block), form=f) for block, f in zip((3, 2), forms, strict=True)]
    made = [attach(program, "0.weight", a.method, form=a.form, variant=i, adapter=f"a{i}") for i, a in enumerate(made)]
    values = random_values(program, made)
    both = Inject(made, values)(program)
    assert [a.form for a in both.data] == list(forms)
    W = layer.weight.detach()
    op = Op("linear", (6, 6))
    change = sum(a.method.weight(op, W, {n: values[f] for n, f in a.slots.items()}, None) - W for a in both.data)
    expected = nn.functional.linear(x, W + change, layer.bias)
    torch.testing.assert_close(both.program.module()(x), expected, rtol=1e-12, atol=1e-12)
    merged = Merge(both.data, values)(both.program).program
    torch.testing.assert_close(merged.module()(x), expected, rtol=1e-12, atol=1e-12)


def test_half_precision():
    """Transforms are made in float32, and what they add is rounded once."""
    op, method = Op("linear", (6, 9), torch.ops.aten.linear.default), C3A(3)
    kernel = torch.randn(2, 3, 3).bfloat16()
    W, x = torch.randn(6, 9).bfloat16(), torch.randn(4, 9).bfloat16()
    y = op(x, W)
    found = method.apply(op, x, y, W, None, {"c3a_kernel": kernel}, None)
    wide = method.apply(op, x.float(), y.float(), W.float(), None, {"c3a_kernel": kernel.float()}, None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.bfloat16())
