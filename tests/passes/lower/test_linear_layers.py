"""Linear layers of graphs that are about to be compiled: which are computed how, and that they compute the same."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from adaptc.passes.lower.linear_layers import with_chosen_layers
from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES, LINEAR
from adaptc.passes.quantized.all_schemes import scheme_text
from adaptc.passes.quantized.compiled_linear import SUM_ROWS, written_once
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.planar_scheme import in_planes

#: relative to the largest value
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}


def layer(dtype: torch.dtype, shape: tuple[int, ...], rows: int) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Return a graph with one linear layer of ``rows`` outputs, and its arguments for an input of ``shape``."""
    generator = torch.Generator().manual_seed(rows)
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in (shape, (rows, shape[-1]), (rows,))]
    graph = fx.Graph()
    places = [graph.placeholder(name) for name in ("x", "weight", "bias")]
    graph.output((graph.call_function(torch.ops.aten.linear.default, tuple(places)),))
    return fx.GraphModule({}, graph), tensors


def traced(module: fx.GraphModule, tensors: list[torch.Tensor], mode: str = "real") -> tuple[set[str], torch.Tensor]:
    """Return the names of the ops that the layers became, and the output."""
    made = make_fx(with_chosen_layers(module), tracing_mode=mode)(*tensors)
    ops = {n.target.overloadpacket.__name__ for n in made.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    return ops, made(*tensors)[0]


@pytest.mark.parametrize(
    ("dtype", "shape", "rows", "is_sum"),
    [
        (torch.bfloat16, (1, 1, 33), 70, True),
        (torch.bfloat16, (33,), 70, True),
        (torch.float16, (1, 33), 7, True),
        (torch.bfloat16, (2, 33), 7, False),
        (torch.bfloat16, (1, 3, 33), 7, False),
        (torch.float32, (1, 1, 33), 7, True),
        (torch.float32, (3, 33), 7, False),
        (torch.float64, (1, 33), 7, False),
    ],
    ids=str,
)
def test_layers_of_one_row_are_sums(dtype: torch.dtype, shape: tuple[int, ...], rows: int, is_sum: bool) -> None:
    module, tensors = layer(dtype, shape, rows)
    ops, found = traced(module, tensors)
    assert ("sum" in ops, bool(ops & {"linear", "addmm", "t"})) == (is_sum, not is_sum)
    expected = F.linear(*(t.double() for t in tensors))
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE[dtype], error
    if is_sum:  # in float32, rounded once: off by half a step of its dtype at most, where a float32 sum is not
        step = torch.finfo(dtype).eps * expected.abs()
        assert ((found.double() - expected).abs() <= 0.51 * step + 1e-6 * float(expected.abs().max())).all()
    assert [str(n.target) for n in module.graph.nodes if n.op == "call_function"] == ["aten.linear.default"]


@pytest.mark.parametrize("count", [1, 2])
def test_layers_whose_matmul_was_chosen(count: int) -> None:
    module, tensors = layer(torch.float32, (count, 33), 7)
    (node,) = (n for n in module.graph.nodes if n.op == "call_function")
    node.target, node.args = torch.ops.adaptc.product.default, (*node.args, LINEAR, list(ALL_ROW_CLASSES), [])
    ops, found = traced(module, tensors)
    assert ("sum" in ops, "product" in ops) == (count == 1, count == 2)
    torch.testing.assert_close(found, F.linear(*tensors), rtol=1e-5, atol=1e-5)


def test_a_number_of_rows_that_is_not_known_is_not_taken_for_one() -> None:
    module, tensors = layer(torch.bfloat16, (5, 33), 7)
    assert "sum" not in traced(module, tensors, "symbolic")[0]


def quantized(scheme: IntegerScheme, dtype: torch.dtype, count: int, planar: bool) -> tuple[Any, Any, torch.Tensor]:
    """Return a graph with a quantised layer, its arguments, and what it should compute."""
    generator = torch.Generator().manual_seed(count)
    stored = scheme.quantize(torch.randn(7, 24, generator=generator))
    values, used = scheme.dequantize(stored, 7, 24), scheme
    if planar:
        found = in_planes(scheme, stored, (7, 24))
        assert found is not None
        used, stored = found
    x = torch.randn(count, 24, generator=generator).to(dtype)
    graph = fx.Graph()
    places = [graph.placeholder(name) for name in ("x", *stored)]
    arguments = (places[0], places[1:], None, scheme_text(used), 7, 24)
    graph.output((graph.call_function(torch.ops.adaptc.qlinear.default, arguments),))
    return fx.GraphModule({}, graph), [x, *stored.values()], F.linear(x.double(), values.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "scheme",
    [IntegerScheme(), IntegerScheme(group_size=4), IntegerScheme(bits=4, group_size=4, zero_dtype="uint8")],
    ids=str,
)
def test_quantised_layers_read_planes(scheme: IntegerScheme, dtype: torch.dtype) -> None:
    """Few rows as sums, more as a matmul of the values, and no call of our own op, which a compiler cannot fuse."""
    for count in (1, SUM_ROWS, SUM_ROWS + 1, 19):
        module, arguments, expected = quantized(scheme, dtype, count, planar=True)
        ops, found = traced(module, arguments)
        assert ("sum" in ops) == (count <= SUM_ROWS)
        assert "qlinear" not in ops
        error = float((found.double() - expected).abs().max() / expected.abs().max())
        assert error < TOLERANCE[dtype], (count, error)


def test_other_schemes_call_our_op() -> None:
    module, arguments, expected = quantized(IntegerScheme(group_size=4), torch.float32, 1, planar=False)
    ops, found = traced(module, arguments)
    assert "qlinear" in ops
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def headed(scheme: IntegerScheme) -> tuple[Any, list[torch.Tensor]]:
    """Return a function of two quantised layers and a head that takes chosen rows, and the stored tensors of all."""
    generator = torch.Generator().manual_seed(11)
    found = [in_planes(scheme, scheme.quantize(torch.randn(24, 24, generator=generator)), (24, 24)) for _ in range(3)]
    layers = [f for f in found if f is not None]
    text, count = scheme_text(layers[0][0]), len(layers[0][1])

    def call(x: torch.Tensor, keep: torch.Tensor, bias: torch.Tensor, *stored: torch.Tensor) -> torch.Tensor:
        for i in range(2):
            x = torch.ops.adaptc.qlinear(x, stored[i * count : i * count + count], None, text, 24, 24)
        return torch.ops.adaptc.qlinear(x[keep], stored[2 * count :], bias, text, 24, 24)

    return call, [torch.randn(24, generator=generator), *(t for _, stored in layers for t in stored.values())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [0, 4])
def test_a_head_of_few_rows_is_a_sum_behind_a_long_prompt(group_size: int | None, dtype: torch.dtype) -> None:
    """Only the layer whose rows are its own chooses in each call. Both of its ways compute the layer."""
    call, (bias, *stored) = headed(IntegerScheme(group_size=group_size))
    x, bias = torch.randn(19, 24, generator=torch.Generator().manual_seed(1)).to(dtype), bias.to(dtype)
    module = make_fx(call, tracing_mode="symbolic")(x, torch.arange(7), bias, *stored)
    made = make_fx(with_chosen_layers(module), tracing_mode="symbolic")(x, torch.arange(7), bias, *stored)
    (choice,) = made.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)
    is_few: Any = choice.args[0]
    assert (is_few.target, is_few.args[1]) == (operator.le, SUM_ROWS)
    few, many = (str(getattr(made, b.target).graph) for b in choice.args[1:3])  # type: ignore[union-attr]
    assert ("aten.sum" in few, "aten.sum" in many, "aten.sum" in str(made.graph)) == (True, False, False)
    for rows, kept in ((19, 7), (19, 1), (11, SUM_ROWS), (5, SUM_ROWS + 1)):
        keep = torch.arange(kept).flip(0)
        expected = call(x[:rows].double(), keep, bias.double(), *stored)
        error = float((made(x[:rows], keep, bias, *stored).double() - expected).abs().max() / expected.abs().max())
        assert error < 3 * TOLERANCE[dtype], (rows, kept, error)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "quantised"])
