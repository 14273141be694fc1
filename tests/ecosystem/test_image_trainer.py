"""Trainers train an adapter of a model with images beside text, with the losses of a PeftModel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import adaptc
from tests.support.image_models import IMAGE, build, call_with_images
from tests.support.image_processor import conversations, image, processor
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


def arguments(path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(path), "max_steps": STEPS, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer_of(model: Any, path: Path) -> Any:
    args = TrainingArguments(**arguments(path), per_device_train_batch_size=1, remove_unused_columns=False)
    return Trainer(model=model, args=args, train_dataset=Numbers(), data_collator=batch)


def supervised_trainer_of(model: Any, path: Path) -> Any:
    args = SFTConfig(
        **arguments(path), per_device_train_batch_size=2, bf16=False, gradient_checkpointing=False, max_length=None
    )
    data = datasets.Dataset.from_list(conversations(2 * STEPS))
    return SFTTrainer(model, args=args, train_dataset=data, processing_class=processor())


def adapter_of_peft(base: Any, path: Path) -> Any:
    with quiet():
        wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules="all-linear"))
    randomize(wrapped)
    wrapped.save_pretrained(str(path))
    return wrapped


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl"])
def test_losses_are_those_of_peft(family: str, tmp_path: Path) -> None:
    base = build(family)
    wrapped = adapter_of_peft(base, tmp_path / "adapter")
    expected = losses(trainer_of(wrapped, tmp_path / "peft"))
    program = adaptc.compile(base, tmp_path / "adapter", example_inputs=batch([0]), training=True)
    found = losses(trainer_of(program.module(), tmp_path / "adaptc"))
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(found[0] - found[-1]) > 0.1


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_conversations_with_images_are_learned_as_with_peft(tmp_path: Path) -> None:
    base = build("qwen2_vl")
    reference = supervised_trainer_of(adapter_of_peft(base, tmp_path / "adapter"), tmp_path / "peft")
    example = reference.data_collator([reference.train_dataset[i] for i in range(2)])
    expected = losses(reference)
    program = adaptc.compile(base, tmp_path / "adapter", example_inputs=dict(example), training=True)
    found = losses(supervised_trainer_of(program.module(), tmp_path / "adaptc"))
    assert len({*expected}) == STEPS
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
def test_what_a_processor_returns_is_an_example_and_a_prompt(tmp_path: Path) -> None:
    base = build("qwen2_vl")
    wrapped = adapter_of_peft(base, tmp_path).eval()
    mark = "<|vision_start|> <|image_pad|> <|vision_end|>"
    example = processor()(images=[image(28, 42)], text=[f"w12 {mark} w31"], return_tensors="pt")
    gen = adaptc.compile_for_generation(base, tmp_path, example_inputs=example)
    texts = [f"w12 {mark} w31 w32", f"{mark} w9 {mark}", "w40 w41 w42"]
    prompts = processor()(
        images=[image(56, 28), image(28, 28), image(14, 70)], text=texts, padding=True, return_tensors="pt"
    )
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(gen.generate(**prompts, **options), wrapped.generate(**prompts, **options))
