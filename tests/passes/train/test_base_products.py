"""Products of frozen layers in training graphs: where they are chosen, and that nothing but rounding changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from adaptc.passes.protocol import matmul_op as op
from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES, LINEAR, ONEDNN
from adaptc.passes.train.base_products import base_input_gradient, base_matmul, frozen_linear
from adaptc.passes.train.fused_lora_linear import lora_linears
from adaptc.passes.train.head_loss import linear_cross_entropy
from adaptc.passes.train.training_pipeline import fuse_training
from tests.passes.train.test_fuse_training import calls, gradients, inputs, labels_of, module_of
from tests.support.rounding import assert_close_to_rounding

FLOAT, HALF = torch.float32, torch.bfloat16
TOLD = tuple((t, ONEDNN, ALL_ROW_CLASSES, ONEDNN, ALL_ROW_CLASSES) for t in (FLOAT, HALF))


@dataclass(frozen=True)
class Kind:
    kind: str
    classes: tuple[int, ...] = ALL_ROW_CLASSES


def fastest(out: int, width: int, dtype: torch.dtype) -> Kind:
    """In place of a table."""
    return Kind(ONEDNN if dtype in (FLOAT, HALF) else LINEAR)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows, columns of the weight and rows of the weight of each product that oneDNN is given, or what stands for it
    where torch has none."""
    found: list[tuple[int, ...]] = []
    plain = op._pointwise or (lambda x, w, b, *_: F.linear(x, w, b))
    added = op._pointwise_with or (lambda x, total, w, *_: total + F.linear(x, w))

    def note(x: Tensor, w: Tensor) -> None:
        found.append((x.numel() // x.shape[-1], *w.shape))

    def one(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
        note(x, w)
        return plain(x, w, *rest)

    def other(x: Tensor, total: Tensor, w: Tensor, *rest: Any) -> Tensor:
        note(x, w)
        return added(x, total, w, *rest)

    monkeypatch.setattr(op, "_pointwise", one)
    monkeypatch.setattr(op, "_pointwise_with", other)
    return found


def of(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def strided(kind: str, lead: tuple[int, ...], width: int, dtype: torch.dtype) -> Tensor:
    if kind == "expanded":
        return of(dtype, width).expand(*lead, width)
    if kind == "transposed":
        return of(dtype, width, *lead).movedim(0, -1)
    if kind == "columns":
        return of(dtype, *lead, 2 * width)[..., ::2]
    return of(dtype, *lead, width)


def near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    exact, eps = expected.double(), torch.finfo(found.dtype).eps
    scale = exact.abs().max() if exact.numel() else 0.0
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=float(scale) * 60 * eps + 1e-30)


LAYOUTS = st.sampled_from(["contiguous", "expanded", "transposed", "columns"])


@given(
    lead=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    sizes=st.sampled_from([(5, 7), (131, 37), (1, 3), (3, 1)]),
    dtype=st.sampled_from([FLOAT, HALF, torch.float16, torch.float64]),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    biased=st.booleans(),
    classes=st.sets(st.sampled_from(ALL_ROW_CLASSES)).map(sorted),
    threads=st.sampled_from([1, 2]),
)
def test_products_are_those_of_linear(
    lead: tuple[int, ...],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    layouts: tuple[str, str],
    biased: bool,
    classes: list[int],
    threads: int,
) -> None:
    out, width = sizes
    told = tuple((t, ONEDNN, classes, ONEDNN, classes) for t in (FLOAT, HALF))
    w, b = of(dtype, out, width), of(dtype, out, seed=2) if biased else None
    x, g = strided(layouts[0], lead, width, dtype), strided(layouts[1], lead, out, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = F.linear(x, w, b)
        near(base_matmul(x, w, b, told), expected)
        rows = g.reshape(-1, out)
        total = of(dtype, len(rows), width, seed=9)
        near(base_input_gradient(rows, w, told), rows @ w)
        near(base_input_gradient(rows, w, told, total.clone()), torch.addmm(total, rows, w))
        leaf = x.detach().requires_grad_()
        made = frozen_linear(leaf, w, b, told)
        near(made.detach(), expected)
        near(torch.autograd.grad(made, leaf, g)[0], (rows @ w).reshape(x.shape))
    finally:
        torch.set_num_threads(before)


def layer(m: Any, x: Tensor) -> Any:
    return m.y(0, x).tanh(), m.y(1, x), m.layers[2](x)


def head(m: Any, x: Tensor) -> Any:
    logits = m.head(m.y(0, x)[..., :1] * x)
    return F.cross_entropy(logits.view(-1, 11), labels_of(x)), logits


def chosen(body: Callable[[Any, Tensor], Any], train: str = "", **options: Any) -> tuple[nn.Module, Any, Any]:
    """(the module as exported, the same with chosen products, the result)."""
    modules = [module_of(body, **{"dtype": FLOAT, **options}) for _ in range(2)]
    for module in modules:
        for name, p in module.named_parameters():
            p.requires_grad_(p.requires_grad or bool(train and name.startswith(train)))
    return modules[0], modules[1], fuse_training(modules[1], choose=(fastest, fastest))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("body", [layer, head])
def test_it_fires_in_fused_layers_plain_ones_and_the_head(body: Any, bias: bool, seen: list[Any]) -> None:
    plain, module, result = chosen(body, bias=bias)
    assert dict(result.trail)["choose_base_matmuls"] == (3 if body is layer else 2)
    assert calls(module, lora_linears) == 1
    assert calls(module, frozen_linear) == (body is layer)
    assert calls(module, linear_cross_entropy) == (body is head)
    for n in (2, 5):
        seen.clear()
        found = gradients(module, inputs(n, FLOAT))
        torch.testing.assert_close(found, gradients(plain, inputs(n, FLOAT)), rtol=1e-5, atol=1e-5)
        if op.onednn_supports(FLOAT):
            # Forward with each weight, and backward with each turned one.
            widths = (5, 3, 2) if body is layer else (5, 11)
            assert sorted(seen) == sorted([(3 * n, w, 7) for w in widths] + [(3 * n, 7, w) for w in widths])


@pytest.mark.parametrize(("train", "count"), [("layers.0.weight", 2), ("layers.1.bias", 2), ("layers", 0), ("head", 3)])
def test_a_layer_that_trains_is_left_alone(train: str, count: int) -> None:
    plain, module, result = chosen(layer, train)
    assert dict(result.trail)["choose_base_matmuls"] == count
    found, expected = (gradients(m, inputs(3, FLOAT)) for m in (module, plain))
    assert any(n.startswith(train) for n in found[2]) or train == "head"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", ["layers", "head"])
def test_a_layer_that_trains_after_all_gets_its_gradients(train: str) -> None:
    for body in (layer, head):
        plain, module, _ = chosen(body)
        for m in (plain, module):
            for name, p in m.named_parameters():
                p.requires_grad_(p.requires_grad or name.startswith(train))
        found, expected = (gradients(m, inputs(3, FLOAT)) for m in (module, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_other_types_and_choices_are_torchs_own() -> None:
    _, module, result = chosen(layer, dtype=torch.float64)
    assert dict(result.trail)["choose_base_matmuls"] == 0
    assert calls(module, frozen_linear) == 0
    assert {k: len(v) for k, v in result.data[-1].items()} == {
        "matmuls in training, float64": 3,
        "gradients of inputs, float64": 3,
    }
    module = module_of(layer, dtype=FLOAT)
    assert "choose_base_matmuls" not in dict(fuse_training(module).trail)


def test_each_direction_and_type_has_its_own_choice(seen: list[Any]) -> None:
    def back(out: int, width: int, dtype: torch.dtype) -> Kind:
        return Kind(ONEDNN if dtype == FLOAT else LINEAR)

    def forth(out: int, width: int, dtype: torch.dtype) -> Kind:
        return Kind(LINEAR if dtype == FLOAT else ONEDNN)

    module = module_of(layer, dtype=FLOAT)
    fuse_training(module, choose=(forth, back))
    for autocast in (False, True):
        seen.clear()
        with torch.autocast("cpu", HALF, enabled=autocast):
            out = module(inputs(3, FLOAT).requires_grad_())
        sum(t.float().sum() for t in out).backward()
        if op.onednn_supports(HALF if autocast else FLOAT):
            assert all((rows[1] == 7) != autocast for rows in seen)
            assert len(seen) == 3


@pytest.mark.parametrize("body", [layer, head])
def test_under_autocast_products_are_of_its_type(body: Any, seen: list[Any]) -> None:
    plain, module, _ = chosen(body)
    x = inputs(5, FLOAT)
    with torch.autocast("cpu", HALF):
        found, expected = gradients(module, x), gradients(plain, x)
    exact = gradients(plain, x)
    assert [t.dtype for t in found[0]] == [t.dtype for t in expected[0]]
    for f, e, right in zip(_flat(found), _flat(expected), _flat(exact), strict=True):
        assert _away(f, right) <= 2 * _away(e, right) + 4 * torch.finfo(HALF).eps
    if op.onednn_supports(HALF):
        assert len(seen) == (6 if body is layer else 4)


def _flat(found: list[Any]) -> list[Tensor]:
    return [*found[0], found[1], *(found[2][n] for n in sorted(found[2]))]


def _away(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def test_a_backward_left_under_autocast_stays_in_its_type() -> None:
    x, w = of(FLOAT, 5, 7).requires_grad_(), of(FLOAT, 13, 7)
    y = frozen_linear(x, w, None, TOLD)
    with torch.autocast("cpu", HALF):
        y.sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(5, 7))


def test_frozen_layers_have_derivatives_of_any_order() -> None:
    x, w, b = of(FLOAT, 5, 7), of(FLOAT, 13, 7), of(FLOAT, 13)

    def slope(run: Callable[..., Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), leaf)[0]

    found = slope(lambda x: frozen_linear(x, w, b, TOLD))
    torch.testing.assert_close(found, slope(lambda x: F.linear(x, w, b)), rtol=1e-4, atol=1e-3)


def test_transforms_get_linear(seen: list[Any]) -> None:
    x, w = of(FLOAT, 5, 7), of(FLOAT, 13, 7)
    run = lambda x: frozen_linear(x, w, None, TOLD)  # noqa: E731
    torch.testing.assert_close(torch.func.grad(lambda x: run(x).sum())(x), w.sum(0).expand(5, 7))
    torch.testing.assert_close(torch.func.vmap(run)(x), F.linear(x, w))
    torch.testing.assert_close(torch.func.jacrev(run)(x), torch.func.jacrev(lambda x: F.linear(x, w))(x))
    assert seen == []


def test_without_the_private_op_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_pointwise", None)
    monkeypatch.setattr(op, "_pointwise_with", None)
    _, module, _ = chosen(head)
    without = module_of(head, dtype=FLOAT)
    fuse_training(without)
    for m in (module, without):
        m.zero_grad()
    found, expected = (gradients(m, inputs(3, FLOAT)) for m in (module, without))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_copies_of_graphs_keep_it(seen: list[Any]) -> None:
    _, module, _ = chosen(layer)
    expected = gradients(module, inputs(3, FLOAT))
    seen.clear()
    torch.testing.assert_close(gradients(copy.deepcopy(module), inputs(3, FLOAT)), expected, rtol=0, atol=0)
    assert len(seen) == (6 if op.onednn_supports(FLOAT) else 0)


def test_exported_again_it_is_plain() -> None:
    def two(m: Any, x: Tensor) -> Any:
        return m.layers[2](m.layers[0](x) @ m.a[0].new_ones(5, 7) + m.a[0][0])

    _, module, _ = chosen(two)
    assert calls(module, frozen_linear) == 2
    module.requires_grad_(False)
    again = torch.export.export(module, (inputs(3, FLOAT),))
    assert {str(n.target).split(".")[0] for n in again.graph.nodes if n.op == "call_function"} == {"aten"}


# Dynamo instantiates functions that it traces.
@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("body", [layer, head])
def test_a_compiler_takes_them_whole(body: Any, autocast: bool, seen: list[Any]) -> None:
    _, module, _ = chosen(body)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    found = []
    for m in (compiled, module):
        seen.clear()
        with torch.autocast("cpu", HALF, enabled=autocast):
            found.append(_flat(gradients(m, inputs(5, FLOAT))))
        if op.onednn_supports(HALF if autocast else FLOAT):
            assert len(seen) == (6 if body is layer else 4)
    for one, other in zip(*found, strict=True):
        assert_close_to_rounding(one, other, HALF if autocast else FLOAT, factor=1 if autocast else 16)
