"""LoRA's ops: what they are to torch, PEFT's arithmetic, their gradients and what these cost, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adaptc.errors import BackendError
from adaptc.kernels import lora_epilogue
from adaptc.kernels.lora_epilogue import lora_down, lora_up_add, reference_lora_down, reference_lora_up_add
from tests.kernels import run_cases
from tests.kernels.matrices import DTYPES, matrix

#: the module: the package's own name is the op's
lora_linear = import_module("adaptc.kernels.lora_linear")

HALF = torch.tensor(0.5)


def _layer(base: torch.dtype, adapter: torch.dtype | None = None, rows: int = 4) -> list[Any]:
    """x, W, bias, A, B and scale."""
    low = adapter or base
    x, W, bias = matrix(rows, 7, base, "wider"), matrix(5, 7, base, "transposed", 1), matrix(1, 5, base, seed=2)[0]
    return [x, W, bias, matrix(3, 7, low, seed=3), matrix(5, 3, low, "transposed", 4), HALF]


@pytest.mark.long
def test_kernels_interpreted() -> None:
    run_cases("lora_linear")


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_what_peft_computes(lead, bias) -> None:
    x, W, b, A, B = (torch.randn(s, dtype=torch.float64) for s in ((*lead, 7), (5, 7), (5,), (3, 7), (5, 3)))
    b = b if bias else None
    expected = F.linear(x, W, b) + F.linear(F.linear(x, A), B) * 0.3
    torch.testing.assert_close(lora_linear.lora_linear(x, W, b, A, B, 0.3), expected)


@pytest.mark.parametrize("adapter", DTYPES)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_layer_is_as_near_to_the_exact_sum_as_pefts_or_nearer(base, adapter) -> None:
    x, W = matrix(64, 96, base), matrix(80, 96, base, seed=1)
    A, B = matrix(8, 96, adapter, seed=2), matrix(80, 8, adapter, seed=3)
    eager = (F.linear(x, W) + F.linear(F.linear(x.to(adapter), A), B) * 0.5).to(base)
    high = [t.double() for t in (x, W, A, B)]
    exact = high[0] @ high[1].T + 0.5 * (high[0] @ high[2].T) @ high[3].T
    y = lora_linear.lora_linear(x, W, None, A, B, 0.5)
    assert y.dtype == base
    assert (y.double() - exact).norm() <= (eager.double() - exact).norm() * 1.01
    assert (y.double() - exact).norm() <= max(torch.finfo(base).eps, torch.finfo(adapter).eps) * exact.norm()


OPS: dict[str, tuple[Any, Callable[..., list[Any]]]] = {
    "down": (lora_down, lambda *types: [t for i, t in enumerate(_layer(*types)) if i in (0, 3, 5)]),
    "up": (lora_up_add, lambda *types: [matrix(4, 5, types[0]), matrix(4, 3, types[-1]), *_layer(*types)[4:]]),
    "layer": (lora_linear._lora_linear_op, _layer),
}


@pytest.mark.long
@pytest.mark.few(8)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("types", [*((t, t) for t in DTYPES), (torch.bfloat16, torch.float32)])
def test_ops_are_what_their_schemas_say(name, types) -> None:
    op, arguments = OPS[name]
    given = arguments(*types)
    learned = [t.requires_grad_() if isinstance(t, Tensor) and t.ndim and t.is_floating_point() else t for t in given]
    torch.library.opcheck(op, given)
    torch.library.opcheck(op, learned)


@pytest.mark.parametrize("name", OPS)
def test_gradients_are_those_of_the_definition(name) -> None:
    op, arguments = OPS[name]
    given = [t.detach().clone() if isinstance(t, Tensor) else t for t in arguments(torch.float64)]
    scale = 5 if name == "layer" else {"down": 2, "up": 3}[name]
    places = [i for i, t in enumerate(given) if isinstance(t, Tensor) and t.dtype == torch.float64 and i != scale]

    def call(*learned: Tensor) -> Tensor:
        return op(*(learned[places.index(i)] if i in places else t for i, t in enumerate(given)))

    learned = [given[i].requires_grad_() for i in places]
    assert torch.autograd.gradcheck(call, learned)
    assert torch.autograd.gradgradcheck(call, learned)


class _Products(TorchDispatchMode):
    """Shapes of all products made under it, with those that are sums too."""

    ops = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.adaptc.lora_down, torch.ops.adaptc.lora_up_add

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.ops:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(
    ("learned", "shapes"),
    [
        ("A", [(4, 3), (7, 3)]),
        ("B", [(4, 3), (5, 3)]),
        ("AB", [(4, 3), (7, 3), (4, 3), (5, 3)]),
        ("xAB", [(4, 3), (4, 7), (4, 7), (7, 3), (4, 3), (5, 3)]),
        ("x", [(4, 3), (4, 7), (4, 7)]),
        ("b", []),
        ("W", [(5, 7)]),
    ],
)
def test_a_backward_makes_no_product_for_what_is_frozen(learned, shapes) -> None:
    given = dict(zip("xWbABs", (t.clone() for t in _layer(torch.float32)), strict=True))
    for name in learned:
        given[name].requires_grad_()
    y = lora_linear._lora_linear_op(*given.values())
    with _Products() as products:
        y.sum().backward()
    assert sorted(products.shapes) == sorted(shapes)
    assert all((t.grad is not None) == (name in learned) for name, t in given.items())


def test_a_forward_keeps_only_what_it_was_given() -> None:
    given = [t.requires_grad_() for t in _layer(torch.float32)[:5]]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear._lora_linear_op(*given, HALF)
        h = reference_lora_down(given[0].detach(), given[3].detach()).requires_grad_()
        y = torch.zeros(4, 5, requires_grad=True)
        lora_up_add(y, h, given[4], HALF)
    known = {t.data_ptr() for t in (*given, HALF, h)}
    assert kept
    assert {t.data_ptr() for t in kept} <= known


def test_compiled_programs_take_any_rank_and_number_of_rows() -> None:
    def layer(x, W, bias, A, B, scale):
        return lora_linear.lora_linear(x, W, bias, A, B, scale)

    traces = 0

    def counting(graph, inputs):
        nonlocal traces
        traces += 1
        return graph

    compiled = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True)
    for rows, rank in ((4, 3), (16, 4), (17, 64), (300, 8)):
        x, W, A, B = (torch.randn(s) for s in ((rows, 7), (5, 7), (rank, 7), (5, rank)))
        expected = lora_linear.reference_lora_linear(x, W, None, A, B, HALF)
        torch.testing.assert_close(compiled(x, W, None, A, B, HALF), expected)
    assert traces == 1


def _traced(launch: Callable[..., object], **shapes: tuple[int, ...]) -> tuple[list[str], list[str]]:
    """The kernels that a launch on a GPU starts with bfloat16 tensors of these shapes, and what it took for granted of
    them. There need not be a GPU. All sizes are symbols, equal ones the same."""
    env = ShapeEnv(duck_shape=True)
    mode = FakeTensorMode(shape_env=env)
    # Made outside of the mode, in which they would be fake and of fixed size.
    plain = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    given = {}
    for name, t in plain.items():
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * t.ndim)
        given[name] = mode.from_tensor(t, symbolic_context=context)
    with mode:
        given = {
            n: torch.empty_strided(t.shape, t.stride(), dtype=torch.bfloat16, device="cuda") for n, t in given.items()
        }
        assert all(isinstance(size, torch.SymInt) for t in given.values() for size in t.shape)
        graph = make_fx(lambda *tensors: launch(**dict(zip(given, tensors, strict=True))))(*given.values()).graph
    launches = [n.kwargs["kernel_idx"] for n in graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    return [kernel_side_table.get_kernel(i).fn.__name__ for i in launches], [str(g.expr) for g in env.guards]


X, W, A, B, Y, H = (200, 136), (88, 136), (24, 136), (88, 24), (200, 88), (200, 24)


def test_launches_on_a_gpu_hold_for_all_sizes() -> None:
    down, up, layer = lora_epilogue.launch_down, lora_epilogue.launch_up_add, lora_linear._launch
    found = [
        _traced(lambda x, A: down(x, A, None), x=X, A=A),
        _traced(lambda x, A, s: down(x, A, s), x=X, A=A, s=()),
        _traced(lambda y, h, B, s: up(y, h, B, s, y), y=Y, h=H, B=B, s=()),
        _traced(lambda x, W, A, B, s: layer(x, W, None, A, B, s), x=X, W=W, A=A, B=B, s=()),
        # Sizes of three rows would be within the limit for few rows, if they were looked at.
        _traced(lambda x, W, A, B, s: layer(x, W, None, A, B, s), x=(3, 136), W=W, A=A, B=B, s=()),
    ]
    assert found == [
        (["_down_kernel"], []),
        (["_down_kernel"], []),
        (["_up_add_kernel"], []),
        (["_down_kernel", "_update_kernel"], []),
        (["_down_kernel", "_update_kernel"], []),
    ]


def test_few_rows_on_a_gpu_are_two_launches_for_all_ranks() -> None:
    def launch(A, B, s):
        n_ranks = A.shape[0]
        x, W = A.new_empty(3, 136), A.new_empty(88, 136)
        return lora_linear._launch(x, W, None, A.new_empty(n_ranks, 136), B.new_empty(88, n_ranks), s)

    assert _traced(launch, A=A, B=B, s=()) == (["_few_rows_down_kernel", "_few_rows_kernel"], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"expected x of shape \(\.\.\., K\), found \(\)"),
        ({"W": torch.zeros(5, 6)}, r"expected W of shape \(N, 7\), found \(5, 6\)"),
        ({"W": torch.zeros(7)}, r"expected W of shape \(N, 7\), found \(7,\)"),
        ({"bias": torch.zeros(4)}, r"expected a bias of shape \(5,\), found \(4,\)"),
        ({"bias": torch.zeros(1, 5)}, r"expected a bias of shape \(5,\), found \(1, 5\)"),
        ({"A": torch.zeros(3, 6)}, r"expected A of shape \(R, 7\), found \(3, 6\)"),
        ({"B": torch.zeros(3, 5)}, r"expected B of shape \(5, 3\), found \(3, 5\)"),
        ({"W": torch.zeros(5, 7, dtype=torch.bfloat16)}, "expected W of x's type torch.float32.*found torch.bfloat16"),
        (
            {"bias": torch.zeros(5, dtype=torch.float64)},
            "expected a bias of W's type torch.float32.*found torch.float64",
        ),
        ({"B": torch.zeros(5, 3, dtype=torch.float16)}, "expected B of A's type torch.float32.*found torch.float16"),
        ({"A": torch.zeros(3, 7, dtype=torch.int8), "B": torch.zeros(5, 3, dtype=torch.int8)}, "found torch.int8"),
        ({"B": torch.zeros(5, 3, device="meta")}, "expected B on cpu, where the other tensors are, found meta"),
        ({"scale": torch.zeros(1)}, r"expected a number or a 0-d tensor, found a tensor of shape \(1,\)"),
    ],
)
def test_a_layer_refuses_what_it_is_not_defined_for(change, message) -> None:
    given = dict(zip(("x", "W", "bias", "A", "B", "scale"), _layer(torch.float32), strict=True)) | change
    with pytest.raises(BackendError, match=message):
        lora_linear.lora_linear(**given)


@pytest.mark.parametrize(
    ("name", "place", "other", "message"),
    [
        ("down", 0, torch.zeros(7), r"lora_down: expected x of shape \(M, K\), found \(7,\)"),
        ("down", 1, torch.zeros(3, 6), r"lora_down: expected A of shape \(R, 7\), found \(3, 6\)"),
        ("down", 2, torch.zeros(1), r"lora_down: expected a scale of shape \(\), found \(1,\)"),
        ("down", 2, torch.zeros((), device="meta"), "lora_down: expected a scale on cpu.*found meta"),
        ("up", 0, torch.zeros(5), r"lora_up_add: expected y of shape \(M, N\), found \(5,\)"),
        ("up", 1, torch.zeros(4, 4), r"lora_up_add: expected h of shape \(4, 3\), found \(4, 4\)"),
        ("up", 2, torch.zeros(3, 5), r"lora_up_add: expected B of shape \(5, R\), found \(3, 5\)"),
        ("up", 3, torch.zeros(1), r"lora_up_add: expected a scale of shape \(\), found \(1,\)"),
    ],
)
def test_ops_refuse_what_they_are_not_defined_for(name, place, other, message) -> None:
    op, arguments = OPS[name]
    given = arguments(torch.float32)
    given[place] = other
    with pytest.raises(BackendError, match=message):
        op(*given)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_off_the_gpu_the_result_is_the_reference(dtype) -> None:
    x, W, bias, A, B, scale = _layer(dtype)
    h = lora_down(x, A)
    assert torch.equal(h, reference_lora_down(x, A))
    y = F.linear(x, W, bias)
    assert torch.equal(lora_up_add(y, h, B, scale), reference_lora_up_add(y, h, B, scale))
    layer = lora_linear.reference_lora_linear(x, W, bias, A, B, scale)
    assert torch.equal(lora_linear.lora_linear(x, W, bias, A, B, scale), layer)
