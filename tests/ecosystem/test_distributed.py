"""Two processes train what one would train on the same rows, with DistributedDataParallel, FSDP2 and Trainer, and go on
from what they saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import adaptc
from tests.ecosystem.two_processes import together
from tests.support.training import batch, model, module, optimizer_of, quantized_module, steps, train, trainable


def alone(made: Callable[[], Any] = module) -> tuple[list[float], Any]:
    """The losses of four steps of one process, and its module."""

    def loss() -> torch.Tensor:
        """The mean over processes is that of their means."""
        rows = batch(4)
        halves = [one(**{k: t[at : at + 2] for k, t in rows.items()}).loss for at in (0, 2)]
        return (halves[0] + halves[1]) / 2

    one = made()
    expected = steps(loss, trainable(one), 4, optimizer_of(one))
    assert len(set(expected)) == 4
    return expected, one


def same(found: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)


def logits(one: Any) -> torch.Tensor:
    with torch.no_grad():
        return one(**{k: t for k, t in batch().items() if k != "labels"}).logits


@pytest.mark.long
def test_two_processes_are_as_one(tmp_path: Path) -> None:
    jobs = together(tmp_path, "ddp", "fsdp", "fsdp_begins", "fsdp_goes_on")
    expected, one = alone()
    for how in ("ddp", "fsdp"):
        found = jobs[how]
        same(found["losses"], expected)
        torch.testing.assert_close(found["state"], one.state_dict(), rtol=1e-4, atol=1e-6)
        assert found["frozen"] == 0, "frozen parameters have gradients"
    assert jobs["ddp"]["bytes"] == 4 * sum(p.nbytes for p in trainable(one)), "more than the adapter's gradients"

    begun, rest = jobs["fsdp_begins"], jobs["fsdp_goes_on"]
    assert begun["losses"] + rest["losses"] == jobs["fsdp"]["losses"], "to the bit"
    files = {
        n: load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapter", "resumed", "four", "swapped")
    }
    assert begun["state"].keys() == files["adapter"].keys() == one.state_dict().keys()
    for key, value in files["adapter"].items():
        assert torch.equal(begun["state"][key], value)
        assert torch.equal(rest["loaded"][key], value)
        assert torch.equal(files["resumed"][key], files["four"][key])
        assert torch.equal(files["swapped"][key], files["four"][key])
    assert not (tmp_path / "stale").exists()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model()), str(tmp_path / "four")).eval()
    torch.testing.assert_close(logits(loaded), logits(one.eval()), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_a_merged_model_in_two_processes_is_written_whole(tmp_path: Path) -> None:
    found = together(tmp_path, "merged")["merged"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**found["rows"]).logits, found["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_two_processes_on_a_quantised_base_are_as_one(tmp_path: Path) -> None:
    """The base is rounded to bfloat16 between layers, row by row, as it is in one process: sums over rows differ."""
    jobs = together(tmp_path, "quantized", "quantized_trainer")
    expected, one = alone(quantized_module)
    for how in ("ddp", "fsdp"):
        torch.testing.assert_close(jobs["quantized"][how], expected, rtol=2**-9, atol=0)
        torch.testing.assert_close(jobs["quantized"][f"{how} state"], one.state_dict(), rtol=2**-6, atol=2**-9)
    expected, _ = train(quantized_module(), tmp_path / "one", bf16=True, max_steps=4)
    torch.testing.assert_close(jobs["quantized_trainer"]["losses"], expected, rtol=2**-9, atol=0)


@pytest.mark.long
def test_a_trainer_in_two_processes_is_as_in_one(tmp_path: Path) -> None:
    jobs = together(tmp_path, "trainer", "trainer_goes_on")
    expected, one = train(module(), tmp_path / "one", max_steps=4, save_strategy="steps", save_steps=2)
    same(jobs["trainer"]["losses"], expected)
    assert jobs["trainer_goes_on"]["losses"] == jobs["trainer"]["losses"], "to the bit"
    own, theirs = ({p.name for p in (tmp_path / n / "checkpoint-2").iterdir()} for n in ("one", "trainer"))
    assert theirs - {"rng_state_0.pth", "rng_state_1.pth"} == own - {"rng_state.pth"}
    torch.testing.assert_close(jobs["trainer_goes_on"]["state"], one.model.state_dict(), rtol=1e-4, atol=1e-6)
    loaded = adaptc.compile(model(), tmp_path / "trainer/checkpoint-4")
    torch.testing.assert_close(logits(loaded), logits(one.model.eval()), rtol=1e-4, atol=1e-5)
