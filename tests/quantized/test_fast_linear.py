"""The kernels that read a quantised weight as it is stored: the results of its values, up to rounding."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from adaptc.passes.quantized.all_schemes import choose_scheme
from adaptc.passes.quantized.bitsandbytes_kernels import MAX_ROWS
from adaptc.passes.quantized.fast_linear import INT4_ROWS, INT8_ROWS, fast_linear
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.gguf_file import GgufMatrix
from tests.support.gguf_files import blocks
from tests.support.quantized_models import HAS_FEW_ROWS_KERNEL

#: a bfloat16 is rounded by up to 2^-9 = 2e-3 of itself: scales, zeros and the result are, each once
TOLERANCE = 8e-3


def weight(name: str, rows: int = 48, columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    torch.manual_seed(0)
    return QuantizedTensor.quantize(torch.randn(rows, columns).to(dtype), choose_scheme(name, None, columns))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm().clamp(min=1e-9))


@given(st.sampled_from(["int8", "int4"]), st.integers(1, 9), st.booleans())
def test_few_rows_in_bfloat16(name, rows, with_bias):
    q = weight(name)
    rows = min(rows, INT8_ROWS)
    x = torch.randn(rows, 64).bfloat16()
    bias = torch.randn(48).bfloat16() if with_bias else None
    found = fast_linear(x, q, bias)
    assert found is not None
    assert found.dtype == torch.bfloat16
    expected = F.linear(x.float(), q.dequantize(torch.float32), None if bias is None else bias.float())
    assert relative(found, expected) < TOLERANCE


@given(st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 3))
def test_rounded_inputs(rows, dtype, batch):
    """The sums are those of integers, and equal those of the rounded input's values."""
    q = weight("int8_dynamic", 21, 35, dtype)
    x = torch.randn(batch, rows, 35).to(dtype)
    x[0, 0] = 0
    found = fast_linear(x, q, None)
    assert found is not None
    assert found.dtype == dtype
    assert not found[0, 0].any()
    expected = F.linear(q.scheme.round_input(x.float()), q.dequantize(torch.float32))
    assert relative(found, expected) < (1e-5 if dtype == torch.float32 else TOLERANCE)


def test_calls_without_a_kernel():
    for name, x, reason in (
        ("int8", torch.randn(2, 64), "float32"),
        ("int8", torch.randn(INT8_ROWS + 1, 64).bfloat16(), "rows"),
        ("int4", torch.randn(INT4_ROWS + 1, 64).bfloat16(), "rows"),
        ("nf4", torch.randn(2, 64), "float32"),
        ("nf4", torch.randn(2, 64).bfloat16(), "sizes"),
        ("int8", torch.randn(0, 64).bfloat16(), "no rows"),
    ):
        q = weight(name)
        assert fast_linear(x, q, None) is None, reason
        found = F.linear(x, q)
        assert found.shape == (x.shape[0], 48)
        expected = F.linear(x.float(), q.dequantize(x.dtype).float())
        assert relative(found, expected) < (1e-6 if x.dtype == torch.float32 else TOLERANCE)


@pytest.mark.parametrize("columns", [1, 15, 31, 33, 40, 63])
def test_rows_that_the_int8_kernel_would_read_past(columns):
    """It reads columns by the dozen, without a look at where a row ends: that was the end of the process."""
    q = weight("int8", 17, columns)
    x = torch.randn(3, columns).bfloat16()
    assert fast_linear(x, q, None) is None
    assert relative(F.linear(x, q), F.linear(x.float(), q.dequantize().float())) < TOLERANCE


def test_inputs_that_lie_apart():
    q = weight("int8")
    wide = torch.randn(3, 128).bfloat16()
    for x in (wide[:, ::2], wide[:, 64:], wide.t()[:64].t(), wide[:1, :64].expand(5, 64)):
        expected = F.linear(x.float(), q.dequantize().float())
        assert relative(fast_linear(x, q, None), expected) < TOLERANCE


