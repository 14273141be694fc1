"""transformers.Trainer trains an adapter of a model with images beside text, with the losses of a PeftModel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import adaptc
from tests.support.image_models import IMAGE, build, call_with_images
from tests.support.oracle import quiet, randomize

STEPS = 6


class Numbers(Dataset[int]):
    """The numbers of batches, of which :func:`batch` makes the inputs, as a processor's collator does."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, i: int) -> int:
        return i


def batch(rows: list[int]) -> dict[str, Tensor]:
    """Return two texts with images whose number and sizes change from batch to batch."""
    call = call_with_images([[(1, 2 + 2 * (rows[0] % 3), 4)] * (1 + rows[0] % 2), [(1, 4, 2), (1, 2, 2)]])
    ids = call["input_ids"]
    return {**call, "labels": ids.masked_fill((ids == IMAGE) | (call["attention_mask"] == 0), -100)}


def losses(model: Any, path: Path) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        logging_steps=1,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Numbers(), data_collator=batch)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl"])
def test_losses_are_those_of_peft(family: str, tmp_path: Path) -> None:
    base = build(family)
    with quiet():
        wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules="all-linear"))
    randomize(wrapped)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    expected = losses(wrapped, tmp_path / "peft")
    program = adaptc.compile(base, tmp_path / "adapter", example_inputs=batch([0]), training=True)
    found = losses(program.module(), tmp_path / "adaptc")
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(found[0] - found[-1]) > 0.1
