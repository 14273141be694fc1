"""DoRA's ops: what they are to torch, their gradients, what they refuse, and their meaning where no kernel runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import BackendError
from adaptc.kernels import dora_linear as dora
from adaptc.kernels.dora_linear import dora_epilogue, dora_norm, reference_dora_epilogue, reference_dora_norm
from tests.kernels import run_cases
from tests.kernels.matrices import DTYPES, matrix
from tests.kernels.on_gpu import guards_of_launch

HALF = torch.tensor(0.5)


def _epilogue(dtype: torch.dtype, *, bias: bool = True, factors: torch.dtype | None = None) -> list[Tensor | None]:
    """y0, h, B, g, scale and bias, the ones that are learned in ``factors``."""
    low = factors or dtype
    high = torch.promote_types(low, torch.float32)
    y0, h, B = matrix(4, 5, dtype, "wider"), matrix(4, 3, low, seed=1), matrix(5, 3, low, "transposed", seed=2)
    g = matrix(1, 5, high, seed=3)[0]
    return [y0, h, B, g, torch.tensor(0.5, dtype=high), matrix(1, 5, dtype, seed=4)[0] if bias else None]


@pytest.mark.long
def test_kernels_interpreted() -> None:
    run_cases("dora")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_off_the_gpu_the_result_is_the_reference(dtype) -> None:
    W, A, B = matrix(5, 7, dtype, "wider"), matrix(3, 7, dtype), matrix(5, 3, dtype)
    assert torch.equal(dora_norm(W, A, B, 0.5), reference_dora_norm(W, A, B, HALF))
    given = _epilogue(dtype)
    assert torch.equal(dora_epilogue(*given), reference_dora_epilogue(*given))


def test_the_two_make_a_dora_layer() -> None:
    x, W, A, B = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 7), (5, 7), (2, 7), (5, 2)))
    m, b = torch.rand(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    learned = [t.requires_grad_() for t in (x, A, B, m, b)]
    turned = W + 0.3 * (B @ A)
    expected = F.linear(x, turned * (m / turned.norm(dim=1).detach())[:, None], b)
    g = m / dora_norm(W, A, B, torch.tensor(0.3, dtype=torch.float64))
    found = dora_epilogue(F.linear(x, W), F.linear(x, A), B, g, torch.tensor(0.3, dtype=torch.float64), b)
    torch.testing.assert_close(found, expected)
    along = torch.randn_like(found)
    for f, e in zip(
        torch.autograd.grad(found, learned, along), torch.autograd.grad(expected, learned, along), strict=True
    ):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(4,), (2, 1, 3)])
def test_gradients_are_those_of_the_definition(bias, lead) -> None:
    shapes = [(*lead, 5), (*lead, 3), (5, 3), (5,), ()] + [(5,)] * bias
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(dora_epilogue, given)
    assert torch.autograd.gradgradcheck(dora_epilogue, given)


@pytest.mark.parametrize("which", range(6))
def test_each_gradient_is_the_same_without_the_others(which) -> None:
    given = _epilogue(torch.float64)
    given[which].requires_grad_()
    assert torch.autograd.gradcheck(lambda t: dora_epilogue(*given[:which], t, *given[which + 1 :]), given[which])


@pytest.mark.parametrize(("dtype", "factors"), [*((t, t) for t in DTYPES), (torch.bfloat16, torch.float32)])
def test_gradients_have_the_types_of_their_tensors_and_are_close(dtype, factors) -> None:
    given = [t.requires_grad_() for t in _epilogue(dtype, factors=factors)]
    exact = [t.detach().double().requires_grad_() for t in given]
    y = dora_epilogue(*given)
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    expected = torch.autograd.grad(reference_dora_epilogue(*exact), exact, along.double())
    for f, e, t in zip(torch.autograd.grad(y, given, along), expected, given, strict=True):
        assert (f.dtype, f.shape) == (t.dtype, t.shape)
        # Of what is rounded on the way, and once more for the result.
        worst = max(torch.finfo(torch.promote_types(dtype, factors)).eps, torch.finfo(t.dtype).eps / 2)
        assert (f.double() - e).abs().max() <= 3 * worst * e.abs().max()


def test_the_base_output_is_kept_for_the_gain_alone() -> None:
    y0, h, B, g, scale, b = _epilogue(torch.float32)
    for learned, count in ((B, 4), (g, 5)):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            dora_epilogue(y0, h, B.requires_grad_(learned is B), g.requires_grad_(learned is g), scale, b)
        assert len(kept) == count


@pytest.mark.parametrize("dtype", DTYPES)
def test_ops_are_what_their_schemas_say(dtype) -> None:
    torch.library.opcheck(dora._norm_op, (matrix(5, 7, dtype), matrix(3, 7, dtype), matrix(5, 3, dtype), HALF))
    for bias in (True, False):
        given = [t if t is None else t.requires_grad_() for t in _epilogue(dtype, bias=bias)]
        torch.library.opcheck(dora._epilogue_op, tuple(given))


def test_lengths_are_constants() -> None:
    W, A, B = (matrix(*shape, torch.float32).requires_grad_() for shape in ((5, 7), (3, 7), (5, 3)))
    assert not dora_norm(W, A, B, 0.5).requires_grad


def test_lengths_are_constants_in_a_compiled_program_too() -> None:
    def layer(x, W, A, B, m):
        h, y0 = F.linear(x, A), F.linear(x, W)
        return dora_epilogue(y0, h, B, m / dora_norm(W, A, B, HALF), HALF)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rank in (3, 4, 8):
        given = [torch.randn(s, requires_grad=True) for s in ((4, 7), (5, 7), (rank, 7), (5, rank), (5,))]
        y, expected = compiled(*given), layer(*given)
        torch.testing.assert_close(y, expected)
        for f, e in zip(torch.autograd.grad(y.sum(), given), torch.autograd.grad(expected.sum(), given), strict=True):
            torch.testing.assert_close(f, e)


def test_a_launch_on_a_gpu_holds_for_all_ranks_and_batches() -> None:
    # That a layer has more than one tile of columns is asked for the sums of squares.
    guards = guards_of_launch(dora._launch_squares, [(200, 136), (24, 136), (200, 24), ()])
    assert len(guards) <= 1
    assert not guards_of_launch(dora._launch_epilogue, [(40, 136), (40, 24), (136, 24), (136,), (), (136,)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": torch.zeros(5)}, r"expected W of shape \(out, in\), found \(5,\)"),
        ({"A": torch.zeros(3, 6)}, r"expected A of shape \(r, 7\), found \(3, 6\)"),
        ({"B": torch.zeros(3, 5)}, r"expected B of shape \(5, 3\), found \(3, 5\)"),
        ({"W": torch.zeros(5, 7).int()}, "expected W in float32, bfloat16 or float16.*found torch.int32"),
    ],
)
def test_lengths_refuse_what_they_are_not_defined_for(change, message) -> None:
    given = {"W": torch.zeros(5, 7), "A": torch.ones(3, 7), "B": torch.ones(5, 3), "scale": 1.0} | change
    with pytest.raises(BackendError, match=f"dora_norm: {message}"):
        dora_norm(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y0": torch.zeros(5)}, r"expected y0 of shape \(..., out\), found \(5,\)"),
        ({"B": torch.zeros(3, 5)}, r"expected B of shape \(5, r\), found \(3, 5\)"),
        ({"h": torch.zeros(4, 2)}, r"expected h of shape \(4, 3\), found \(4, 2\)"),
        ({"h": torch.zeros(1, 4, 3)}, r"expected h of shape \(4, 3\), found \(1, 4, 3\)"),
        ({"g": torch.zeros(1, 5)}, r"expected g of shape \(5,\), found \(1, 5\)"),
        ({"b": torch.zeros(4)}, r"expected b of shape \(5,\), found \(4,\)"),
        ({"b": torch.zeros(5).long()}, "expected b in float32, bfloat16 or float16.*found torch.int64"),
        ({"g": torch.zeros(5, device="meta")}, "expected g on cpu, where the other tensors are, found meta"),
    ],
)
def test_the_epilogue_refuses_what_it_is_not_defined_for(change, message) -> None:
    given = {"y0": torch.zeros(4, 5), "h": torch.zeros(4, 3), "B": torch.zeros(5, 3), "g": torch.zeros(5), "scale": 1.0}
    with pytest.raises(BackendError, match=f"dora_epilogue: {message}"):
        dora_epilogue(**(given | change))
