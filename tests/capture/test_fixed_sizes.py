"""A capture tells which sizes it had to fix, of those that a caller may want to vary, and nothing of layers' widths."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows

import adaptc
from adaptc import LoraConfig
from adaptc.capture.capture import capture
from adaptc.errors import AdaptcError, AdaptcWarning


class Table(nn.Module):
    """As a vision transformer: positions are a table of as many patches as an image of one size has."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.head = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 5)
        self.mean = nn.Buffer(torch.randn(1, 3, 1, 1))
        self.positions = nn.Parameter(torch.randn(1, 12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cut(x - self.mean).flatten(2).transpose(1, 2) + self.positions)


class Patches(Table):
    """The same, which asks for that size, as timm's do."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (16, 12):
            raise ValueError("images are 16 x 12")
        return super().forward(x)


class Steps(nn.Module):
    """A loop over time, which a graph has as many nodes of as there are steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 7)
        for i in range(x.shape[1]):
            h = self.cell(x[:, i], h)
        return h


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Turned(nn.Module):
    """Widths that are found behind casts, blocks, permutations, norms and paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lin, self.conv = nn.LayerNorm(5), nn.Linear(5, 7), nn.Conv1d(5, 7, 3)
        self.w = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        with torch.no_grad():
            a = self.lin(self.norm(x.to(torch.float32) * 2)).mean()
        b = self.conv(nn.functional.pad(y.permute(0, 2, 1), (1, 1))).mean()
        return a + b + (z @ self.w).mean()


class Blocks(nn.Module):
    """Weights that are operands of inner graphs, by a product, and a loop over rows."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self.block, self.w, self.lin = block, nn.Parameter(torch.randn(5, 7)), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        if self.block == "map":
            return map_rows(lambda row: self.lin(row.unsqueeze(0)).squeeze(0), x)
        if self.block == "cond":
            return torch.cond(x.sum() > 1e6, lambda t: t @ self.w, lambda t: t @ self.w + 1, (x,))
        with torch.no_grad():
            return x @ self.w


class Batches(nn.Module):
    """Rows of two inputs that are put side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.lin = nn.Linear(3, 3), nn.Linear(4, 4), nn.Linear(7, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.lin(torch.cat([self.a(x), self.b(y).flatten().reshape(x.shape[0], -1)], -1))


def told(model: nn.Module, *args: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        capture(model, args)
    return [str(w.message) for w in caught if issubclass(w.category, AdaptcWarning)]


@pytest.mark.parametrize(
    ("model", "shape", "axes"),
    [(Patches(), (2, 3, 16, 12), {2: 16, 3: 12}), (Steps(), (2, 4, 5), {1: 4}), (Recurrent(), (2, 4, 5), {1: 4})],
)
@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm")
def test_what_had_to_be_fixed_is_told(model: nn.Module, shape: tuple[int, ...], axes: dict[int, int]) -> None:
    (message,) = told(model, torch.randn(*shape))
    assert re.findall(r"dimension (\d) of input 'x' is fixed at (\d+)", message) == [
        (str(a), str(n)) for a, n in axes.items()
    ]


def test_sizes_that_are_fixed_together_are_told() -> None:
    (message,) = told(Table(), torch.randn(2, 3, 16, 12))
    assert re.search(r"x\.shape\[\d\] // 4.* == 12", message)


def test_widths_of_layers_are_not_told() -> None:
    assert told(Turned(), torch.randn(2, 3, 5), torch.randn(2, 4, 5), torch.randn(2, 3, 5)) == []
    assert told(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(2, 3, 9, 8)) == []
    assert told(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 5, 8)) == []


@pytest.mark.parametrize("block", ["map", "cond", "no_grad"])
def test_widths_are_found_in_inner_graphs(block: str) -> None:
    assert told(Blocks(block), torch.randn(3, 5)) == []


def test_batches_that_go_together_are_not_told() -> None:
    assert told(Batches(), torch.randn(2, 3), torch.randn(2, 4)) == []


def test_a_call_of_another_size_is_told_a_way_out() -> None:
    """Also where torch has the size as an expression without a symbol."""
    with pytest.warns(AdaptcWarning, match="Patches was captured for some sizes alone"):
        program: Any = adaptc.compile(
            Patches(), LoraConfig(r=2, target_modules=["head"]), example_inputs=torch.randn(2, 3, 16, 12)
        )
    with pytest.raises(AdaptcError, match=r"axis 2 has size 24, but.*exactly 16; capture.*example_inputs of size 24"):
        program(torch.randn(2, 3, 24, 12))
