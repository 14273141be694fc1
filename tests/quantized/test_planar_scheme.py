"""Planes of integers: their values are those of the scheme, and layers that are computed on them are equal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from adaptc.errors import ConfigError
from adaptc.passes.quantized.all_schemes import scheme_from_text, scheme_text
from adaptc.passes.quantized.compiled_linear import SUM_ROWS, compiled_linear
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.planar_scheme import PlanarScheme, in_planes
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor

#: the integers of files and libraries, with small groups
SCHEMES = {
    "int8": IntegerScheme(),
    "bitsandbytes": IntegerScheme(step=1 / 127),
    "int8 groups": IntegerScheme(group_size=4),
    "Q8_0": IntegerScheme(group_size=4, scale_dtype="float16"),
    "Q4_0": IntegerScheme(bits=4, group_size=4, offset=8, scale_dtype="float16"),
    "Q4_1": IntegerScheme(bits=4, group_size=4, scale_dtype="float16", has_minimums=True),
    "Q4_K": IntegerScheme(bits=4, group_size=4, scale_dtype="uint8", has_minimums=True, super_group=8),
    "Q6_K": IntegerScheme(bits=6, group_size=2, offset=32, scale_dtype="int8", super_group=8),
    "int4 rows": IntegerScheme(bits=4, offset=8),
    "int4 zeros": IntegerScheme(bits=4, group_size=4, zero_dtype="uint8"),
    "HQQ": IntegerScheme(bits=4, group_size=4, zero_dtype="float32"),
}


def drawn(scheme: IntegerScheme, rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    """Return any tensors that the scheme may store: all codes occur."""
    generator = torch.Generator().manual_seed(seed)
    stored: dict[str, torch.Tensor] = {}
    for role, (shape, dtype) in scheme.layout(rows, columns).items():
        if dtype.is_floating_point:
            stored[role] = (torch.rand(shape, generator=generator) + 0.5).to(dtype)
        else:
            limits = torch.iinfo(dtype)
            stored[role] = torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(dtype)
    return stored


@given(st.sampled_from(list(SCHEMES)), st.integers(1, 7), st.integers(1, 3), st.integers(0, 99))
def test_planes_side_by_side_are_the_matrix(name: str, rows: int, blocks: int, seed: int) -> None:
    scheme, columns = SCHEMES[name], 8 * blocks
    stored = drawn(scheme, rows, columns, seed)
    found = in_planes(scheme, stored, (rows, columns))
    assert found is not None
    planar, tensors = found
    planar.check(tensors, rows, columns)
    assert scheme_from_text(scheme_text(planar)) == planar
    expected = scheme.dequantize(stored, rows, columns)
    close = {"rtol": 1e-6, "atol": 1e-6 * float(expected.abs().max())}
    assert [tuple(p.shape) for p in planar.planes(tensors)] == [
        (rows, columns // planar.plane_count)
    ] * planar.plane_count
    torch.testing.assert_close(planar.dequantize(tensors, rows, columns), expected, **close)
    for some in (slice(rows // 2, rows), torch.tensor([rows - 1, 0])):
        picked, of_rows = planar.select_rows(tensors, (rows, columns), some)
        torch.testing.assert_close(picked.dequantize(of_rows, len(expected[some]), columns), expected[some], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_of_planes(name: str, dtype: torch.dtype) -> None:
    """Few rows and many, of any shape: as of the dequantised weight in float32, rounded once."""
    scheme, columns = SCHEMES[name], 24
    weight = QuantizedTensor(scheme, drawn(scheme, 5, columns, 1), (5, columns), dtype)
    linear = compiled_linear(weight)
    assert linear is not None
    assert linear.for_many is not None
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(5, generator=generator).to(dtype)
    for shape in ((columns,), (SUM_ROWS, columns), (2, 1, columns)):
        x = torch.randn(shape, generator=generator).to(dtype)
        expected = F.linear(x.float(), weight.dequantize(torch.float32), bias.float())
        for compute in (linear.compute, linear.for_many):
            found = compute(x, linear.tensors, bias)
            assert (found.dtype, found.shape) == (dtype, expected.shape)
            # The second one rounds the weight, too.
            bound = 8 * torch.finfo(dtype).eps * float((x.float().abs().sum(-1, keepdim=True)).max())
            torch.testing.assert_close(
                found.float(), expected, rtol=0, atol=bound * float(weight.dequantize().abs().max())
            )


@pytest.mark.parametrize(
    ("scheme", "columns"),
    [
        (IntegerScheme(bits=4, group_size=4, offset=8), 12),  # the middle group would lie in both planes
        (IntegerScheme(bits=4, offset=8), 7),
        (IntegerScheme(bits=4, group_size=4, zero_dtype="uint8", has_group_index=True), 8),
    ],
    ids=str,
)
def test_matrices_without_planes(scheme: IntegerScheme, columns: int) -> None:
    stored = drawn(scheme, 3, columns, 0)
    if "group_index" in stored:
        stored["group_index"] = torch.arange(columns).int() % 2
    assert in_planes(scheme, stored, (3, columns)) is None
    assert compiled_linear(QuantizedTensor(scheme, stored, (3, columns), torch.float32)) is None


def test_nothing_is_quantised_to_planes() -> None:
    with pytest.raises(ConfigError, match="planes are made of integers"):
        PlanarScheme().quantize(torch.randn(3, 8))
    with pytest.raises(ConfigError, match="does not store 9 columns"):
        PlanarScheme(4, 3).layout(2, 9)
