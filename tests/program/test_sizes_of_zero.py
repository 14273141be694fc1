"""Calls with a size of zero: ``prog.module()`` says what is wrong with one that something is divided by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig


@pytest.mark.parametrize("training", [False, True])
def test_a_size_of_zero_that_is_divided_by(training: bool) -> None:
    """Whether by the model or by a condition on its sizes, the input is named."""

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags, self.lin = nn.EmbeddingBag(11, 6), nn.Linear(6, 5)

        def forward(self, ids: Tensor) -> Tensor:
            return self.lin(self.bags(ids))

    class Mean(Bags):
        def forward(self, ids: Tensor) -> Tensor:
            return self.lin(self.bags(ids)) * (ids.numel() // ids.shape[0])

    config = LoraConfig(r=2, target_modules=["lin"])
    for kind, empty in ((Bags, (3, 0)), (Mean, (0, 3))):
        program = adaptc.compile(kind().eval(), config, example_inputs=torch.arange(6).reshape(2, 3), training=training)
        with pytest.raises(adaptc.AdaptcError, match=r"'ids' has shape \(" + ", ".join(map(str, empty))):
            program.module()(torch.zeros(*empty, dtype=torch.int64))
