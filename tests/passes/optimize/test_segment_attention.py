"""Attention that is computed text by text equals attention over all keys, and is divided only where that is sound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from adaptc.passes.optimize import segment_attention
from adaptc.passes.optimize.segment_attention import attention_by_segment, divide_mask

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def looks_at_every_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_attention, "MIN_SCORES", 0)


def packed_mask(texts: Sequence[tuple[int, int, int]], window: int | None = None, copies: int = 1) -> Tensor:
    """The bool mask (1, 1, copies * rows, keys) of texts with (rows, keys before them, keys of nobody behind them)."""
    rows, keys = sum(r for r, _, _ in texts), sum(sum(t) for t in texts)
    mask, row, key = torch.zeros(rows, keys, dtype=torch.bool), 0, 0
    for count, before, gap in texts:
        for i in range(count):
            last = key + before + i
            mask[row + i, max(key, last - window + 1 if window else key) : last + 1] = True
        row, key = row + count, key + count + before + gap
    return mask.repeat(copies, 1)[None, None]


def arguments(mask: Tensor, heads: int = 3, dtype: torch.dtype = torch.float64, wide: int = 1) -> list[Tensor]:
    rows, keys = mask.shape[2:]
    draw = torch.Generator().manual_seed(rows)
    q = torch.randn(1, heads * wide, rows, 7, generator=draw, dtype=torch.float64)
    k, v = (torch.randn(1, heads, keys, n, generator=draw, dtype=torch.float64) for n in (7, 5))
    return [t.to(dtype) for t in (q, k, v)]


def added(mask: Tensor, dtype: torch.dtype, lowest: float = float("-inf")) -> Tensor:
    draw = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return draw.masked_fill(~mask, lowest)


def check(mask: Tensor, dtype: torch.dtype = torch.float64, **options: Any) -> None:
    q, k, v = arguments(
        mask, dtype=mask.dtype if mask.is_floating_point() else dtype, wide=2 if options.get("enable_gqa") else 1
    )
    found = attention_by_segment(q, k, v, mask, **options)
    expected = scaled_dot_product_attention(
        *(t.double() for t in (q, k, v)), mask if mask.dtype == torch.bool else mask.double(), **options
    )
    assert found.dtype == q.dtype
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])


def counts(mask: Tensor) -> list[tuple[int, int, int]]:
    divided = divide_mask(mask)
    return [] if divided is None else [(s.rows, s.keys.start, s.keys.stop) for s in divided.segments]


def test_texts_are_told_apart_by_the_mask_alone() -> None:
    texts = [(1, 6, 0), (4, 0, 3), (2, 5, 1)]
    assert counts(packed_mask(texts)) == [(1, 0, 7), (4, 7, 11), (2, 14, 21)]
    assert counts(packed_mask(texts, copies=3)) == [(3, 0, 7), (12, 7, 11), (6, 14, 21)]
    assert counts(added(packed_mask(texts), torch.float32)) == counts(packed_mask(texts))
    assert counts(added(packed_mask(texts), torch.float32, LOWEST)) == counts(packed_mask(texts))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_that_hides_nothing_is_left_out(dtype: torch.dtype) -> None:
    mask = packed_mask([(1, 6, 0), (4, 0, 3), (1, 5, 1)], copies=3)
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, LOWEST)
    divided = divide_mask(mask)
    assert divided is not None
    assert [s.mask is None for s in divided.segments] == [True, False, True]
    check(mask)
    biased = mask if dtype == torch.bool else mask.masked_fill(mask == 0, 0.5)
    found = divide_mask(biased)
    assert found is not None
    assert [s.mask is None for s in found.segments] == [dtype == torch.bool, False, dtype == torch.bool]


def test_a_window_does_not_part_a_text() -> None:
    assert counts(packed_mask([(6, 2, 0), (7, 0, 0)], window=3)) == [(6, 0, 8), (7, 8, 15)]


@pytest.mark.parametrize(
    "mask",
    [
        packed_mask([(9, 4, 0)]),
        torch.ones(1, 1, 5, 8, dtype=torch.bool),
        torch.cat([packed_mask([(2, 3, 0), (3, 1, 0)]), torch.zeros(1, 1, 1, 9, dtype=torch.bool)], 2),
    ],
    ids=["one text", "all", "a row without keys"],
)
def test_what_is_not_divided(mask: Tensor) -> None:
    assert divide_mask(mask) is None
    q, k, v = arguments(mask)
    assert torch.equal(
        attention_by_segment(q, k, v, mask).nan_to_num(), scaled_dot_product_attention(q, k, v, mask).nan_to_num()
    )


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=6),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([1, 3]),
    st.sampled_from(["bool", "-inf", "lowest"]),
    st.sampled_from([*TOLERANCE]),
    st.booleans(),
)
def test_equal_to_attention_over_all_keys(
    texts: list[tuple[int, int, int]], window: int | None, copies: int, kind: str, dtype: torch.dtype, grouped: bool
) -> None:
    mask = packed_mask(texts, window, copies)
    if kind != "bool":
        mask = added(mask, dtype, float("-inf") if kind == "-inf" else float(torch.finfo(dtype).min))
    check(mask, dtype, enable_gqa=grouped, scale=0.3)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`:DeprecationWarning")
@pytest.mark.parametrize("trace", [make_fx, lambda f: lambda *args: torch.jit.trace(f, args)], ids=["make_fx", "jit"])
def test_a_trace_holds_for_other_masks(trace: Any) -> None:
    first, second = packed_mask([(2, 4, 0), (3, 1, 0)]), packed_mask([(3, 1, 0), (2, 4, 0)])
    q, k, v = arguments(first)
    traced = trace(lambda q, k, v, mask: attention_by_segment(q, k, v, mask))(q, k, v, first)
    expected = scaled_dot_product_attention(q, k, v, second)
    torch.testing.assert_close(traced(q, k, v, second), expected, atol=1e-12, rtol=0)


@given(st.permutations(range(9)))
def test_rows_in_any_order(order: list[int]) -> None:
    mask = packed_mask([(2, 4, 0), (3, 1, 0), (4, 2, 1)])
    assert len(counts(mask[:, :, order])) == 3
    check(mask[:, :, order])


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(q.shape[2])
        return scaled_dot_product_attention(q, *args, **kwargs)

    monkeypatch.setattr(segment_attention, "scaled_dot_product_attention", counted)
    return calls


def test_each_text_is_one_call_and_the_mask_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, read = calls_of(monkeypatch), list[Tensor]()
    usual = divide_mask
    monkeypatch.setattr(segment_attention, "divide_mask", lambda mask: read.append(mask) or usual(mask))
    mask = packed_mask([(2, 4, 0), (3, 1, 0)])
    q, k, v = arguments(mask)
    for _ in range(3):
        attention_by_segment(q, k, v, mask)
    assert calls == [2, 3] * 3
    assert len(read) == 1
    mask[..., 2, 6] = False  # the second text begins a key later now
    expected = scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(attention_by_segment(q, k, v, mask), expected, atol=1e-12, rtol=0)
    assert len(read) == 2


def test_masks_of_inference_mode_may_be_written_to() -> None:
    """torch counts no writes to them."""
    with torch.inference_mode():
        mask = packed_mask([(2, 4, 0), (3, 1, 0)])
        check(mask)
        mask.copy_(packed_mask([(3, 1, 0), (2, 4, 0)]))
        check(mask)


# torch scripts a function when forward mode is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("what", ["gradient", "vmap", "forward mode", "dropout", "batch", "head masks", "few scores"])
def test_what_is_computed_as_a_whole(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = packed_mask([(2, 4, 0), (3, 1, 0)])
    q, k, v = arguments(mask)
    calls, options = calls_of(monkeypatch), dict[str, Any]()
    if what == "gradient":
        q.requires_grad_()
    elif what == "dropout":
        options["dropout_p"] = 0.5
    elif what == "batch":
        q, k, v, mask = (torch.cat([t, t]) for t in (q, k, v, mask))
    elif what == "head masks":
        mask = mask.expand(1, 3, -1, -1)
    elif what == "few scores":
        monkeypatch.setattr(segment_attention, "MIN_SCORES", 1000)
    if what == "vmap":
        torch.func.vmap(lambda q: attention_by_segment(q, k, v, mask))(torch.stack([q, 2 * q]))
    elif what == "forward mode":
        torch.func.jvp(lambda q: attention_by_segment(q, k, v, mask), (q,), (q,))
    else:
        attention_by_segment(q, k, v, mask, **options)
    assert len(calls) == 1
    assert calls[0] == 5
