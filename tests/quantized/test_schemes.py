"""Schemes: what is stored, what it is read as, and what cannot be stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptc.errors import ConfigError
from adaptc.passes.quantized.all_schemes import SCHEME_NAMES, choose_scheme, scheme_from_text, scheme_text
from adaptc.passes.quantized.integer_scheme import IntegerScheme, pack_nibbles
from adaptc.passes.quantized.table_scheme import TABLES, TableScheme, nearest_codes

#: scheme -> the largest distance of a value from its weight, as a share of the largest magnitude of its group
ERRORS = {
    IntegerScheme(): 0.5 / 127,
    IntegerScheme(group_size=4): 0.5 / 127,
    IntegerScheme(step=1 / 127): 0.5 / 127,
    IntegerScheme(bits=4, offset=8): 0.5 / 7,
    IntegerScheme(bits=4, group_size=4, zero_dtype="uint8"): 2 / 15,
    TableScheme("nf4", 4): 0.16,
    TableScheme("nf4", 4, 3): 0.2,
    TableScheme("fp4", 8): 0.17,
}
SCHEMES = st.sampled_from(list(ERRORS))


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp()


@given(SCHEMES, st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_values_are_near_the_weight(scheme, rows, blocks, seed):
    columns = blocks * (getattr(scheme, "group_size", 0) or 3)
    weight = matrix(rows, columns, seed)
    stored = scheme.quantize(weight)
    scheme.check(stored, rows, columns)
    found = scheme.dequantize(stored, rows, columns)
    assert found.dtype == torch.float32
    assert found.shape == weight.shape
    assert float((found - weight).abs().max()) <= ERRORS[scheme] * float(weight.abs().max()) + 1e-6
    again = scheme.quantize(found)
    if isinstance(scheme, IntegerScheme) and not scheme.zero_dtype:
        torch.testing.assert_close(scheme.dequantize(again, rows, columns), found)


@given(SCHEMES, st.integers(0, 9))
def test_zeros_stay_zeros(scheme, seed):
    weight = matrix(3, 8, seed)
    weight[1] = 0
    found = scheme.dequantize(scheme.quantize(weight), 3, 8)
    assert torch.equal(found[1], weight[1])


@given(SCHEMES, st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_rows_are_read_by_themselves(scheme, indices):
    columns = 8
    stored = scheme.quantize(matrix(7, columns))
    whole = scheme.dequantize(stored, 7, columns)
    for rows in (torch.tensor(indices), slice(2, 5)):
        found = scheme.select_rows(stored, (7, columns), rows)
        assert found is not None
        picked, tensors = found
        assert torch.equal(picked.dequantize(tensors, len(whole[rows]), columns), whole[rows])


def test_rows_in_shared_blocks_are_not_read_by_themselves():
    scheme = TableScheme(block_size=4)
    assert scheme.select_rows(scheme.quantize(matrix(3, 6)), (3, 6), slice(0, 1)) is None


@given(SCHEMES)
def test_a_scheme_is_read_back_from_its_text(scheme):
    assert scheme_from_text(scheme_text(scheme)) == scheme


@pytest.mark.parametrize(
    "text", ["", "7", "{}", '{"scheme": "other"}', '{"scheme": "integer", "bits": "8"}', '{"scheme": "table", "x": 1}']
)
def test_a_text_that_names_no_scheme(text):
    with pytest.raises(ConfigError, match=r"scheme|option"):
        scheme_from_text(text)


def test_six_bits_and_units():
    """The value is (code - 32) * scale * unit, with the code in two tensors: GGUF's Q6_K."""
    scheme = IntegerScheme(bits=6, group_size=4, offset=32, scale_dtype="int8", super_group=8)
    codes = torch.randint(0, 64, (3, 8), generator=torch.Generator().manual_seed(1))
    high = (codes >> 4).reshape(3, -1, 4)
    stored = {
        "codes": pack_nibbles((codes & 15).to(torch.uint8)),
        "high_codes": sum((high[..., i] << (2 * i)) for i in range(4)).to(torch.uint8),
        "scales": torch.tensor([[3, -5], [7, 1], [-2, 9]], dtype=torch.int8),
        "super_scales": torch.tensor([[0.5], [0.25], [2.0]], dtype=torch.float16),
    }
    scheme.check(stored, 3, 8)
    scales = stored["scales"].float().repeat_interleave(4, 1) * stored["super_scales"].float()
    assert torch.equal(scheme.dequantize(stored, 3, 8), (codes - 32) * scales)