def test_inputs_that_are_parts_of_other_tensors(kind: str) -> None:
    """A compiler takes strides for those of the whole memory: slices, a column, an expanded row, what is computed."""
    if kind == "quantised":
        module, (x, *tensors), _ = quantized(IntegerScheme(group_size=4), torch.float32, 1, planar=True)
        x = x.flatten()
    else:
        module, (x, *tensors) = layer(getattr(torch, kind), (24,), 7)
    chosen = with_chosen_layers(module)
    tolerance = TOLERANCE[x.dtype]

    def several(wide: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        views = (wide[..., 5:29], wide[..., ::2][..., 3:27], wide[..., 7].expand(1, 24), torch.tanh(wide)[..., 24:48])
        columns = wide.reshape(2, -1).t()[:24, 1][None]
        return [chosen(v, *tensors)[0] for v in (*views, columns)]

    wide = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    compiled: Any = torch.compile(make_fx(several)(wide, *tensors), dynamic=False, fullgraph=True)
    for found, expected in zip(compiled(wide, *tensors), several(wide, *tensors), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=10 * tolerance)
    strange = torch.tensor([[0.0, -0.0, float("inf"), -1.5, float("nan")] * 5])[:, :24]
    assert torch.equal(written_once(strange).isnan(), strange.isnan())
    assert torch.equal(written_once(strange).nan_to_num(), strange.nan_to_num())
