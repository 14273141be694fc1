"""Programs on quantised weights compiled by inductor: a head that takes chosen rows, for every number of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import adaptc
from adaptc import LoraConfig
from tests.support.rounding import assert_close_to_rounding


class Net(nn.Module):
    """Two layers for all positions, and a head for those in ``keep``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 91)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.up(x)))[:, keep])


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["int4", "nf4", "int8"])
def test_a_head_of_any_number_of_rows(scheme: str) -> None:
    options: dict[str, Any] = {} if scheme == "int8" else {"group_size": 8}
    model = adaptc.quantize(Net(), scheme, **options)
    config = LoraConfig(r=3, target_modules=["up", "down", "head"], init_lora_weights=False)
    free = ({0: Dim("batch"), 1: Dim("length")}, {0: Dim("kept")})
    plain, compiled = (
        adaptc.compile(
            copy.deepcopy(model),
            config,
            example_inputs=(torch.randn(2, 5, 24), torch.arange(3)),
            dynamic_shapes=free,
            backend=backend,
        )
        for backend in ("eager", "inductor")
    )
    adaptc.swap(compiled, plain)
    for batch, length, kept in ((2, 7, 1), (1, 9, 1), (3, 9, 4), (2, 9, 9), (1, 1, 1)):
        draw = torch.Generator().manual_seed(batch + 10 * length + 100 * kept)
        x, keep = torch.randn(batch, length, 24, generator=draw), torch.randperm(length, generator=draw)[:kept]
        assert_close_to_rounding(compiled(x, keep), plain(x, keep), factor=32)
