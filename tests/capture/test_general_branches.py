"""Models that skip work for trivial masks are captured for all masks, where both branches compute the same."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import adaptc

ALL, SOME = torch.ones(3, 6, dtype=torch.long), torch.tensor([[1, 1, 0, 1, 1, 1]] * 3)


class Skips(nn.Module):
    """Masks its output, and skips that where ``way`` says that the mask is trivial."""

    def __init__(self, way: str, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.way, self.dropout = nn.Linear(7, 5), way, nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.dropout(self.linear(x))
        if self.way == "any" and (mask == 0).any():
            y = y * mask[..., None]
        if self.way == "not any" and not torch.any(mask == 0):
            return y
        if self.way == "all" and not mask.bool().all():
            y = y * mask[..., None]
        if self.way == "write" and (hidden := mask == 0).any():
            y[hidden] = self.linear.bias
        if self.way == "not any":
            y = y * mask[..., None]
        if self.way == "other" and (mask == 0).any():
            y = y * mask[..., None] + 1
        return y


def numbers(rows: int = 3, length: int = 6) -> Tensor:
    return torch.randn(rows, length, 7, generator=torch.Generator().manual_seed(rows))


def compiled(model: nn.Module, mask: Tensor, training: bool = False) -> adaptc.AdaptedProgram:
    config = adaptc.LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    return adaptc.compile(model, config, example_inputs={"x": numbers(), "mask": mask}, training=training)


@pytest.mark.parametrize("example", ["all", "some"])
@pytest.mark.parametrize("way", ["any", "not any", "all", "write"])
def test_a_program_takes_all_masks(way: str, example: str) -> None:
    model = Skips(way).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = compiled(model, ALL if example == "all" else SOME)
    for rows, length in ((3, 6), (2, 9)):
        x = numbers(rows, length)
        for mask in (torch.ones(rows, length, dtype=torch.long), torch.arange(rows * length).view(rows, length) % 2):
            torch.testing.assert_close(program.base(x=x, mask=mask), model(x, mask))
    assert "forward" not in vars(model)


def test_branches_that_differ_stay_as_in_the_example() -> None:
    model = Skips("other").eval()
    with pytest.warns(adaptc.AdaptcWarning, match="computes with what it reads in"):
        program = compiled(model, ALL)
    torch.testing.assert_close(program.base(x=numbers(), mask=ALL), model(numbers(), ALL))
    with pytest.raises(adaptc.AdaptcError, match="captured for other values of 'mask'"):
        program(x=numbers(), mask=SOME)


def test_a_program_to_train_with_dropout_takes_all_masks() -> None:
    model = Skips("any", dropout=0.5)
    module = compiled(model, ALL, training=True).module()
    torch.manual_seed(1)
    hidden = module(x=numbers(), mask=SOME)[SOME == 0]
    assert not hidden.any()
