"""Fusing siblings on graphs: which layers are grouped, which are not, and that both ways of fusing compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptc.passes.optimize.sibling_cost import find_break_even, stacked_cost_difference
from tests.support.cover import examples
from tests.support.sibling_graphs import Fused, Layers, read_all_layers


def check(model: Layers, x: Tensor, stacked: bool) -> Fused:
    fused = Fused(model, x, stacked)
    with torch.no_grad():
        for batch in (x, torch.cat([x, x + 1])):
            tolerance = 1e-12 if x.dtype == torch.float64 else {torch.float32: 1e-5}.get(x.dtype, 3e-2)
            torch.testing.assert_close(fused(batch)[0], model(batch), rtol=tolerance, atol=tolerance)
    return fused


@pytest.mark.parametrize("stacked", [True, False])
def test_a_group_becomes_one_product(stacked: bool) -> None:
    fused = check(Layers(read_all_layers), torch.randn(2, 3, 5, dtype=torch.float64), stacked)
    assert [len(g.layers) for g in fused.groups] == [3]
    assert [len(p.parameter_names) for p in fused.packs] == [3]
    assert fused.count("linear.default") == 1
    assert fused.count("mm.default") == (1 if stacked else 3)
    assert fused.count("addmm_.default") == (1 if stacked else 3)
    assert fused.count("add.Tensor") == 4  # those of the test's own sum


@given(
    widths=st.lists(st.integers(1, 13), min_size=1, max_size=4).map(tuple),
    data=st.data(),
    shape=st.sampled_from([(3,), (2, 3), (2, 1, 3)]),
    stacked=st.booleans(),
    biased=st.booleans(),
)
@settings(max_examples=examples(15))
def test_any_group_computes_the_same(widths: Any, data: Any, shape: Any, stacked: bool, biased: bool) -> None:
    adapted = tuple(sorted(data.draw(st.sets(st.sampled_from(range(len(widths)))))))
    model = Layers(read_all_layers, widths, adapted, (biased,) * len(widths))
    fused = check(model, torch.randn(*shape, 5, dtype=torch.float64), stacked)
    assert bool(fused.groups) == (len(widths) > 1 or bool(adapted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stacked", [True, False])
def test_adapters_wider_than_their_layers(dtype: torch.dtype, stacked: bool) -> None:
    fused = check(Layers(read_all_layers, dtype=dtype), torch.randn(2, 3, 5).to(dtype), stacked)
    assert [len(g.updates) for g in fused.groups] == [3]


def test_biased_and_unbiased_layers_are_two_groups() -> None:
    model = Layers(read_all_layers, (7, 11, 2, 3), (0, 2), (True, False, True, False))
    fused = check(model, torch.randn(4, 5, dtype=torch.float64), True)
    assert sorted(len(g.layers) for g in fused.groups) == [2, 2]


UNFUSED: dict[str, Callable[[Any, Tensor], Any]] = {
    "returned as they are": lambda m, x: (m.layer_output(0, x), m.layer_output(1, x)),
    "returned through a view": lambda m, x: (m.layer_output(0, x).unsqueeze(0), m.layer_output(1, x).t()),
    "read by strides": lambda m, x: (
        m.layer_output(0, x).as_strided((2,), (1,)) + m.layer_output(1, x).as_strided((2,), (1,))
    ),
    "read by strides behind a reshape, which may copy": lambda m, x: (
        m.layer_output(0, x).t().unflatten(1, (2, 2)).reshape(-1, 4).as_strided((2,), (1,))
        + m.layer_output(1, x).t().unflatten(1, (2, 2)).reshape(-1, 4).as_strided((2,), (1,))
    ),
    "of different inputs": lambda m, x: m.layers[0](x).sin().sum() + m.layers[1](x + 1).sin().sum(),
    "one layer read twice": lambda m, x: m.layers[0](x).sin().sum() + m.layers[0](x).cos().sum(),
}


@pytest.mark.parametrize("case", UNFUSED, ids=str)
def test_left_alone(case: str) -> None:
    fused = Fused(Layers(UNFUSED[case], adapted=()), torch.randn(4, 5, dtype=torch.float64), True)
    assert not fused.groups
    assert not fused.packs


def test_an_output_that_something_else_reads_too_keeps_its_adapter_apart() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.layers[0](x)
        low = nn.functional.linear(x, m.slots["a0"])
        return (y + nn.functional.linear(low, m.slots["b0"]) * m.slots["s0"]).sin() + y.cos()

    model = Layers(body)
    fused = Fused(model, torch.randn(4, 5, dtype=torch.float64), True)
    assert not fused.groups
    assert fused.count("add.Tensor") == 2


def test_a_scale_is_folded_only_into_a_weight_of_its_own() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        h = nn.functional.linear(x, m.slots["a0"])
        return h * m.slots["s0"] + nn.functional.linear(x + 1, m.slots["a0"]) * m.slots["s1"]

    assert Fused(Layers(body), torch.randn(4, 5, dtype=torch.float64), True).count("mul.Tensor") == 2


def test_the_cost_has_one_crossing() -> None:
    groups = Fused(Layers(read_all_layers), torch.randn(4, 5, dtype=torch.float64), True).groups
    found = find_break_even(groups, stacked_cost_difference)
    (size,) = {str(s) for g in groups for s in [g.rows]}
    assert 100 < found.rows < 1e6
    assert found.prefers_first({size: int(found.rows)})
    assert not found.prefers_first({size: int(found.rows) + 2})
    assert not found.prefers_first({})
    alone = Fused(Layers(lambda m, x: m.layer_output(0, x).sin()), torch.randn(4, 5, dtype=torch.float64), True).groups
    assert find_break_even(alone, stacked_cost_difference).prefers_first({})


def written_through_a_view(m: Any, x: Tensor) -> Tensor:
    h = x + 1
    view = h.view(-1)
    first = m.layer_output(0, h).sin().sum(-1)
    view.mul_(2)
    return first + m.layer_output(1, h).sin().sum(-1)


@pytest.mark.parametrize("stacked", [True, False])
def test_layers_of_an_input_that_is_written_to_in_between_stay(stacked: bool) -> None:
    fused = check(Layers(written_through_a_view), torch.randn(2, 3, 5, dtype=torch.float64), stacked)
    assert not fused.groups
