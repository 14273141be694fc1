"""What a bank's calls write to: buffers of its own, which its copies go on from, or begin anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


def state_of(program: Any, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {k: torch.randn(t.shape, generator=draw) for k, t in program.module().state_dict().items()}


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.count.add_(1)
        return self.layer(x), self.count.clone()


def counting() -> adaptc.AdaptedProgram:
    options = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    return adaptc.compile(Counting().eval(), options, example_inputs=X[:2])


def test_buffers_that_calls_write_to_are_the_bank_s() -> None:
    """One state for all its calls, whichever way they are computed; it begins as the program's is."""
    made = counting()
    made(X)
    before = float(made.state_dict["count"])
    bank = made.bank({"a": made.binding, "b": state_of(made, 1)})
    assert float(made.state_dict["count"]) == before
    for turn, chosen in enumerate((["a"] * 3, [None] * 3, ["a", None, "b"], ["b"] * 3, [None, "a", None], [None] * 3)):
        assert float(bank(X, adapters=chosen)[1]) == before + turn + 1
    assert float(made.state_dict["count"]) == before
    assert float(copy.copy(bank)(X, adapters=["a"] * 3)[1]) == before + 1


@pytest.mark.parametrize("chosen", [["a"] * 3, [None] * 3, ["a", None, "b"]])
def test_a_deep_copy_goes_on_from_what_was_written(chosen: list[str | None]) -> None:
    """Of a bank, of an assignment, and of what is bound to the program in either form; then each goes on alone."""
    made = counting()
    bank = made.bank({"a": made.binding, "b": state_of(made, 1)})
    runs = {
        "bank": (bank, lambda one: one(X, adapters=chosen)),
        "assigned": (made.bank({"a": made.binding, "b": state_of(made, 1)}).select(chosen), lambda one: one(X)),
        **{form: (made.bind(made.binding, form=form), lambda one: one(X)) for form in ("apply", "weight")},
        "base": (made.bind(None), lambda one: one(X)),
    }
    for name, (one, call) in runs.items():
        call(one)
        before, count = call(one)
        assert float(count) == 2, name
        other = copy.deepcopy(one)
        after, count = call(other)
        assert float(count) == 3, name
        torch.testing.assert_close(after, before)
        assert [float(call(other)[1]), float(call(one)[1])] == [4, 3], name
    assert float(made.state_dict["count"]) == 0
