"""Each prompt of a batch generates with adapters of its own, and gives what it gives alone and what PEFT gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.generation.models import case, generated, generator, prompt

NAMES: list[Any] = ["first", None, "second", {"first": 0.6, "second": -0.4}]


class Mixed:
    """A bank that generates with one assignment."""

    def __init__(self, bank: Any, adapters: list[Any]) -> None:
        self.bank, self.adapters = bank, adapters

    def generate(self, **how: Any) -> Any:
        return self.bank.generate(**how, adapters=self.adapters)


def bank(family: str = "llama") -> Any:
    return generator(family).bank(case(family).adapters)


def row(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {k: v[i : i + 1] for k, v in inputs.items()}


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_peft_says_the_same(family):
    inputs, oracle = prompt(4, 6, (0, 2)), case(family).oracle
    names = ["first", None, "second", "first"]
    expected = generated(oracle, inputs, adapter_names=[n or "__base__" for n in names])
    assert torch.equal(generated(Mixed(bank(family), names), inputs), expected)
