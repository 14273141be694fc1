"""bitsandbytes' kernels give the values of NF4 and FP4 weights, and are not used where they would not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from adaptc.passes.quantized import bitsandbytes_kernels
from adaptc.passes.quantized.bitsandbytes_kernels import dequantize_blocks, multiply_few_rows, pack_weight
from adaptc.passes.quantized.table_scheme import TableScheme
from tests.support.quantized_models import HAS_FEW_ROWS_KERNEL

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stored_weight(scheme: TableScheme, rows: int, columns: int) -> Any:
    torch.manual_seed(rows * 131 + columns)
    return scheme.with_plain_scales(scheme.quantize(torch.randn(rows, columns)))[1]


@given(
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from([2, 6, 32, 64, 128, 256, 1024]),
    st.integers(1, 9),
    st.integers(1, 7),
    st.sampled_from(DTYPES),
)
def test_values_are_those_of_the_scheme_to_the_bit(table, block_size, rows, blocks, dtype):
    scheme = TableScheme(table, block_size)
    columns = block_size * blocks
    stored = stored_weight(scheme, rows, columns)
    found = dequantize_blocks(scheme, stored, rows * columns, dtype)
    assert found is not None
    expected = scheme.dequantize(stored, rows, columns).to(dtype)
    assert torch.equal(found.reshape(rows, columns), expected)


@pytest.mark.parametrize(
    ("scheme", "rows", "columns"),
    [(TableScheme("nf4", 64), 3, 37), (TableScheme("nf4", 7), 4, 14), (TableScheme("fp4", 4096), 2, 4096)],
    ids=["a last block that is short", "odd blocks", "large blocks"],
)
def test_shapes_that_the_library_reads_otherwise_are_not_asked_for(scheme, rows, columns):
    assert dequantize_blocks(scheme, stored_weight(scheme, rows, columns), rows * columns, torch.float32) is None


def test_quantised_scales_and_other_tables_are_not_asked_for():
    double = TableScheme("nf4", 64, 256)
    stored = double.quantize(torch.randn(4, 128))
    assert dequantize_blocks(double, stored, 512, torch.float32) is None
    scheme, plain = double.with_plain_scales(stored)
    assert dequantize_blocks(scheme, plain, 512, torch.float32) is not None
    other = {**plain, "table": plain["table"] * 2}
    assert dequantize_blocks(scheme, other, 512, torch.float32) is None
    assert pack_weight(scheme, other, (4, 128)) == ()


@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_the_kernel_is_used_where_the_cpu_has_it(table):
    assert bitsandbytes_kernels._multiplies(table) == HAS_FEW_ROWS_KERNEL


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize(("rows", "columns", "block_size"), [(32, 64, 64), (96, 192, 32), (64, 384, 128)])
@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_products_of_few_rows(table, rows, columns, block_size, count):
    scheme = TableScheme(table, block_size)
    stored = stored_weight(scheme, rows, columns)
    packed = pack_weight(scheme, stored, (rows, columns))
    assert (packed != ()) == HAS_FEW_ROWS_KERNEL
    if not packed:  # nothing else multiplies by it
        return
    x = torch.randn(count, columns).bfloat16()
    found = multiply_few_rows(x, scheme, packed, (rows, columns))
    assert found.shape == (count, rows)
    assert found.dtype == torch.bfloat16
    expected = F.linear(x.float(), scheme.dequantize(stored, rows, columns))
    # Scales, partial products and the result are rounded to bfloat16.
    assert (found.float() - expected).norm() < 8e-3 * expected.norm()


@pytest.mark.parametrize(("rows", "columns"), [(31, 64), (33, 64), (32, 65), (32, 32)])
def test_weights_that_the_kernel_does_not_take(rows, columns):
    scheme = TableScheme("nf4", 64)
    assert pack_weight(scheme, stored_weight(scheme, rows, columns), (rows, columns)) == ()


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(bitsandbytes_kernels, "multiply_few_rows", lambda x, *_: x.new_zeros(3, 64))
    assert not bitsandbytes_kernels._multiplies.__wrapped__("nf4")


def test_without_the_library_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(bitsandbytes_kernels, "_library", lambda: None)
    scheme = TableScheme("nf4", 64)
    assert dequantize_blocks(scheme, stored_weight(scheme, 32, 64), 2048, torch.float32) is None
    assert not bitsandbytes_kernels._multiplies.__wrapped__("nf4")
