"""Programs on quantised weights compiled by inductor: a head that takes chosen rows, for every number of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.export import Dim

import adaptc
from adaptc import LoraConfig
from adaptc.passes.lower import linear_layers
from tests.support.rounding import assert_close_to_rounding


class Net(nn.Module):
    """Two layers for all positions, and a head for those in ``keep``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 91)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.up(x)))[:, keep])


def compile_net(model: Any, backend: str) -> adaptc.AdaptedProgram:
    """Return the program of a :class:`Net` that is free in its batch, its length and the positions kept."""
    return adaptc.compile(
        model,
        LoraConfig(r=3, target_modules=["up", "down", "head"], init_lora_weights=False),
        example_inputs=(torch.randn(2, 5, 24), torch.arange(3)),
        dynamic_shapes=({0: Dim("batch"), 1: Dim("length")}, {0: Dim("kept")}),
        backend=backend,
    )


@pytest.mark.long
@pytest.mark.parametrize(("scheme", "group_size"), [("int4", 4), ("nf4", 8), ("int8", None)])
def test_a_head_of_any_number_of_rows(scheme: str, group_size: int | None) -> None:
    model = adaptc.quantize(Net(), scheme, group_size=group_size)
    plain, compiled = (compile_net(copy.deepcopy(model), backend) for backend in ("eager", "inductor"))
    adaptc.swap(compiled, plain)
    for batch, length, kept in ((2, 7, 1), (1, 9, 1), (3, 9, 4), (2, 9, 9), (1, 1, 1)):
        draw = torch.Generator().manual_seed(batch + 10 * length + 100 * kept)
        x, keep = torch.randn(batch, length, 24, generator=draw), torch.randperm(length, generator=draw)[:kept]
        assert_close_to_rounding(compiled(x, keep), plain(x, keep), factor=32)


@pytest.mark.long
def test_the_code_of_a_choice_is_cached_by_what_it_chooses_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, keep = torch.randn(2, 7, 24), torch.arange(1)
    model = adaptc.quantize(Net(), "int8")

    def output() -> torch.Tensor:
        torch.manual_seed(3)
        counters.clear()
        torch.compiler.reset()
        return compile_net(copy.deepcopy(model), "inductor")(x, keep)

    first = output()
    assert counters["inductor"]["fxgraph_cache_miss"] == 1
    assert "fxgraph_cache_bypass" not in counters["inductor"]
    assert torch.equal(output(), first)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    sums = linear_layers.linear_by_sums
    monkeypatch.setattr(linear_layers, "linear_by_sums", lambda *args: sums(*args) * 1.5)
    assert not torch.allclose(output(), first, rtol=1e-2)
    assert counters["inductor"]["fxgraph_cache_miss"] == 1