@pytest.mark.parametrize("stride", [1, 7, 64, 1000])
@pytest.mark.parametrize("name", ["int8_dynamic", "int8", "int4"])
def test_one_row_of_any_stride(name, stride):
    """torch counts the strides of a single row as equal, and a kernel may not."""
    q = weight(name)
    x = torch.empty_strided((1, 64), (stride, 1), dtype=torch.bfloat16).copy_(torch.randn(1, 64))
    assert x.is_contiguous()
    assert torch.equal(fast_linear(x, q, None), fast_linear(x.clone().view(-1).view(1, 64), q, None))
    inputs = q.scheme.round_input(x.float()) if name == "int8_dynamic" else x.float()
    assert relative(fast_linear(x, q, None), F.linear(inputs, q.dequantize().float())) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("out", [1, 2, 5])
def test_rounded_inputs_of_one_column(out, rows):
    q = weight("int8_dynamic", out, 1, torch.float32)
    x = torch.randn(rows, 1)
    torch.testing.assert_close(F.linear(x, q), x * q.dequantize().t(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns", "group"), [(40, 64, 32), (48, 64, 16), (48, 60, 4)])
def test_sizes_that_the_int4_kernel_does_not_take(rows, columns, group):
    torch.manual_seed(0)
    q = QuantizedTensor.quantize(torch.randn(rows, columns).bfloat16(), choose_scheme("int4", group, columns))
    x = torch.randn(2, columns).bfloat16()
    assert fast_linear(x, q, None) is None
    assert relative(F.linear(x, q), F.linear(x.float(), q.dequantize().float())) < TOLERANCE


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K])
def test_blocks_of_gguf_files_that_the_int4_kernel_takes(kind):
    q = GgufMatrix("m", kind, torch.from_numpy(blocks(kind, 48, 256))).quantized(torch.bfloat16)
    x = torch.randn(3, 256).bfloat16()
    found = fast_linear(x, q, None)
    # Scales, minimums and results are bfloat16, and random blocks have large minimums.
    expected = F.linear(x.float(), q.dequantize(torch.float32))
    assert relative(found, expected) < 2 * TOLERANCE
    assert q.prepared_bytes > 0


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_few_rows_of_a_table(name, with_bias):
    q = weight(name, 96, 128)
    assert q.scheme.scale_block
    bias = torch.randn(96).bfloat16() if with_bias else None
    for shape in ((1, 128), (2, 3, 128), (MAX_ROWS, 128)):
        x = torch.randn(shape).bfloat16()
        found, computed = fast_linear(x, q, bias), F.linear(x, q, bias)
        assert (found is not None) == HAS_FEW_ROWS_KERNEL
        assert found is None or torch.equal(computed, found)
        expected = F.linear(x.float(), q.dequantize(torch.float32), None if bias is None else bias.float())
        assert relative(computed, expected) < TOLERANCE
    assert fast_linear(torch.randn(MAX_ROWS + 1, 128).bfloat16(), q, None) is None
    kept = q.prepared_bytes / q.numel()
    assert 0.5 <= kept < 0.6 if HAS_FEW_ROWS_KERNEL else kept == 0


def test_packed_copies_are_made_once_and_counted():
    q = weight("int4")
    assert q.prepared_bytes == 0
    x = torch.randn(2, 64).bfloat16()
    first = fast_linear(x, q, None)
    bytes_kept = q.prepared_bytes
    assert bytes_kept > 0
    assert torch.equal(first, fast_linear(x, q, None))
    assert q.prepared_bytes == bytes_kept


def test_a_gradient_takes_no_kernel():
    q = weight("int8")
    x = torch.randn(2, 64).bfloat16().requires_grad_()
    F.linear(x, q).float().sum().backward()
    assert relative(x.grad, q.dequantize().float().sum(0).expand(2, -1)) < TOLERANCE
