"""dora_norm, dora_epilogue, merge_ and merge_saving_ against their references in float64; merging undone bit by bit."""

from __future__ import annotations

import pytest
import torch

from adaptc.kernels.dora_linear import dora_epilogue, dora_norm, reference_dora_epilogue, reference_dora_norm
from adaptc.kernels.merge_weight import merge_, merge_saving_, reference_merge, unmerge_
from tests.gpu.cases import (
    DEVICE,
    EPS,
    F32,
    SCALE,
    SIZES,
    TYPES,
    bits,
    check_close,
    matrix,
    number,
    size_name,
    type_name,
    vector,
)
from tests.kernels.lora_linear_cases import _check_gradients
from tests.kernels.matrices import far_rows, product_error

pytestmark = pytest.mark.usefixtures("nan_where_nothing_was_written")
all_types = pytest.mark.parametrize("types", TYPES, ids=type_name)

#: out, in, rank: primes and whole tiles
WEIGHTS = ((1, 67, 1), (131, 257, 7), (64, 512, 16), (257, 1031, 33), (512, 1024, 64), (193, 641, 127), (67, 131, 128))
all_weights = pytest.mark.parametrize("weight", WEIGHTS, ids=size_name)
all_layouts = pytest.mark.parametrize("layout", ["contiguous", "wider", "transposed", "strided"])


def _factors(weight: tuple[int, int, int], types: tuple[torch.dtype, torch.dtype], layout: str = "contiguous"):
    (rows, cols, rank), (base, adapter) = weight, types
    W = matrix(rows, cols, base, layout, 1)
    return W, matrix(rank, cols, adapter, layout, 2), matrix(rows, rank, adapter, layout, 3)


@all_weights
@all_types
def test_lengths(weight, types) -> None:
    W, A, B = _factors(weight, types)
    found = dora_norm(W, A, B, SCALE)
    assert found.dtype == F32
    high = [t.double() for t in (W, A, B, number(SCALE))]
    exact = reference_dora_norm(*high)
    turned = high[0] + high[3] * (high[2] @ high[1])
    entries = SCALE * product_error(B, A) + EPS * (turned.abs() + high[0].abs())
    allowed = entries.norm(dim=1) + EPS * (weight[1] / 4 + 4) * exact
    assert ((found.double() - exact).abs() <= allowed).all()
    assert torch.equal(bits(dora_norm(W, A, B, SCALE)), bits(found))


@all_layouts
def test_lengths_of_any_layout(layout) -> None:
    for types in TYPES:
        W, A, B = _factors((131, 257, 7), types, layout)
        plain = [t.contiguous() for t in (W, A, B)]
        torch.testing.assert_close(dora_norm(W, A, B, SCALE), dora_norm(*plain, SCALE))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=size_name)
@all_types
def test_epilogue(sizes, types, bias) -> None:
    (rows, cols, _, rank), (base, adapter) = sizes, types
    y0, h, B = (matrix(*s, t, seed=i) for i, (*s, t) in enumerate(
        ((rows, cols, base), (rows, rank, adapter), (cols, rank, adapter)),
    ))  # fmt: skip
    g, b = vector(cols, F32, 4), vector(cols, base, 5) if bias else None
    found = dora_epilogue(y0, h, B, g, SCALE, b)
    assert found.dtype == base
    y, gain, s = y0.double(), g.double(), number(SCALE).double()
    exact = reference_dora_epilogue(y, h.double(), B.double(), gain, s, None if b is None else b.double())
    inner = y + s * (h.double() @ B.double().T)
    wide = gain.abs() * (SCALE * product_error(h, B.T) + EPS * (y.abs() + 2 * inner.abs())) + EPS * exact.abs()
    check_close(found, exact, wide)
    assert torch.equal(bits(dora_epilogue(y0, h, B, g, SCALE, b)), bits(found))


@all_types
def test_gradients_of_the_epilogue(types) -> None:
    for rows, cols, rank in ((5, 131, 7), (67, 64, 16), (256, 193, 33)):
        y0, h = matrix(rows, cols, types[0], seed=1), matrix(rows, rank, types[1], seed=2)
        tensors = [y0, h, matrix(cols, rank, types[1], seed=3), vector(cols, F32, 4), number(SCALE)]
        tensors += [vector(cols, types[0], 5)]
        g = matrix(rows, cols, types[0], seed=6)
        _check_gradients(dora_epilogue, reference_dora_epilogue, tensors, g, max(rows, rank))


@all_weights
@all_types
@pytest.mark.parametrize("saving", [True, False], ids=["saving", "plain"])
def test_merge_is_one_rounding_from_the_exact_sum(weight, types, saving) -> None:
    W, A, B = _factors(weight, types)
    before = W.double()
    exact = reference_merge(before, A.double(), B.double(), number(SCALE).double())
    (merge_saving_ if saving else merge_)(W, A, B, SCALE)
    check_close(W, exact, SCALE * product_error(B, A) + EPS * (exact.abs() + before.abs()))


@all_weights
@all_types
@all_layouts
def test_merge_undone_bit_by_bit(weight, types, layout) -> None:
    W, A, B = _factors(weight, types, layout)
    W[0, 0], W[-1, -1] = -0.0, torch.inf
    memory = torch.empty(0, dtype=W.dtype, device=DEVICE).set_(W.untyped_storage())
    before, again = memory.clone(), W.clone()
    for _ in range(3):
        saved = merge_saving_(W, A, B, SCALE)
        assert not torch.equal(bits(W), bits(saved))
        # The values between those of the weight, too.
        unmerge_(W, saved)
        assert torch.equal(bits(memory), bits(before))
    merge_(again, A, B, SCALE)
    merge_(W, A, B, SCALE)
    assert torch.equal(bits(again), bits(W))


def test_a_weight_beyond_what_int32_can_count() -> None:
    rows, cols = 3, 37
    W = far_rows(rows, cols, DEVICE)
    A, B = torch.ones(1, cols, dtype=W.dtype, device=DEVICE), torch.ones(rows, 1, dtype=W.dtype, device=DEVICE)
    merge_(W, A, B, 0.5)
    assert (W == 0.5).all()
    torch.testing.assert_close(dora_norm(W, A, B, -1.0), torch.full((rows,), (cols / 4) ** 0.5, device=DEVICE))
