"""Lists of all indices up to a size keep the size free, and hold what Python's lists hold."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc.capture.replacements.size_lists import SizeList, lists_of_any_size
from adaptc.capture.replacements.traceable_calls import FreeScalarSizes
from tests.coverage.examine import examine
from tests.coverage.rows import Row

CUTS = [
    slice(None), slice(1, None), slice(1, -1), slice(None, -1), slice(None, None, 2), slice(None, None, -1),
    slice(2, None, 3), slice(0, 2), slice(-2, None),
]  # fmt: skip


@given(st.integers(4, 13), st.lists(st.sampled_from(CUTS), max_size=3), st.booleans())
def test_numbers_are_those_of_a_list(count: int, cuts: list[slice], has_more: bool) -> None:
    want, got = list(range(count)), SizeList(0, count)
    for cut in cuts:
        want, got = want[cut], got[cut]
        if has_more:
            want, got = [-5, *want], [-5] + got  # noqa: RUF005  # what a model writes
    assert list(got) == want
    if isinstance(got, SizeList) and want:
        assert (len(got), got.size) == (len(want), len(want))
        assert [got[i] for i in (0, -1, len(want) - 1)] == [want[0], want[-1], want[-1]]
        with FreeScalarSizes():
            made: Any = torch.tensor
            assert torch.equal(made(got), torch.tensor(want))
            assert torch.equal(made(got, dtype=torch.float32), torch.tensor(want, dtype=torch.float32))


class Numbered(nn.Module):
    """A model that counts positions from the end, in a Python list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.tensor(list(range(x.shape[1]))[::-1], device=x.device)
        assert isinstance([], list)
        count = len(list(range(x.shape[1]))[1:])
        return self.layer(x) * (places + count)[None, :, None]


class Looping(Numbered):
    """A model that goes through such a list, which fixes the size."""

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.layer(x[:, i]) * i for i in list(range(x.shape[1]))), torch.zeros(()))


@torch.no_grad()
def test_a_size_stays_free() -> None:
    model = Numbered()
    program = adaptc.compile(
        model, adaptc.LoraConfig(r=2, target_modules=["layer"]), example_inputs=torch.randn(2, 7, 3)
    )
    for shape in ((2, 7, 3), (3, 11, 3), (1, 4, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x))


@torch.no_grad()
def test_a_loop_fixes_the_size() -> None:
    model = Looping()
    with pytest.warns(adaptc.AdaptcWarning, match="dimension 1 .* is fixed at 7|axis 1"):
        program = adaptc.compile(
            model, adaptc.LoraConfig(r=2, target_modules=["layer"]), example_inputs=torch.randn(2, 7, 3)
        )
    x = torch.randn(3, 7, 3)
    torch.testing.assert_close(program(x), model(x))
    with pytest.raises(adaptc.AdaptcError, match="axis 1 has size 5"):
        program(x[:, :5])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "row",
    [Row("cpmant", "CAUSAL_LM", "CpmAntForCausalLM"), Row("funnel", "MASKED_LM", "FunnelForMaskedLM")],
    ids=lambda row: row.family,
)
def test_a_model_that_makes_such_lists_is_pefts_at_both_sizes(row: Row) -> None:
    result = examine(row)
    assert result.status == "equal", result.reason
    assert result.generation in ("", "equal")


def test_other_threads_and_the_files_are_as_before() -> None:
    before = dict(globals())
    found: list[Any] = []
    with lists_of_any_size(Numbered()):
        names = globals()
        assert names["list"]("ab") == ["a", "b"]
        assert isinstance([1], names["list"])
        assert names["list"][int] == list[int]
        other = threading.Thread(target=lambda: found.append(names["range"](3)))
        other.start()
        other.join()
    assert found == [range(3)]
    assert globals() == before
