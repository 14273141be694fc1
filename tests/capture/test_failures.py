"""What fails says whether the model fails without adaptc as well; and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from adaptc.capture.capture import capture
from adaptc.errors import CaptureError
from tests.support.families import FAMILIES
from tests.support.model_state import changed_paths, state_of


class Narrow(nn.Module):
    """Fails for widths other than its own, and branches on a value, which torch cannot capture."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.lin, self.branches, self.calls = nn.Linear(5, 7), branches, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.lin(x)
        return y * 2 if self.branches and y.sum() > 0 else y


@pytest.mark.parametrize("shapes", ["auto", None])
def test_a_failed_capture_says_whether_the_model_runs(shapes: object) -> None:
    model, wrong = Narrow(branches=False), torch.randn(2, 3)
    with pytest.raises(CaptureError, match=r"The model itself fails on these inputs, too: RuntimeError: mat1 and mat2"):
        capture(model, wrong, dynamic_shapes=shapes)
    branching = Narrow(branches=True)
    with pytest.raises(CaptureError, match=r"torch\.where.*The model itself runs on these inputs$"):
        capture(branching, torch.randn(2, 5), dynamic_shapes=shapes)
    assert model.calls == branching.calls == 0


def test_nothing_is_said_of_models_without_values() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Narrow(branches=True).to("meta"), torch.randn(2, 5, device="meta"))
    assert "itself" not in str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_that_fails_itself_does_not_generate(family: str) -> None:
    model = FAMILIES[family].build()
    model.lm_head = nn.Linear(23, 61, bias=False)
    before = state_of(model)
    with pytest.raises(CaptureError, match=r"ForC\w+ itself fails, before anything is captured: RuntimeError: mat1"):
        adaptc.compile_for_generation(model, LoraConfig(r=2, target_modules="all-linear"), max_length=20)
    assert changed_paths(before, state_of(model)) == []
