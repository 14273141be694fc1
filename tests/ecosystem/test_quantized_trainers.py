"""transformers' Trainer and TRL's SFTTrainer train on a quantised base, and go on from what they saved."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import adaptc
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from tests.support.training import CONFIG, arguments, first_values, losses, model, quantized_module, train
from tests.support.words import text, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

#: with what a run on a quantised base is usually told
OPTIONS: dict[str, Any] = {
    "bf16": True,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_grad_norm": 0.5,
}


def module_on_bitsandbytes(path: Path) -> Any:
    """Return a module on the model as transformers loads it with bitsandbytes, whose config says so."""
    model().save_pretrained(path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    assert isinstance(base.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    made = adaptc.compile(base, adaptc.LoraConfig(**CONFIG), training=True).module()
    made.load_state_dict(first_values())
    return made


def check_trained(trainer: Any, found: list[float]) -> None:
    """The loss fell, evaluation ran, and the optimizer has the adapter's parameters and no others."""
    trained = trainer.model
    assert min(found[-2:]) < found[0]
    ours = {id(p) for p in trained.parameters() if p.requires_grad}
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == ours
    assert {p.dtype for p in trained.parameters() if p.requires_grad} == {torch.float32}
    assert sum(isinstance(p, QuantizedTensor) for p in trained.parameters()) == 14
    assert all(p.grad is None for p in trained.parameters() if not p.requires_grad)


@pytest.mark.long
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("source", ["nf4", "int8", "bitsandbytes"])
def test_a_trainer_trains_and_goes_on_from_a_checkpoint(source: str, checkpoints: bool, tmp_path: Path) -> None:
    def made() -> Any:
        return module_on_bitsandbytes(tmp_path / "model") if source == "bitsandbytes" else quantized_module(source)

    options = {**OPTIONS, "gradient_checkpointing": checkpoints}
    found, trainer = train(made(), tmp_path / "one", save_strategy="steps", save_steps=2, **options)
    check_trained(trainer, found)
    assert [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e][2] > 0
    files = {p.name for p in (tmp_path / "one" / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= files
    adapter = sum(t.nbytes for t in first_values().values())
    assert (tmp_path / "one/checkpoint-4/adapter_model.safetensors").stat().st_size < adapter + 10_000
    rest, other = train(made(), tmp_path / "other", resume=str(tmp_path / "one" / "checkpoint-4"), **options)
    assert rest == found, "to the bit"
    state = trainer.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in other.model.state_dict().items())


@pytest.mark.long
@pytest.mark.parametrize("checkpoints", [False, True])
def test_an_sft_trainer_trains_and_goes_on(checkpoints: bool, tmp_path: Path) -> None:
    rng = random.Random(0)
    data = Dataset.from_list([{"prompt": text(rng, 3 + i % 4), "completion": text(rng, 2 + i % 3)} for i in range(8)])

    def run(folder: Path, resume: Path | None = None) -> tuple[list[float], Any]:
        more: dict[str, Any] = {"max_steps": 8, "bf16": True, "gradient_checkpointing": checkpoints}
        args = SFTConfig(**arguments(folder, **{**more, "save_strategy": "steps", "save_steps": 4}))
        trainer = SFTTrainer(quantized_module(), args=args, train_dataset=data, processing_class=tokenizer())
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return losses(trainer), trainer

    found, trainer = run(tmp_path / "one")
    check_trained(trainer, found)
    rest, _ = run(tmp_path / "other", tmp_path / "one" / "checkpoint-4")
    assert rest == found, "to the bit"


@pytest.mark.long
def test_a_trainer_takes_a_quantised_model_of_ours(tmp_path: Path) -> None:
    """transformers refuses to train purely quantised models, which one with an adapter is not."""
    found, trainer = train(quantized_module(), tmp_path, max_steps=4, bf16=True)
    check_trained(trainer, found)
