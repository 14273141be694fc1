"""Padding to a larger rank leaves what a site computes as it is, wherever a method keeps its ranks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import adaptc
from adaptc.methods import PerExpertMethod
from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method
from adaptc.runtime.rank_padding import find_paddings
from tests.support.custom_models import OneLayer

EXPERTS = Op("experts", (3, 7, 5))


def lora() -> Method:
    program = adaptc.compile(
        OneLayer(nn.Linear(5, 7)), adaptc.LoraConfig(r=2, target_modules=["layer"]), example_inputs=torch.randn(3, 5)
    )
    return program.adaptation.attachments[0].method


def padded_weights(method: Method, op: Op, form: str, ranks: tuple[int, int]) -> list[torch.Tensor]:
    """The weight by the values of a small rank, and by the same values padded to a large one."""
    paddings = find_paddings(method, op, form)
    assert paddings is not None
    small, large = (method.sizes.with_rank(op, r) for r in ranks)
    assert small is not None
    assert large is not None
    torch.manual_seed(0)
    values = {n: torch.randn(s.shape) for n, s in small.slots(op).items()}
    padded = {n: paddings[n](t, large.slots(op)[n].shape) if n in paddings else t for n, t in values.items()}
    assert any(p.shape != values[n].shape for n, p in padded.items())
    weight = torch.randn(op.shape)
    return [small.weight(op, weight, v, torch.tensor(0.7)) for v in (values, padded)]


@pytest.mark.parametrize("ranks", [(2, 5), (1, 3), (3, 4)])
@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_padded_values_make_the_same_weight(kind, ranks):
    method = lora() if kind == "linear" else PerExpertMethod(lora())
    op = Op("linear", (7, 5), torch.ops.aten.linear.default) if kind == "linear" else EXPERTS
    found, padded = padded_weights(method, op, "weight", ranks)
    torch.testing.assert_close(padded, found, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Averaged(Lora):
    """A method whose change depends on the rank itself, so that no padding leaves it as it is."""

    def weight(self, op, W, slots, scale):
        return W + (super().weight(op, W, slots, scale) - W) / next(iter(slots.values())).shape[0]


def test_a_padding_that_changes_the_result_is_not_taken():
    op = Op("linear", (7, 5), torch.ops.aten.linear.default)
    assert find_paddings(lora(), op, "weight")
    assert find_paddings(Averaged(**vars(lora())), op, "weight") is None


def test_the_caller_s_default_device_does_not_matter():
    method = lora()
    find_paddings.cache_clear()
    torch.set_default_device("meta")
    try:
        found = find_paddings(method, Op("linear", (7, 5), torch.ops.aten.linear.default), "apply")
    finally:
        torch.set_default_device(None)
    assert found
