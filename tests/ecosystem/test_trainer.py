"""transformers' Trainer takes ``prog.module()`` as it takes PEFT's model: its options, its checkpoints, its losses."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import adaptc
from adaptc import LoraConfig
from tests.support.families import FAMILIES
from tests.support.training import batch, model, module, peft_model, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "several batches a step": {"gradient_accumulation_steps": 3, "max_steps": 3},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "noise on the embeddings": {"neftune_noise_alpha": 5.0},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "clipped gradients": {"max_grad_norm": 0.05},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2},
}


@pytest.mark.long
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_losses_are_pefts(recipe: str, tmp_path: Path) -> None:
    ours, _ = train(module(), tmp_path / "ours", **RECIPES[recipe])
    theirs, _ = train(peft_model(), tmp_path / "theirs", **RECIPES[recipe])
    assert len(ours) >= 2
    assert len(set(ours)) > 1
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}], ids=["", "checkpoints"])
def test_losses_in_bfloat16_are_pefts(more: dict[str, Any], tmp_path: Path) -> None:
    """A logit is off by at most a rounding of bfloat16, 2**-9; a loss is a mean over twenty and more of them."""
    ours, _ = train(module(), tmp_path / "ours", bf16=True, **more)
    theirs, _ = train(peft_model(), tmp_path / "theirs", bf16=True)
    plain, _ = train(module(), tmp_path / "plain")
    assert ours != plain
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2**-11, atol=0)


@pytest.mark.long
def test_checkpoints_are_adapters_and_training_goes_on_from_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole, trainer = train(module(), tmp_path / "ours", **options)
    rest, _ = train(module(), tmp_path / "other", resume=str(tmp_path / "ours" / "checkpoint-4"))
    assert rest == whole, "losses after the checkpoint, to the bit; those before it are in its log"
    _, theirs = train(peft_model(), tmp_path / "theirs", **options)

    folder, by_peft = tmp_path / "ours" / "checkpoint-4", tmp_path / "theirs" / "checkpoint-4"
    saved = {p.name: p.stat() for p in folder.iterdir()}
    assert saved.pop("model.safetensors").st_ino == saved["adapter_model.safetensors"].st_ino, "bytes of its own"
    assert saved.keys() == {p.name for p in by_peft.iterdir()}
    ends = (".md", ".json", "training_args.bin")
    count = [sum(p.stat().st_size for p in f.iterdir() if not p.name.endswith(ends)) for f in (folder, by_peft)]
    assert count[0] - os.stat(folder / "model.safetensors").st_size == count[1]

    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model()), str(folder)).eval()
    adapter = adaptc.compile(model(), str(folder))
    with torch.no_grad():
        torch.testing.assert_close(adapter(**without_labels()).logits, loaded(**without_labels()).logits)
    trainer.model.save_pretrained(tmp_path / "last")
    assert (tmp_path / "last" / "adapter_config.json").is_file()
    assert theirs.state.global_step == trainer.state.global_step == 6


def without_labels() -> dict[str, torch.Tensor]:
    return {k: t for k, t in batch().items() if k != "labels"}


@pytest.mark.long
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trained = module()
    _, trainer = train(trained, tmp_path, load_best_model_at_end=True, learning_rate=3.0, **options)
    best = Path(trainer.state.best_model_checkpoint)
    evaluated = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert evaluated.index(min(evaluated)) + 1 == int(best.name.rpartition("-")[2])
    expected = copy.deepcopy(trained.program)
    adaptc.swap(expected, best)
    assert int(best.name.rpartition("-")[2]) < 6, "the last is the best, and nothing was loaded"
    trained.eval()
    # That rate makes large numbers.
    torch.testing.assert_close(trained(**batch()).logits, expected(**batch()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_metrics_see_what_the_model_gives(tmp_path: Path) -> None:
    def train_one(trained: Any) -> dict[str, float]:
        _, trainer = train(trained, tmp_path, max_steps=2)
        trainer.compute_metrics = lambda p: {"sum": float(abs(p.predictions).sum()), "rows": len(p.label_ids)}
        return trainer.evaluate()

    ours, theirs = train_one(module()), train_one(peft_model())
    assert ours["eval_rows"] == theirs["eval_rows"] == 7
    assert ours["eval_sum"] == pytest.approx(theirs["eval_sum"], rel=1e-5)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_other_families(name: str, tmp_path: Path) -> None:
    base = FAMILIES[name].build()
    names = {"bert": ["query", "value"], "t5": ["q", "v"]}[name]
    config: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": names, "init_lora_weights": False}
    prog = adaptc.compile(base, LoraConfig(**config), training=True)
    ours = prog.module()
    adaptc.save_adapter(prog, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"), is_trainable=True)
    rows = Rows(base.config.vocab_size, 9 if name == "bert" else 7)
    found = [fit(m, rows, tmp_path) for m in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


class Rows(torch.utils.data.Dataset):
    """Nine tokens, and so many labels."""

    def __init__(self, vocabulary: int, labels: int) -> None:
        self.vocabulary, self.labels = vocabulary, labels

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(i)
        ids, labels = (torch.randint(1, self.vocabulary, (n,), generator=g) for n in (9, self.labels))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def fit(trained: Any, rows: Rows, folder: Path) -> torch.Tensor:
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-2,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=3,
    )  # fmt: skip
    trainer = transformers.Trainer(model=trained, args=args, train_dataset=rows)
    trainer.train()
    return torch.tensor([e["loss"] for e in trainer.state.log_history if "loss" in e])