def test_columns_of_a_group_may_lie_anywhere():
    plain = IntegerScheme(bits=4, group_size=4, zero_dtype="uint8")
    stored = plain.quantize(matrix(3, 8))
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    codes = plain.unpack_codes(stored, 8)[:, order]
    moved = {**stored, "codes": pack_nibbles(codes), "group_index": (order // 4).int()}
    scheme = IntegerScheme(bits=4, group_size=4, zero_dtype="uint8", has_group_index=True)
    scheme.check(moved, 3, 8)
    assert torch.equal(scheme.dequantize(moved, 3, 8), plain.dequantize(stored, 3, 8)[:, order])


def test_minimums():
    scheme = IntegerScheme(bits=4, group_size=4, scale_dtype="uint8", has_minimums=True, super_group=8)
    codes = torch.arange(16).reshape(2, 8)
    stored = {
        "codes": pack_nibbles(codes.to(torch.uint8)),
        "scales": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8),
        "minimums": torch.tensor([[5, 6], [7, 8]], dtype=torch.uint8),
        "super_scales": torch.tensor([[0.5], [2.0]], dtype=torch.float16),
        "super_minimums": torch.tensor([[0.25], [1.0]], dtype=torch.float16),
    }
    scheme.check(stored, 2, 8)
    scale = torch.tensor([[0.5, 1.0], [6.0, 8.0]]).repeat_interleave(4, 1)
    least = torch.tensor([[1.25, 1.5], [7.0, 8.0]]).repeat_interleave(4, 1)
    assert torch.equal(scheme.dequantize(stored, 2, 8), codes * scale - least)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20), st.sampled_from(list(TABLES)))
def test_the_nearest_entry_of_a_table(values, name):
    table, found = torch.tensor(TABLES[name]), torch.tensor(values)
    distance = (table[nearest_codes(found, table).long()] - found).abs()
    torch.testing.assert_close(distance, (table[:, None] - found).abs().amin(0))


def test_damage_is_named():
    scheme = IntegerScheme(bits=4, group_size=4, zero_dtype="uint8")
    stored = scheme.quantize(matrix(3, 8))
    for change, reason in (
        ({"scales": None}, "lacks 'scales'"),
        ({"more": torch.zeros(1)}, "no 'more'"),
        ({"codes": stored["codes"][:, :3]}, r"'codes'.*\(3, 4\).*\(3, 3\)"),
        ({"codes": stored["codes"].int()}, "'codes'.*uint8.*int32"),
        ({"scales": stored["scales"] * float("nan")}, "'scales'.*not finite"),
    ):
        damaged = {k: v for k, v in {**stored, **change}.items() if v is not None}
        with pytest.raises(ConfigError, match=reason):
            scheme.check(damaged, 3, 8)


def test_weights_that_cannot_be_stored():
    for weight, reason in (
        (torch.full((2, 4), float("inf")), "not finite"),
        (torch.empty((2, 4), device="meta"), "on the meta device and has no values: load the base first"),
        (torch.randn(2, 3, 4), "matrices"),
    ):
        with pytest.raises(ConfigError, match=reason):
            IntegerScheme().quantize(weight)
    with pytest.raises(ConfigError, match=r"group_size=4 does not divide the 6 columns.*3 would"):
        IntegerScheme(group_size=4).quantize(matrix(2, 6))
    with pytest.raises(ConfigError, match="read as it is"):
        IntegerScheme(bits=6).quantize(matrix(2, 6))


def test_names_of_users():
    assert [str(choose_scheme(n, None, 96)) for n in SCHEME_NAMES] == [
        "int8",
        "int8, int8 activations",
        "int4 in groups of 32",
        "nf4 in blocks of 64, quantised scales",
        "fp4 in blocks of 64, quantised scales",
    ]
    assert choose_scheme("int4", None, 35) == choose_scheme("int4", 7, 70) == choose_scheme("int4", 7, 35)
    for name, group, reason in (
        ("int3", None, "int3.*nearest are 'int8'"),
        ("int4", 0, "group_size=0"),
        ("int8", True, "group_size=True"),
        ("int8_dynamic", 32, "one scale for each row"),
    ):
        with pytest.raises(ConfigError, match=reason):
            choose_scheme(name, group, 32)
