"""A head and its cross entropy as one step: which rows take work, labels of every kind, types, and both gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adaptc.passes.train.head_loss import linear_cross_entropy
from tests.support.cover import examples

V, K = 11, 7


def values(rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((1, rows, K), (V, K), (V,))
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes)
    return x, w, b


def labels_of(kept: list[bool], ignored: int = -100) -> Tensor:
    return torch.tensor([(3 * i + 1) % V if k else ignored for i, k in enumerate(kept)])


def written(x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, mean: bool, ignored: int) -> Any:
    logits = F.linear(x, w, b)
    return logits, F.cross_entropy(
        logits.view(-1, V), labels, ignore_index=ignored, reduction="mean" if mean else "sum"
    )


def step(
    x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, mean: bool = True, ignored: int = -100, **kw: Any
) -> Any:
    return linear_cross_entropy(x, w, b, labels, None, None, mean, ignored, **kw)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=37), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_any_choice_of_labels(kept: list[bool], labelled: bool, mean: bool, through_logits: bool, bias: bool) -> None:
    """All ignored (the mean of nothing is not a number, as in torch), none, one row alone, and what lies between."""
    x, w, b = values(len(kept))
    used = [x, w, b] if bias else [x, w]
    labels, mask = labels_of(kept), torch.tensor(kept)[None, :, None]
    found, expected = (f(x, w, b if bias else None, labels, mean, -100) for f in (_labelled(labelled), written))
    same(found[1], expected[1])
    same(found[0], expected[0] * mask if labelled else expected[0])

    def gradients(logits: Tensor, loss: Tensor) -> Any:
        total = loss * 3
        if through_logits:
            weight = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
            # Rows that are not computed are zero whatever the head is.
            total = total + (logits * (weight * mask if labelled else weight)).sum()
        return torch.autograd.grad(total, used)

    same(gradients(*found), gradients(*expected))


class Products(TorchDispatchMode):
    """Counts the multiplications of products, those into memory of others included."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def _labelled(labelled: bool) -> Any:
    return lambda *args: step(*args, labelled_only=labelled)


@pytest.mark.parametrize("through_logits", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_products_are_of_labelled_rows_alone(labelled: bool, through_logits: bool) -> None:
    rows, some = 23, 5
    x, w, _ = values(rows)
    labels = labels_of([i % rows < some for i in range(rows)])
    with Products() as forward:
        logits, loss = step(x, w.detach(), None, labels, labelled_only=labelled)
    with Products() as backward:
        (loss + logits.sum() if through_logits else loss).backward()
    row = V * K
    assert forward.count == row * (some if labelled else rows)
    # A gradient that comes in through the logits has rows without a label, too.
    assert backward.count == row * (rows if through_logits and not labelled else some)


@pytest.mark.parametrize("labelled", [False, True])
def test_few_rows_without_a_label_are_not_worth_a_copy(labelled: bool) -> None:
    rows = 37
    x, w, _ = values(rows)
    labels = labels_of([i != 5 for i in range(rows)])
    _, loss = step(x, w.detach(), None, labels, labelled_only=labelled)
    with Products() as backward:
        loss.backward()
    assert backward.count == V * K * (rows - labelled)


@pytest.mark.parametrize("labelled", [False, True])
def test_labels_of_other_types_and_sizes_as_torch_has_them(labelled: bool) -> None:
    x, w, b = values(5)
    labels = labels_of([True] * 5)
    small = labels.to(torch.uint8)
    found, expected = step(x, w, b, small, labelled_only=labelled), written(x, w, b, small, True, -100)
    same(found, expected)
    ignored = step(x, w, b, small, ignored=4, labelled_only=labelled)
    same(ignored[1], written(x, w, b, small, True, 4)[1])
    for wrong in (labels.int(), labels.double(), labels[:3], torch.cat([labels, labels_of([False] * 5)])):
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            written(x, w, b, wrong, True, -100)
        with pytest.raises(theirs.type) as ours:
            step(x, w, b, wrong, labelled_only=labelled)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        step(x, w, b, labels + V, labelled_only=labelled)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_its_loss_in_float32(dtype: torch.dtype, labelled: bool, monkeypatch: Any) -> None:
    """In the types of a model that casts its logits for the loss and returns them as they are; pieces of few columns,
    whose products must not be rounded each time they are summed."""
    monkeypatch.setattr("adaptc.passes.train.head_loss.CHUNK_ELEMENTS", 1)
    monkeypatch.setattr("adaptc.passes.train.head_loss.MIN_CHUNK_COLUMNS", 3)
    x, w, b = values(41, dtype=dtype)
    labels = labels_of([i % 3 > 0 for i in range(41)])
    logits, loss = linear_cross_entropy(x, w, b, labels, None, torch.float32, True, -100, labelled)
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    plain = F.cross_entropy(F.linear(x, w, b).float().view(-1, V), labels)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    exact = F.cross_entropy(F.linear(*(t.double() for t in (x, w, b))).view(-1, V), labels)
    for found, right in zip(torch.autograd.grad(loss, (x, w, b)), torch.autograd.grad(exact, (x, w, b)), strict=True):
        assert found.dtype == dtype
        assert (found - right).norm() <= 2 * torch.finfo(dtype).eps * right.norm()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_the_product_in_its_type_and_the_loss_in_float32(dtype: torch.dtype, labelled: bool) -> None:
    x, w, b = values(29, dtype=torch.float32)
    labels = labels_of([i % 2 > 0 for i in range(29)])
    with torch.autocast("cpu", dtype):
        logits, loss = step(x, w, b, labels, labelled_only=labelled)
        expected = written(x, w, b, labels, True, -100)
    mask = (labels != -100)[None, :, None]
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(logits, expected[0] * mask if labelled else expected[0], rtol=0, atol=0)
    torch.testing.assert_close(loss, expected[1], rtol=1e-6, atol=0)
    theirs = torch.autograd.grad(expected[1], (x, w, b))
    for found, their in zip(torch.autograd.grad(loss, (x, w, b)), theirs, strict=True):
        assert found.dtype == torch.float32
        assert (found - their).norm() <= 2 * torch.finfo(dtype).eps * their.norm()
