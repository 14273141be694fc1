"""Values that training keeps to (OFT's ``coft``): parameters are moved back before each call, as PEFT does it in its
layers, in plain loops, with checkpointing, in a Trainer, and in copies."""

from __future__ import annotations

import copy
from math import sqrt
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from tests.support.training import batch, model, steps, train, trainable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

EPS = 0.07
OPTIONS: dict[str, Any] = {
    "oft_block_size": 8,
    "coft": True,
    "eps": EPS,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


def ours(training: bool = True, **more: Any) -> nn.Module:
    program = adaptc.compile(model(), adaptc.OFTConfig(**OPTIONS), training=training)
    return program.module(**more)


def theirs() -> nn.Module:
    return peft.get_peft_model(copy.deepcopy(model()), peft.OFTConfig(**OPTIONS))


def lengths(module: nn.Module) -> list[float]:
    """The length of the largest block of each parameter, of which it has each number twice."""
    return [float(p.detach().norm(dim=-1).max()) * sqrt(2) for p in trainable(module)]


def losses(module: nn.Module, count: int) -> list[float]:
    batches = ({k: t.roll(i) for k, t in batch(4).items() if k != "labels"} for i in range(count))

    def loss() -> Tensor:
        rows = next(batches)
        logits = module(**rows).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows["input_ids"].flatten())

    return steps(loss, trainable(module), count, lr=0.05)


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("training", [True, False], ids=["training", "without train()"])
def test_fifty_steps_are_pefts(training: bool) -> None:
    mine, other = ours(training), theirs()
    found = losses(mine, 50)
    assert len(set(found)) > 40
    close(found, losses(other, 50))
    assert max(lengths(mine)) < 0.5, "0.05 in each number is the last step"
    close(lengths(mine), lengths(other))
    mine(input_ids=batch()["input_ids"])
    assert max(lengths(mine)) <= EPS / sqrt(4) * (1 + 1e-5)


@pytest.mark.long
def test_checkpoints_copies_and_two_calls_before_a_backward() -> None:
    plain = losses(ours(), 4)
    close(losses(ours(gradient_checkpointing=True), 4), plain)
    again = ours()
    losses(again, 2)
    twin = copy.deepcopy(again)
    close(losses(twin, 3), losses(again, 3))
    close(lengths(twin), lengths(again))
    both = again(**batch()).loss + again(**batch()).loss
    both.backward()
    with torch.no_grad():
        trainable(again)[0].add_(1)
        again(**batch())
    assert lengths(again)[0] > 1, "nothing is written where no gradients are taken"


@pytest.mark.long
def test_in_a_trainer(tmp_path: Path) -> None:
    """Its base model too, which trainers call that compute a loss of their own."""
    mine, other = ours(), theirs()
    found, _ = train(mine, tmp_path / "ours", learning_rate=0.05, gradient_checkpointing=True)
    close(found, train(other, tmp_path / "theirs", learning_rate=0.05)[0])
    close(lengths(mine), lengths(other))
    with torch.no_grad():
        trainable(mine)[0].add_(1)
    mine.base_model(**{k: t for k, t in batch().items() if k != "labels"})
    assert lengths(mine)[0] < EPS


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, 6, 10))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->beo", self.matrices, x)


def test_each_expert_has_its_own() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Experts()), torch.randn(4, 10)
    config = adaptc.OFTConfig(oft_block_size=5, coft=True, eps=EPS, target_modules=[], target_parameters=["0.matrices"])
    module = adaptc.compile(net, config, example_inputs=x).module()
    (rows,) = trainable(module)
    with torch.no_grad():
        rows[0] += 1
        rows[1] += 1e-4
    kept = rows.detach().clone()
    module(x)
    assert torch.equal(rows[1:], kept[1:])
    close(rows[0].norm(dim=-1) * sqrt(2), torch.full((2,), EPS / sqrt(2)))
