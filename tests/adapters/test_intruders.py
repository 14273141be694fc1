"""Intruder dimensions are weakened as in PEFT, and for methods and layers that PEFT does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adaptc
from tests.support.oracle import assert_differs, quiet, randomize

X = torch.linspace(-1, 1, 35).reshape(5, 7)
OPTIONS: dict[str, Any] = {"top_k": 4, "threshold_epsilon": 0.7, "mitigation_lambda": 0.4}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), Conv1D(11, 13), nn.Linear(11, 5)).to(dtype).eval()


def lora(**more: Any) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 7, "target_modules": ["0", "2", "3"], **more}


@pytest.mark.parametrize("scale", [0.02, 0.7])
def test_outputs_are_pefts(scale: float, tmp_path: Path) -> None:
    with quiet(".*fan_in_fan_out.*"):
        theirs = peft.get_peft_model(net(), peft.LoraConfig(**lora(target_modules=["0", "3"]))).eval()
    randomize(theirs)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.mul_(scale if "lora_B" in name else 1)
    theirs.save_pretrained(str(tmp_path))
    before = theirs(X)
    reduce_intruder_dimension(theirs, logging_sink=None, **OPTIONS)
    program = adaptc.compile(net(), tmp_path, example_inputs=X[:2])
    own = program(X)
    torch.testing.assert_close(own, before)
    made = adaptc.methods.reduce_intruder_dimension(program, **OPTIONS)
    assert torch.equal(program(X), own)
    adaptc.swap(program, made)
    torch.testing.assert_close(program(X), theirs(X), rtol=1e-4, atol=1e-5)
    found = sum(made.report.intruders.values())
    assert (found > 0) == (scale > 0.5)
    assert f"{found} intruder dimensions in" in str(made.report)
    if found:
        assert_differs(program(X), before)
    again = adaptc.methods.reduce_intruder_dimension(tmp_path, net(), example_inputs=X[:2], **OPTIONS)
    assert all(torch.equal(t, again.tensors[k]) for k, t in made.tensors.items())


class Others(nn.Module):
    """Layers that PEFT's function fails on or gets wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.turned, self.conv = nn.Embedding(17, 7), Conv1D(9, 7), nn.Conv1d(9, 11, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.turned(self.rows(ids)).mT)


@pytest.mark.parametrize("make", [adaptc.LoraConfig, adaptc.LoHaConfig])
def test_each_weight_loses_a_part_of_the_vectors_that_its_base_lacks(make: Any) -> None:
    torch.manual_seed(3)
    model, ids = Others().double().eval(), torch.randint(17, (2, 6))
    init = {"init_lora_weights": False} if make is adaptc.LoraConfig else {"init_weights": False}
    targets = ["rows", "turned", "conv"] if make is adaptc.LoraConfig else ["conv"]
    program = adaptc.compile(model, make(r=4, target_modules=targets, **init), example_inputs=ids)
    with torch.no_grad():
        for value in program.binding.values.values():
            if value.ndim > 1:
                value.mul_(5)
    before = adaptc.merge(program).state_dict
    made = adaptc.methods.reduce_intruder_dimension(program, rank=1.0, **OPTIONS)
    after = adaptc.merge(adaptc.compile(model, made, example_inputs=ids)).state_dict
    for name in targets:
        base, old, new = (s[f"{name}.weight"].flatten(1).double() for s in (model.state_dict(), before, after))
        U, S, Vh = torch.linalg.svd(old, full_matrices=False)
        left = torch.linalg.svd(base, full_matrices=False)
        sides = (Vh, left.Vh) if name != "conv" else (U.mT, left.U.mT)  # stored as (in, out)
        alike = (sides[0] @ sides[1].mT).abs().amax(1)[:4]
        gone = alike < 0.7
        expected = old - 0.6 * (U[:, :4] * (S[:4] * gone)) @ Vh[:4]
        torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-6)
        assert made.report.intruders[f"{name}.weight"] == int(gone.sum())
    assert sum(made.report.intruders.values()) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 0}, "top_k=0 must be an integer of at least 1"),
        ({"top_k": True}, "top_k=True"),
        ({"threshold_epsilon": 1.5}, "threshold_epsilon=1.5 must be a number from 0 to 1"),
        ({"mitigation_lambda": float("nan")}, "mitigation_lambda=nan"),
        ({"rank": 0}, "rank=0 must be"),
    ],
)
def test_odd_options_are_refused(options: dict[str, Any], said: str) -> None:
    with quiet(".*fan_in_fan_out.*"):
        program = adaptc.compile(net(), adaptc.LoraConfig(**lora(init_lora_weights=False)), example_inputs=X)
    with pytest.raises(adaptc.ConfigError, match=said):
        adaptc.methods.reduce_intruder_dimension(program, **options)


def test_what_has_no_rank_or_no_weight_is_refused() -> None:
    scaling = adaptc.compile(net(), adaptc.IA3Config(target_modules=["0"], feedforward_modules=[]), example_inputs=X)
    with pytest.raises(adaptc.ConfigError, match="have no rank"):
        adaptc.methods.reduce_intruder_dimension(scaling)
    with pytest.raises(adaptc.ConfigError, match="known with the model"):
        adaptc.methods.reduce_intruder_dimension("some/directory")
