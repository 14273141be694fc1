"""Models that take ``len`` of a tensor, or convert a module to the dtype that it has, are captured with free sizes."""

from __future__ import annotations

import builtins
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc.capture.replacements.traceable_calls import free_tensor_lengths, kept_modules


class Tiles(nn.Module):
    """Repeats rows as often as the batch is long, and keeps its head in a dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.head, self.query = nn.Linear(7, 5), nn.Linear(5, 3), nn.Parameter(torch.randn(1, 5))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        self.head = self.head.to(self.dtype)
        names = ["of", "lists"]
        y = self.linear(x) + self.query.tile([len(x), 1]).unsqueeze(1) * len(names)
        return self.head(y.to(self.dtype))


class Long(Tensor):
    """A tensor that says another length than its shape does."""

    def __len__(self) -> int:
        return 99


def length_of(value: Any) -> int:
    return len(value)


def test_the_batch_stays_free() -> None:
    model = Tiles().eval()
    config = adaptc.LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=torch.randn(3, 4, 7))
    for rows in (2, 3, 5):
        x = torch.randn(rows, 4, 7)
        torch.testing.assert_close(program.base(x), model(x))
    assert "to" not in vars(model.head)


def test_a_conversion_that_changes_a_module_is_refused() -> None:
    config = adaptc.LoraConfig(r=2, target_modules=["linear"])
    with pytest.raises(adaptc.CaptureError, match="could not be captured"):
        adaptc.compile(Tiles(torch.float64), config, example_inputs=torch.randn(3, 4, 7))


def test_conversions_are_torchs_but_for_the_dtype_that_a_module_has() -> None:
    model = Tiles()
    with kept_modules(model):
        assert model.head.to(torch.float32) is model.head
        assert model.head.to(torch.float64).weight.dtype == torch.float64
        assert model.head.to(dtype=torch.float64, device="cpu").weight.dtype == torch.float64
        with pytest.raises(TypeError, match="floating point"):
            model.head.to(torch.int32)


def test_other_threads_and_what_comes_after_are_untouched() -> None:
    x, seen = torch.randn(3, 4, 7).as_subclass(Long), list[Any]()
    own = vars(sys.modules[__name__])
    with free_tensor_lengths(Tiles()):
        assert own["len"] is not builtins.len
        assert length_of("abcd") == 4
        assert length_of(x) == 3
        with pytest.raises(TypeError, match="0-d"):
            length_of(torch.tensor(1))
        thread = threading.Thread(target=lambda: seen.append(length_of(x)))
        thread.start()
        thread.join()
    assert seen == [99]
    assert "len" not in own
