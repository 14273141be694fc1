"""op(x, weight(W)) against the cheaper form around the layer, method by method, over random shapes and dtypes.

No program is involved: these are the two functions a method is made of, on an op by itself.
"""

from __future__ import annotations

import warnings
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adaptc
from adaptc.methods import TargetedConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method
from tests.support.cover import examples
from tests.support.method_table import BY_NAME, ENTRIES, Entry

aten = torch.ops.aten

#: kind -> the op at a layer of these widths, and an input for it
OPS: dict[str, Any] = {
    "linear": lambda i, o: (Op("linear", (o, i), aten.linear.default), (7, i)),
    "wide": lambda i, o: (Op("linear", (o, i), aten.linear.default), (2, 3, i)),
    "embedding": lambda i, o: (Op("embedding", (o, i), aten.embedding.default), None),
    "conv1d": lambda i, o: (Op("conv1d", (o, i, 3), aten.conv1d.default, ((2,), (1,), (1,), 1)), (2, i, 7)),
    "pointwise": lambda i, o: (
        Op("conv2d", (o, i, 1, 1), aten.conv2d.default, ((1, 1), (0, 0), (1, 1), 1)),
        (2, i, 3, 5),
    ),
    "conv2d": lambda i, o: (
        Op("conv2d", (o, i, 3, 5), aten.conv2d.default, ((1, 2), (2, 2), (2, 1), 1)),
        (2, i, 7, 9),
    ),
}


#: entries whose methods are computed by the weight wherever they are
WEIGHT_ALONE = {"miss_bat", "fourierft", "waveft", "waveft_sym4", "waveft_sparse", "shira"}
WEIGHT_ALONE |= {"supertuning", "supertuning_hybrid"} | {e for e in BY_NAME if e.startswith("glora")}


def method_at(entry: Entry, op: Op) -> Method:
    config: Any = getattr(adaptc, entry.cls)(**{**entry.config, "target_modules": ["layer"]})
    assert isinstance(config, TargetedConfig)
    method = config.method("layer", op.kind).sizes.specialized_for(op)
    return method.sharing.settle_shared_sizes([(method, op)])[0]


def op_at(entry: Entry, kind: str, times: tuple[int, int]) -> tuple[Op, Any]:
    return OPS[kind](entry.widths[0] * times[0], entry.widths[1] * times[1])


@cache
def places_with_both_forms(name: str) -> list[tuple[str, tuple[int, int]]]:
    """The layers, of multiples of the widths of an entry, where its method can be computed either way."""
    entry, found = BY_NAME[name], []
    for kind, times in product(sorted(OPS), [(1, 2), (2, 1), (1, 1), (3, 1), (1, 3)]):
        op, _ = op_at(entry, kind, times)
        try:
            method = method_at(entry, op)
            method.slots(op)
        except (adaptc.TargetError, adaptc.ConfigError):
            continue
        if method.has_apply_form(op):
            found.append((kind, times))
    return found


def values(entry: Entry, method: Method, op: Op, W: Tensor) -> dict[str, Tensor]:
    """Random slots in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = method.init(op, W, torch.float64).slots
    specs = method.slots(op)
    return {
        n: entry.random_tensor(f"layer.{n}", t) if specs[n].trainable and t.is_floating_point() else t
        for n, t in first.items()
    }


def both(method: Method, op: Op, x: Tensor, W: Tensor, b: Tensor | None, slots: Any) -> tuple[Tensor, Tensor]:
    number = method.scale(op)
    scale = None if number is None else torch.tensor(number, dtype=torch.promote_types(W.dtype, torch.float32))
    bias = method.bias(op, b, slots, scale) if method.has_bias() else b
    bias = None if bias is None else bias.to(W.dtype)  # a new one has the adapter's dtype
    return op(x, method.weight(op, W, slots, scale), bias), method.call_adapted(op, x, W, b, slots, scale)


@pytest.mark.parametrize("name", sorted(WEIGHT_ALONE))
def test_some_methods_have_no_form_around_a_layer(name: str):
    assert BY_NAME[name].has_weight_form
    assert places_with_both_forms(name) == []


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e.has_weight_form and e.name not in WEIGHT_ALONE], ids=lambda e: e.name
)
@settings(max_examples=examples(12))
@given(
    data=st.data(),
    biased=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_forms_agree(entry: Entry, data: st.DataObject, biased: bool, seed: int):
    """In float64 to 1e-10 of the largest output; in float32 and bfloat16 within the rounding of their arithmetic."""
    torch.manual_seed(seed)
    kind, times = data.draw(st.sampled_from(places_with_both_forms(entry.name)))
    op, shape = op_at(entry, kind, times)
    method = method_at(entry, op)
    W = torch.randn(op.shape, dtype=torch.float64) / op.in_features**0.5
    b = torch.randn(op.out_features, dtype=torch.float64) if biased and kind != "embedding" else None
    x: Tensor = torch.randint(op.in_features, (3, 5)) if shape is None else torch.randn(shape, dtype=torch.float64)
    slots = values(entry, method, op, W)
    exact, outside = both(method, op, x, W, b, slots)
    size = float(exact.abs().max())
    assert float((outside - exact).abs().max()) <= 1e-10 * size
    for dtype, adapter in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        small = {n: t.to(adapter) if t.is_floating_point() else t for n, t in slots.items()}
        x_, W_, b_ = (t.to(dtype) if t is not None and t.is_floating_point() else t for t in (x, W, b))
        found, cheap = both(method, op, x_, W_, b_, small)  # type: ignore[arg-type]
        assert found.dtype == cheap.dtype == dtype
        # Roundings of the inputs, of the weight (which the method may enlarge), and of sums of that many terms.
        bound = 16 * torch.finfo(dtype).eps * size * max(1.0, op.matrix_shape[1] ** 0.5)
        assert float((cheap.double() - exact).abs().max()) <= bound
        assert float((found.double() - exact).abs().max()) <= bound


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.has_weight_form], ids=lambda e: e.name)
def test_identity_values_compute_the_base(entry: Entry):
    """Exactly up to rounding, at every op, and with finite gradients: padding to a capacity relies on both."""
    tried = 0
    for kind, make in OPS.items():
        op, _ = make(*entry.widths)
        try:
            method = method_at(entry, op)
            method.slots(op)
        except (adaptc.TargetError, adaptc.ConfigError):
            continue
        tried += 1
        W = torch.randn(op.shape, dtype=torch.float64)
        slots = {
            n: t.requires_grad_() if t.is_floating_point() else t
            for n, t in method.identity(op, W, torch.float64).items()
        }
        number = method.scale(op)
        made = method.weight(op, W, slots, None if number is None else torch.tensor(number, dtype=torch.float64))
        torch.testing.assert_close(made, op.dense(W) if made.shape != W.shape else W, rtol=1e-12, atol=1e-12)
        if made.requires_grad:
            made.sin().sum().backward()
            assert all(t.grad is None or t.grad.isfinite().all() for t in slots.values()), kind
    assert tried
