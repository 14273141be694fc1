"""``adaptc::product``: whatever makes it, the product of the plain graph within rounding, and its gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from adaptc.errors import BackendError
from adaptc.passes.protocol import matmul_op as module
from adaptc.passes.protocol.matmul_op import (
    ALL_ROW_CLASSES,
    ONEDNN,
    ROW_CLASS_LIMITS,
    linear_matmul,
    linear_matmul_op,
    row_class,
)

TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of x that oneDNN is given, or what stands for it where torch has none."""
    seen: list[tuple[int, ...]] = []
    real = module._pointwise or (lambda x, weight, bias, *_: F.linear(x, weight, bias))

    def counted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return real(x, *rest)

    monkeypatch.setattr(module, "_pointwise", counted)
    return seen


def of(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def close(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within rounding of the product in float64, of which the plain one may be no nearer."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    if found.numel():
        # The plain product of half precision may sum in that precision.
        plain = (F.linear(x, weight, bias).double() - exact).abs().max()
        rounding = torch.finfo(x.dtype).eps * (2 * exact.abs().max() + 4 * weight.shape[1] ** 0.5)
        assert (found.double() - exact).abs().max() <= 2 * plain + rounding


def strided(kind: str, lead: tuple[int, ...], width: int, dtype: torch.dtype) -> Tensor:
    if kind == "expanded":
        return of(dtype, width).expand(*lead, width)
    if kind == "columns":
        return of(dtype, *lead, 2 * width)[..., ::2]
    if kind == "transposed":
        return of(dtype, width, *lead).movedim(0, -1)
    if kind == "offset":
        return of(dtype, *lead, width + 3)[..., 3:]
    return of(dtype, *lead, width)


@given(
    lead=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    sizes=st.sampled_from([(5, 7), (129, 131), (257, 61), (1, 3), (3, 1), (17, 0)]),
    dtype=st.sampled_from([*TYPES, torch.float16, torch.float64]),
    strides=st.sampled_from(["contiguous", "expanded", "columns", "transposed", "offset"]),
    turned=st.booleans(),
    biased=st.booleans(),
    columns=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_it_is_the_plain_product_within_rounding(
    lead: tuple[int, ...],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    strides: str,
    turned: bool,
    biased: bool,
    columns: bool,
    threads: int,
) -> None:
    out, width = sizes
    x = strided(strides, lead, width, dtype)
    weight = of(dtype, width, out).t() if turned else of(dtype, out, width)
    bias = of(dtype, out) if biased else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for run in (linear_matmul, linear_matmul_op):
            found = run(x, weight, bias, ONEDNN, ALL_ROW_CLASSES, ALL_ROW_CLASSES if columns else [])
            close(found, x, weight, bias)
            assert found.is_contiguous() or found.stride() == F.linear(x, weight, bias).stride()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TYPES)
def test_only_calls_of_its_classes_go_to_onednn(dtype: torch.dtype, calls: list[tuple[int, ...]]) -> None:
    weight, chosen = of(dtype, 13, 7), [0, 3]
    for rows in (1, 2, 4, 5, 16, 17, 256, 257):
        close(linear_matmul(of(dtype, rows, 7), weight, None, ONEDNN, chosen), of(dtype, rows, 7), weight, None)
    assert calls == ([(1, 7), (17, 7), (256, 7)] if module.onednn_supports(dtype) else [])
    assert [row_class(n) for n in (1, *(m + 1 for m in ROW_CLASS_LIMITS))] == list(ALL_ROW_CLASSES)


def test_at_columns_the_transpose_is_made(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = module.transposed_matmul
    monkeypatch.setattr(module, "transposed_matmul", lambda x, *rest: (made.append(x.numel() // 7), real(x, *rest))[1])
    weight, bias = of(torch.float32, 13, 7), of(torch.float32, 13)
    for lead in ((1,), (2,), (2, 2), (4, 1, 1), (5,)):
        x = of(torch.float32, *lead, 7)
        found = linear_matmul(x, weight, bias, ONEDNN, [2], [0, 1])
        close(found, x, weight, bias)
        assert found.is_contiguous()
    assert made == ([1, 2, 4, 4] if module.onednn_supports(torch.float32) else [])
    # The operands of others are left as they are, and a gradient is linear's.
    x = of(torch.float32, 3, 7).requires_grad_()
    linear_matmul(x, weight, bias, ONEDNN, [], [1]).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 7))


def test_what_does_not_fit_is_linear(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = of(torch.float32, 3, 7), of(torch.float32, 13, 7)
    strides = of(torch.float32, 13, 14)[:, ::2]
    close(linear_matmul(x, strides, None, ONEDNN, ALL_ROW_CLASSES), x, strides, None)
    assert linear_matmul(x.double(), weight.double(), None, ONEDNN, ALL_ROW_CLASSES).dtype == torch.float64
    assert linear_matmul(x, weight, None, "linear", ALL_ROW_CLASSES).equal(F.linear(x, weight))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    linear_matmul(x, weight, None, ONEDNN, ALL_ROW_CLASSES)
    assert calls == []
    for bad in (x.double(), of(torch.float32, 3, 6)):
        with pytest.raises(RuntimeError):
            linear_matmul(bad, weight, None, ONEDNN, ALL_ROW_CLASSES)
    for run in (linear_matmul, linear_matmul_op):
        with pytest.raises(BackendError, match="unknown kind 'mkl'; choose one of linear, onednn"):
            run(x, weight, None, "mkl", ALL_ROW_CLASSES, [])


def test_without_the_private_op_it_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = of(torch.float32, 3, 7), of(torch.float32, 13, 7)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert module._find_pointwise_op() is None
    monkeypatch.setattr(module, "_pointwise", module._find_pointwise_op())
    for run in (linear_matmul, linear_matmul_op):
        assert run(x, weight, None, ONEDNN, ALL_ROW_CLASSES, ALL_ROW_CLASSES).equal(F.linear(x, weight))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lead", [(1,), (2, 3), (300,), ()])
def test_gradients_are_those_of_linear(dtype: torch.dtype, lead: tuple[int, ...], calls: list[tuple[int, ...]]) -> None:
    operands = of(dtype, *lead, 7), of(dtype, 13, 7), of(dtype, 13)
    g, found = of(dtype, *lead, 13, seed=5), []
    for run in (lambda *t: linear_matmul(*t, ONEDNN, ALL_ROW_CLASSES), F.linear):
        leaves = [t.detach().clone().requires_grad_() for t in operands]
        found.append(torch.autograd.grad(run(*leaves), leaves, g))
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
    if module.onednn_supports(dtype):
        assert calls == [(*lead, 7), (*lead, 13)]  # forward, and the gradient of x


def test_a_frozen_layer_passes_gradients_on_alone() -> None:
    x, weight = of(torch.float32, 5, 7).requires_grad_(), of(torch.float32, 13, 7)
    linear_matmul(x, weight, None, ONEDNN, ALL_ROW_CLASSES).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 7))
    assert weight.grad is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in make_dual
def test_no_derivative_is_lost_in_a_transform() -> None:
    x, other, weight = of(torch.float32, 3, 7), of(torch.float32, 3, 7, seed=1), of(torch.float32, 13, 7)

    def run(x: Tensor) -> Tensor:
        return linear_matmul(x, weight, None, ONEDNN, ALL_ROW_CLASSES)

    expected = F.linear(other, weight)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(x, other))).tangent
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(torch.func.jvp(run, (x,), (other,))[1], expected)
    torch.testing.assert_close(torch.func.grad(lambda x: run(x).sum())(x), weight.sum(0).expand(3, 7))
    torch.testing.assert_close(torch.func.vmap(run)(x), F.linear(x, weight))


def test_as_an_op_of_graphs() -> None:
    x, weight, bias = of(torch.float32, 3, 7).requires_grad_(), of(torch.float32, 13, 7), of(torch.float32, 13)
    for b in (None, bias):
        torch.library.opcheck(linear_matmul_op, (x, weight, b, ONEDNN, [0, 1], []))
        torch.library.opcheck(linear_matmul_op, (x, weight, b, ONEDNN, [0], [1]))
