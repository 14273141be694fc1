"""The optimizer: one rate for the adapter, another for a head that is trained beside it."""

from __future__ import annotations

import pytest
from torch import nn

from tests.comparison.train import make_optimizer


def module() -> nn.Module:
    made = nn.ModuleDict({"layer": nn.Linear(5, 7), "classifier": nn.Linear(7, 3), "classifiers": nn.Linear(7, 2)})
    made["layer"].bias.requires_grad_(False)
    return made


def test_a_head_has_its_own_rate() -> None:
    made = module()
    adapter, head = make_optimizer(made, "classifier", 0.03, 0.005).param_groups
    assert (adapter["lr"], head["lr"]) == (0.03, 0.005)
    assert [p.numel() for p in adapter["params"]] == [35, 14, 2]
    assert [p.numel() for p in head["params"]] == [21, 3]


@pytest.mark.parametrize("head", ["", "missing"])
def test_without_a_head_there_is_one_rate(head: str) -> None:
    (only,) = make_optimizer(module(), head, 0.03, None).param_groups
    assert only["lr"] == 0.03
    assert only["weight_decay"] == 0
    assert len(only["params"]) == 5
