"""Blocks of autocast in a model: what fails in them leaves the thread's autocast as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Branching(nn.Module):
    """torch captures its block as one node that enters autocast, and one that leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.last = nn.Embedding(9, 6), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.first(x) + self.first(self.words(ids))
            y = torch.cond(y.sum() > 0, lambda t: t + 1.0, lambda t: t - 1.0, (y,))
        return self.last(y.float())


def state() -> tuple[Any, ...]:
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), nesting


@pytest.mark.parametrize(
    "config",
    [adaptc.LoraConfig(r=2, target_modules=["first"]), adaptc.HRAConfig(target_modules=["first"])],
    ids=["lora", "hra"],
)
def test_a_call_that_fails_in_a_block_leaves_it(config: Any) -> None:
    model = Branching()
    good, bad = (torch.randn(3, 6), torch.tensor([1, 2, 8])), (torch.randn(3, 6), torch.tensor([1, 2, 9]))
    program = adaptc.compile(model, config, example_inputs=good, training=True)
    assert any("_enter_autocast" in str(n.target) for n in program.graph.nodes)
    before = state()
    for call in (program, program.module(), adaptc.unload(program)):
        out = call(*good)
        assert state() == before
        with pytest.raises((IndexError, adaptc.AdaptcError), match=r"index out of range|9"):
            call(*bad)
        assert state() == before
        assert torch.equal(call(*good), out)
        with torch.autocast("cpu", dtype=torch.float16):
            inside = state()
            with pytest.raises((IndexError, adaptc.AdaptcError), match=r"index out of range|9"):
                call(*bad)
            assert state() == inside
        assert state() == before
