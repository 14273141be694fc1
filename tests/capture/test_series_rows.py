"""Models that take a list of time series are captured for a tensor of any number of them, of any length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig

CONTEXT, HORIZON = 11, 5


class Forecaster(nn.Module):
    """Goes over its series one by one, as TimesFM does."""

    context_len, horizon_len = CONTEXT, HORIZON

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.kind = nn.Linear(2, 7), nn.Linear(7, 3), nn.Embedding(4, 3)

    def forward(
        self, past_values: Sequence[Tensor], freq: Any = None, forecast_context_len: int | None = None
    ) -> dict[str, Tensor]:
        context = forecast_context_len or self.context_len
        series = [s[-context:] for s in past_values]
        is_positive = torch.stack([s.min() for s in series]).min() >= 0
        padded, padding, kinds = self._preprocess(series, [0] * len(series) if freq is None else freq, context)
        x = torch.stack([padded, padding[:, :context]], -1)
        found = self.down(torch.tanh(self.up(x))) + self.kind(kinds)
        return {"out": torch.where(is_positive, found.clamp_min(0), found), "padding": padding}

    def _preprocess(self, inputs: Sequence[Tensor], freq: Any = None, context_len: int | None = None) -> Any:
        context = context_len or self.context_len
        rows, paddings = [], []
        for s in inputs:
            missing = context - s.shape[0]
            padding = torch.zeros(s.shape[0] + self.horizon_len)
            if missing > 0:
                s = torch.cat([torch.zeros(missing), s])
                padding = torch.cat([torch.ones(missing), padding])
            rows.append(s)
            paddings.append(padding)
        kinds = torch.as_tensor([int(f) for f in freq], dtype=torch.int32).reshape(-1, 1)
        return torch.stack(rows), torch.stack(paddings), kinds


class Behind(Forecaster):
    """Pads behind the series."""

    def _preprocess(self, inputs: Sequence[Tensor], freq: Any = None, context_len: int | None = None) -> Any:
        rows, padding, kinds = super()._preprocess([s.flip(0) for s in inputs], freq, context_len)
        return rows.flip(1), padding, kinds


class Mean(Forecaster):
    """Reads something else of its series than their padded rows."""

    def forward(
        self, past_values: Sequence[Tensor], freq: Any = None, forecast_context_len: int | None = None
    ) -> dict[str, Tensor]:
        found = super().forward(past_values, freq, forecast_context_len)
        return {**found, "out": found["out"] + torch.stack([s.mean() for s in past_values]).mean()}


def series(rows: int, length: int, positive: bool = False) -> Tensor:
    drawn = torch.randn(rows, length, generator=torch.Generator().manual_seed(rows * 100 + length))
    return drawn.abs() if positive else drawn


@pytest.mark.parametrize("with_kinds", [False, True])
@pytest.mark.parametrize("length", [7, CONTEXT, 17])
def test_any_number_of_series_of_any_length(with_kinds: bool, length: int) -> None:
    def inputs(rows: int, length: int, positive: bool = False) -> dict[str, Any]:
        kinds = {"freq": torch.arange(rows).remainder(4).unsqueeze(1)} if with_kinds else {}
        return {"past_values": series(rows, length, positive), **kinds}

    model = Forecaster().eval()
    before = dict(vars(model))
    program = adaptc.compile(model, LoraConfig(r=2, target_modules=["up"]), example_inputs=inputs(3, length))
    assert vars(model).keys() == before.keys()
    for rows, n in ((3, length), (1, 1), (5, 8), (2, CONTEXT), (4, 40)):
        for positive in (False, True):
            call = inputs(rows, n, positive)
            found = program(**call)
            wanted = model(**{**call, "past_values": [*call["past_values"]]})
            for name, value in wanted.items():
                torch.testing.assert_close(found[name], value)


def test_series_by_position() -> None:
    program = adaptc.compile(Forecaster().eval(), LoraConfig(r=2, target_modules=["up"]), example_inputs=series(3, 8))
    torch.testing.assert_close(program(series(2, 13))["out"], Forecaster().eval()([*series(2, 13)])["out"])


@pytest.mark.parametrize("kind", [Behind, Mean])
def test_a_model_that_does_something_else_is_captured_as_it_is(kind: type[Forecaster]) -> None:
    model = kind().eval()
    example = {"past_values": series(3, 8)}
    with pytest.warns(adaptc.AdaptcWarning, match="was captured for some sizes alone"):
        program = adaptc.compile(model, LoraConfig(r=2, target_modules=["up"]), example_inputs=example)
    found, wanted = program(past_values=series(3, 8)), model([*series(3, 8)])
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    with pytest.raises(adaptc.AdaptcError, match="axis 0 has size 2, but the program was captured for exactly 3"):
        program(past_values=series(2, 8))
