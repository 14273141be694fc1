"""Adapters in half precision: scales are folded, siblings fused, and float32 used, and no result is worse for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from adaptc.passes.optimize import sibling_groups
from adaptc.passes.optimize.sibling_cost import find_break_even, float32_cost_difference, stacked_cost_difference
from adaptc.passes.protocol import matmul_op
from tests.support.cover import examples
from tests.support.sibling_graphs import Fused, Layers, concat_outputs

aten = torch.ops.aten
BF16, FP16, FLOAT = torch.bfloat16, torch.float16, torch.float32
HALVES = [BF16, FP16]


@pytest.fixture(autouse=True)
def a_processor_that_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sibling_groups, "onednn_supports", lambda dtype: dtype in (FLOAT, BF16))


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def errors(model: Layers, fused: Fused, x: Tensor) -> tuple[float, float, float]:
    """(of the fused graph, of the graph as it was, of one rounding), as rms of the difference to float64."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        found, plain = fused(x)[0], model(x)
    assert found.dtype == plain.dtype == x.dtype
    assert found.shape == plain.shape
    rounded = rms(exact.to(x.dtype).double() - exact)
    return rms(found.double() - exact), rms(plain.double() - exact), rounded


def of(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_folded_scale_loses_nothing(dtype: torch.dtype) -> None:
    """The graph rounds linear(h, B), and then its multiple; folded, B is rounded instead, once for all calls. These
    errors are as large, and there are none where the scale is a power of two."""
    h, b, s = of(dtype, 257, 16), of(dtype, 311, 16, seed=1), torch.tensor(1.7)
    exact = (h.double() @ b.double().t()) * s.double()
    theirs = rms((torch.nn.functional.linear(h, b) * s).double() - exact)
    ours = rms(torch.nn.functional.linear(h, b * s).double() - exact)
    assert ours < 1.1 * theirs
    for power in (0.25, 2.0):  # what most adapters have
        assert torch.equal((b * torch.tensor(power)).double(), b.double() * power)


@pytest.mark.parametrize("how", [(True, False), (False, False), (True, True)], ids=["stacked", "apart", "float32"])
@pytest.mark.parametrize("dtype", HALVES)
def test_fused_updates_are_nearer_to_the_truth(dtype: torch.dtype, how: tuple[bool, bool]) -> None:
    """A fused update is added to the layer before it is rounded; the graph rounds the product, its multiple and the
    sum, one after the other."""
    model = Layers(concat_outputs, (70, 30, 41), dtype=dtype, slots=dtype)
    fused = Fused(model, of(dtype, 2, 5), *how)
    found, plain, rounded = errors(model, fused, of(dtype, 211, 5, seed=6))
    assert found < 0.95 * plain
    if how == (True, True):  # two roundings are left: of the layer's own product, and of the sum
        assert found < 1.5 * rounded


@pytest.mark.parametrize("dtype", [*HALVES, FLOAT])
def test_scales_are_folded_in_any_precision(dtype: torch.dtype) -> None:
    fused = Fused(Layers(concat_outputs, dtype=dtype, slots=dtype), of(dtype, 4, 5), True)
    assert [len(g.updates) for g in fused.groups] == [3]
    for node in fused.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        assert node.args[0].op == "placeholder" or node.args[0].target is aten.to.dtype  # type: ignore[union-attr]


@pytest.mark.long
@given(
    widths=st.lists(st.integers(1, 13), min_size=1, max_size=4).map(tuple),
    data=st.data(),
    lead=st.sampled_from([(3,), (1,), (0,), (1, 1), (2, 3), (2, 1, 3), (67, 2)]),
    dtype=st.sampled_from([BF16, FP16, FLOAT]),
    slots=st.sampled_from(["own", "float32"]),
    how=st.sampled_from([(True, True), (True, False), (False, False)]),
    biased=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@settings(max_examples=examples(30))
def test_no_form_is_further_from_the_truth(
    widths: Any, data: Any, lead: Any, dtype: torch.dtype, slots: str, how: Any, biased: bool, threads: int
) -> None:
    adapted = tuple(sorted(data.draw(st.sets(st.sampled_from(range(len(widths)))))))
    kind = dtype if slots == "own" else FLOAT
    model = Layers(concat_outputs, widths, adapted, (biased,) * len(widths), dtype, kind)
    traced = of(dtype, *(max(n, 2) if i == 0 else n for i, n in enumerate(lead)), 5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fused = Fused(model, traced, *how)
        strided = of(dtype, *lead, 10, seed=3)[..., ::2]
        for x in (of(dtype, *lead, 5, seed=2), strided):
            found, plain, rounded = errors(model, fused, x)
            # Where few numbers are summed up, the luck of single roundings is as large as the error itself.
            assert found <= 1.5 * plain + 3 * rounded + 1e-6
    finally:
        torch.set_num_threads(before)


def types(graph: fx.Graph) -> set[torch.dtype]:
    """Of the factors of what adapters add."""
    ups = graph.find_nodes(op="call_function", target=aten.addmm_.default)
    return {n.args[2].meta["val"].dtype for n in ups}  # type: ignore[union-attr]


@pytest.mark.parametrize("stacked", [True, False])
def test_which_type_adapters_are_computed_in(stacked: bool) -> None:
    def fused(dtype: torch.dtype, slots: torch.dtype, wide: bool) -> set[torch.dtype]:
        return types(Fused(Layers(concat_outputs, dtype=dtype, slots=slots), of(dtype, 4, 5), stacked, wide).graph)

    assert fused(BF16, BF16, False) == {BF16}
    assert fused(BF16, BF16, True) == {FLOAT}
    # No processor here multiplies it.
    assert fused(FP16, FP16, False) == fused(FP16, FP16, True) == {FLOAT}
    assert fused(BF16, FLOAT, False) == fused(BF16, FLOAT, True) == {FLOAT}
    assert fused(torch.float64, torch.float64, True) == {torch.float64}


def test_a_scale_is_multiplied_in_after_the_cast() -> None:
    fused = Fused(Layers(concat_outputs, dtype=BF16, slots=BF16), of(BF16, 4, 5), True, wide=True)
    products = fused.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert len(products) == 3
    for node in products:
        assert node.meta["val"].dtype == FLOAT
        assert node.args[0].target is aten.to.dtype  # type: ignore[union-attr]
        assert node.args[0].args[0].op == "placeholder"  # type: ignore[union-attr]


@pytest.mark.parametrize(("dtype", "slots"), [(FP16, BF16), (BF16, FP16)])
def test_sums_in_a_type_wider_than_both_are_left_alone(dtype: torch.dtype, slots: torch.dtype) -> None:
    model = Layers(concat_outputs, dtype=dtype, slots=slots)
    fused = Fused(model, of(dtype, 4, 5), True)
    assert not any(g.updates for g in fused.groups)
    found, plain, _ = errors(model, fused, of(dtype, 9, 5))
    assert found <= 1.1 * plain


def test_a_slot_that_sites_share_is_copied_once() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = m.slots["a0"], m.slots["b0"]
        inputs = (x, x + 1, x + 2)
        return torch.cat([m.layers[0](z) + nn.functional.linear(nn.functional.linear(z, a), b) for z in inputs], -1)

    for dtype in (FLOAT, BF16):
        fused = Fused(Layers(body, dtype=dtype, slots=dtype), of(dtype, 4, 5), True, wide=True)
        assert [len(g.updates) for g in fused.groups] == [1, 1, 1]
        assert fused.count("clone.default") == 2
        assert fused.count("addmm_.default") == 3
        fused.graph.lint()
        found, plain, _ = errors(Layers(body, dtype=dtype, slots=dtype), fused, of(dtype, 9, 5))
        assert found <= 1.1 * plain


def test_what_pays_at_how_many_rows() -> None:
    def groups(dtype: torch.dtype, slots: torch.dtype) -> list[Any]:
        model = Layers(concat_outputs, (576, 192, 193), dtype=dtype, slots=slots)
        return Fused(model, of(dtype, 4, 5), True).groups

    half, float32, fp16 = groups(BF16, BF16), groups(BF16, FLOAT), groups(FP16, FP16)
    assert [g.has_dtype_choice for g in (*half, *float32, *fp16)] == [True, False, False]
    (size,) = {str(g.rows) for g in half}
    few, many = find_break_even(half, float32_cost_difference), find_break_even(half, stacked_cost_difference)
    assert few.prefers_first({size: 1})
    assert 4 < few.rows < many.rows
    assert not few.prefers_first({})
    # What a product costs whatever its size is far more in half precision, and so stacking pays for more rows.
    assert many.rows > 10 * find_break_even(float32, stacked_cost_difference).rows
    assert find_break_even(fp16, stacked_cost_difference).rows == find_break_even(float32, stacked_cost_difference).rows


def test_without_products_of_bfloat16_all_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sibling_groups, "onednn_supports", matmul_op.onednn_supports)
    monkeypatch.setattr(matmul_op, "_pointwise", None)
    model = Layers(concat_outputs, dtype=BF16, slots=BF16)
    for stacked in (True, False):
        assert types(Fused(model, of(BF16, 4, 5), stacked).graph) == {FLOAT}
