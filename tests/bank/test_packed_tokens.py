"""Adapters of their own for texts that are packed along one axis: every method that rows of a batch can have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc.passes.protocol.low_rank_rows import (
    MAX_STACKED_HALF_ROWS,
    MAX_STACKED_ROWS,
    low_rank_rows_direct,
    low_rank_rows_in_place,
    stacked_matmul,
    stacks_tokens,
)
from tests.support.method_checks import save_random_adapter
from tests.support.method_table import ENTRIES
from tests.support.subject import Subject, assert_close, subject

CASES = [
    pytest.param(entry.name, layer, id=f"{entry.name}-{layer}")
    for entry in ENTRIES
    for layer in ("linear", "addmm", "embedding")
    if entry.rows and layer in entry.layers()
]
ADAPTERS: list[Any] = ["one", None, "two", {"one": 0.5, "two": -0.25}, "one"]


def packed(s: Subject, tokens: int) -> Tensor:
    """The inputs of so many tokens, (1, tokens) or (1, tokens, width)."""
    (x,) = s.args(tokens)
    return x.reshape(1, -1, *x.shape[2:])[:, :tokens]


@pytest.mark.long
@pytest.mark.few(4)
@pytest.mark.parametrize(("method", "layer"), CASES)
def test_each_text_gets_what_its_adapter_alone_gives(method: str, layer: str, tmp_path: Path) -> None:
    s = subject(method, layer)
    free = ({1: torch.export.Dim("tokens")},)
    config = s.config(**s.entry.other_config)
    program = adaptc.compile(s.base, config, example_inputs=(packed(s, 7),), dynamic_shapes=free)
    two = save_random_adapter(s, config, tmp_path, seed=9)
    bank = program.bank({"one": s.directory, "two": two}, axis=1)
    for ends in ([0, 3, 4, 9, 11, 12], [0, 0, 40, 80, 80, 91]):  # few rows, many, and texts without any
        x = packed(s, ends[-1])
        found = bank(x, adapters=ADAPTERS, cu_seq_lens=torch.tensor(ends))
        alone = {"one": program.bind(s.directory)(x), "two": program.bind(two)(x), None: program.base(x)}
        for name, start, end in zip(ADAPTERS, ends, ends[1:], strict=False):
            if not isinstance(name, dict):
                assert_close(found[:, start:end], alone[name][:, start:end], 1e-8)
        assert float((alone["one"] - alone["two"]).abs().max()) > 1e-3


def two_linears() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(1, 6, 5)


def test_rows_of_a_batch_are_grouped_too(tmp_path: Path) -> None:
    model, x = two_linears()
    config = adaptc.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=(x[0],))
    bank = program.bank({"a": adaptc.save_adapter(program, tmp_path / "a")})
    rows = x[0]
    expected = bank(rows, adapters=["a", "a", None, None, None, "a"])
    found = bank(rows, adapters=["a", None, "a"], cu_seq_lens=[0, 2, 5, 6])
    assert torch.equal(found, expected)
    assert not torch.equal(found, program.base(rows))
    kept = bank.select(["a", None, "a"], cu_seq_lens=[0, 2, 5, 6])
    assert torch.equal(kept(rows), expected)
    with pytest.raises(adaptc.AdaptcError, match="the lengths of the texts add up to 6, and the batch has 5"):
        kept(rows[:5])


def test_kernels_compute_packed_tokens(tmp_path: Path) -> None:
    """As they do rows; off a GPU by their references."""
    model, x = two_linears()
    config = adaptc.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    free = ({1: torch.export.Dim("tokens")},)
    program = adaptc.compile(model, config, example_inputs=(x,), dynamic_shapes=free)
    adapters: dict[str, Any] = {"one": adaptc.save_adapter(program, tmp_path / "one")}
    smaller = adaptc.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    other = adaptc.compile(model, smaller, example_inputs=x)
    adapters["two"] = adaptc.save_adapter(other, tmp_path / "two")
    plain = program.bank(adapters, axis=1)
    program.kernels = True
    bank = program.bank(adapters, axis=1)
    assert len(bank.placement.kernel_sites) == 2
    for ends in ([0, 1, 2, 4, 5, 6], [0, 0, 20, 31, 31, 40]):
        tokens = torch.randn(1, ends[-1], 5, generator=torch.Generator().manual_seed(ends[2]))
        found = bank(tokens, adapters=ADAPTERS, cu_seq_lens=ends)
        torch.testing.assert_close(found, plain(tokens, adapters=ADAPTERS, cu_seq_lens=ends), rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, program.base(tokens))
    # Two rows of tokens are no packed texts: the kernels would take the wrong rows.
    two_rows = adaptc.compile(model, config, example_inputs=(torch.cat([x, x]),), dynamic_shapes=free)
    two_rows.kernels = True
    assert not two_rows.bank({"one": adapters["one"]}, axis=1).placement.kernel_sites


@pytest.mark.parametrize(
    "ends", [[0, 2], [0, 3, 2, 6], [1, 2, 3, 6], [0, 2, 4, 5], "0236", [0, 2.0, 3, 6], [0, True, 3, 6], 7]
)
def test_ends_that_fit_no_entries_are_refused(ends: Any, tmp_path: Path) -> None:
    model, x = two_linears()
    program = adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules=["0"]), example_inputs=(x[0],))
    bank = program.bank({"a": adaptc.save_adapter(program, tmp_path / "a")})
    with pytest.raises(adaptc.AdaptcError, match=r"cu_seq_lens=.* must be 4 whole numbers|adapters has 5 entries"):
        bank(x[0], adapters=["a", None, "a"], cu_seq_lens=ends)


def test_tokens_that_read_each_other_are_refused() -> None:
    """Along the tokens of a text that mixes them; and where no input has the axis."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x.cumsum(1))

    x = torch.randn(1, 6, 5)
    config = adaptc.LoraConfig(r=2, target_modules=["first"])
    program = adaptc.compile(Mixing(), config, example_inputs=(x,), dynamic_shapes=({1: torch.export.Dim("tokens")},))
    with pytest.raises(adaptc.TargetError, match=r"'first\.weight' cannot have another adapter for each row"):
        program.bank(axis=1)
    with pytest.raises(adaptc.TargetError, match="no input of the program has an axis 3"):
        program.bank(axis=3)
    for wrong in (-1, True, "1", 0.5):
        with pytest.raises(adaptc.ConfigError, match=r"axis=.* must be the number of an axis"):
            program.bank(axis=wrong)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_rows_that_are_gathered_get_what_one_matmul_gives(data: st.DataObject) -> None:
    """Any mixes over any rows, in each dtype; the op gathers where there are many rows of one position."""
    count, rank = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    rows = (MAX_STACKED_HALF_ROWS if dtype == torch.bfloat16 else MAX_STACKED_ROWS // count) + data.draw(
        st.integers(1, 9)
    )
    assert not stacks_tokens(rows, count, dtype)
    assert stacks_tokens(MAX_STACKED_ROWS // count, count, dtype)
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    x, y, A, B = drawn(rows, 7), drawn(rows, 5), drawn(count, rank, 7), drawn(count, 5, rank)
    scale = torch.rand(count, generator=draw) + 0.5
    chosen = torch.randint(-1, count, (rows,), generator=draw)
    c = torch.zeros(rows, count)
    for k in range(count):
        c[chosen == k, k] = 1.0
    if data.draw(st.booleans()):
        c *= torch.rand(rows, 1, generator=draw) - 0.5
    if data.draw(st.booleans()):
        c[: rows // 2] = c[0]
    if data.draw(st.booleans()):  # runs of one adapter, with others between them
        c[rows // 2 :], c[rows // 3 : rows // 2] = c[0], 0
        if data.draw(st.booleans()):
            c[rows // 2 : rows // 2 + 5] = c[-1].roll(1)
    if data.draw(st.booleans()):  # rows with two adapters
        c[: rows // 4] += c[: rows // 4].roll(1, 1)
    found = low_rank_rows_direct(x, y, A, B, scale, c)
    wide = [t.double() for t in (x, y, A, B, scale, c)]
    size = 50 * torch.finfo(dtype).eps if dtype != torch.bfloat16 else 0.1
    torch.testing.assert_close(found.double(), stacked_matmul(*wide), rtol=size, atol=size * rank)
    assert torch.equal(found[(c == 0).all(1)], y[(c == 0).all(1)])
    in_place = low_rank_rows_in_place(x, y.clone(), A, B, scale, c)
    torch.testing.assert_close(in_place, found, rtol=size, atol=size * rank)
    # Half precision is rounded once: the nearest number to the sum, or one beside it where float32 is rounded, too.
    other_A, other_B = A.float(), B.float()
    mixed = low_rank_rows_direct(x, y, other_A, other_B, scale, c)
    exact = stacked_matmul(x.double(), y.double(), A.double(), B.double(), scale.double(), c.double())
    if dtype == torch.bfloat16:
        torch.testing.assert_close(mixed.double(), exact, rtol=0.0041, atol=1e-4)
        in_place = low_rank_rows_in_place(x, y.clone(), other_A, other_B, scale, c)
        torch.testing.assert_close(in_place.double(), exact, rtol=0.0041, atol=1e-4)
