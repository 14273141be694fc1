"""Packages of programs that write to their inputs: the caller's tensors have what was written, however they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc


class Keeps(nn.Module):
    """Writes what it computes into a row of ``cache`` (rows, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 5)

    def forward(self, x: Tensor, at: Tensor, cache: Tensor) -> Tensor:
        cache.index_copy_(0, at, self.lin(x))
        return cache.sum(0)


def _inputs(rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linspace(-1, 2, 6).view(2, 3), torch.tensor([4, 1]), torch.linspace(0, 1, rows * 5).view(rows, 5)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = adaptc.LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    program = adaptc.compile(
        Keeps(),
        config,
        example_inputs=_inputs(),
        dynamic_shapes={"x": None, "at": None, "cache": {0: torch.export.Dim.AUTO}},
    )
    path: Path = tmp_path_factory.mktemp("keeps") / "keeps.pt2"
    return program, adaptc.load_package(adaptc.package(program, path))


@pytest.mark.long
@pytest.mark.parametrize("how", ["contiguous", "transposed", "cut", "cut rows"])
def test_written_inputs(both: Any, how: str) -> None:
    program, package = both
    x, at, cache = _inputs()
    expected = cache.clone()
    out = program(x, at, expected)
    whole = {
        "contiguous": cache,
        "transposed": cache.t().contiguous().t(),
        "cut": torch.cat([cache, cache + 1], 1),
        "cut rows": torch.cat([cache, cache + 1], 0),
    }[how].clone(memory_format=torch.preserve_format)
    given = whole[:7, :5]
    torch.testing.assert_close(package(x, at, given), out)
    torch.testing.assert_close(given, expected)
    assert not torch.equal(given, cache)
    if how != "contiguous" and how != "transposed":
        rest = whole[:, 5:] if how == "cut" else whole[7:]
        assert torch.equal(rest, cache + 1)


@pytest.mark.long
def test_elements_that_share_memory(both: Any) -> None:
    x, at, cache = _inputs()
    with pytest.raises(adaptc.AdaptcError, match=r"writes to its input .*cache.*share memory"):
        both[1](x, at, cache[:1].expand(7, 5))
