"""Models that read memory by its strides, as Longformer does to make windows overlap: the same in all that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc


def windows(x: Tensor, width: int = 2) -> Tensor:
    """Return overlapping windows (rows, windows, 2 * width, columns) of a tensor (rows, length, columns)."""
    x = x.view(x.shape[0], x.shape[1] // (2 * width), 2 * width, x.shape[2])
    size, stride = list(x.shape), list(x.stride())
    size[1], stride[1] = size[1] * 2 - 1, stride[1] // 2
    return x.as_strided(size, stride)


pytestmark = pytest.mark.filterwarnings("ignore:.*was captured for some sizes alone:adaptc.AdaptcWarning")
#: how a model comes from what its layers give, (length, rows, columns), to a tensor (rows, length, columns)
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda y: y.transpose(0, 1),
    "heads": lambda y: (
        y.view(*y.shape[:2], 2, -1).transpose(0, 1).transpose(1, 2).reshape(2 * y.shape[1], y.shape[0], -1)
    ),
    "halves": lambda y: y[..., ::2].transpose(0, 1),
    "scaled": lambda y: (y * 3).transpose(0, 1),
    "contiguous": lambda y: y.transpose(0, 1).contiguous(),
}


class Overlapping(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(7, 6), nn.Linear(7, 6), nn.Linear(5, 4)
        self.way = WAYS[way]

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1)
        queries, keys = windows(self.way(self.first(h))), windows(self.way(self.second(h)))
        scores = queries @ keys.transpose(-2, -1)
        return scores.unflatten(0, (x.shape[0], -1)).sum((1, 2, 3))


def make(way: str) -> tuple[Overlapping, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    model, x = Overlapping(way).double().eval(), torch.randn(3, 8, 7, dtype=torch.float64)
    config = adaptc.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    return model, x, {"adapter": config, "example_inputs": (x,)}


def merged_outputs(program: adaptc.AdaptedProgram, model: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs of the model itself with merged weights: no graph is between."""
    weights, names = adaptc.merge(program).state_dict, dict(model.named_parameters())
    return torch.func.functional_call(model, {k: v for k, v in weights.items() if k in names}, x)


@pytest.mark.parametrize("way", WAYS)
def test_all_that_runs_reads_the_same_memory(way: str, tmp_path: Path) -> None:
    model, x, options = make(way)
    program = adaptc.compile(model, **options)
    want, other = merged_outputs(program, model, x), model(x)
    assert float((want - other).detach().abs().max()) > 1e-3
    bank = program.bank({"a": program.binding})
    for found in (program(x), program.module()(x), adaptc.merge(program)(x), bank(x, adapters=["a"] * 3)):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(program.base(x), other, rtol=1e-9, atol=1e-9)
    mixed = bank(x, adapters=["a", None, "a"])
    torch.testing.assert_close(mixed, torch.where(torch.tensor([[1], [0], [1]]) > 0, want, other), rtol=1e-9, atol=1e-9)
    saved = adaptc.save(program, tmp_path / "program.pt2")
    torch.testing.assert_close(adaptc.load(saved)(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("way", WAYS)
def test_compiled_code_reads_the_same_memory(way: str) -> None:
    model, x, options = make(way)
    program = adaptc.compile(model, **options, backend="inductor")
    torch.testing.assert_close(program(x), merged_outputs(program, model, x), rtol=1e-9, atol=1e-9)


def test_reads_of_sizes_that_only_values_tell_are_left_alone() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 6)

        def forward(self, x: Tensor) -> Tensor:
            picked = self.linear(x)[x[:, 0] > -9]
            torch._check(picked.shape[0] >= 2)
            return picked.as_strided((2, 6), (6, 1)).sum(0) + self.linear(x).sum(0)

    torch.manual_seed(0)
    model, x = Picks().eval(), torch.randn(5, 7)
    config = adaptc.LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=(x,))
    torch.testing.assert_close(program.base(x), model(x))
    torch.testing.assert_close(program(x), merged_outputs(program, model, x))
