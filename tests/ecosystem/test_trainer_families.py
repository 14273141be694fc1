"""transformers' Trainer on models of other kinds: classifiers, images, and losses without a name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

import adaptc
from tests.support.training import arguments, losses

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

WORDS = 61
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24, "intermediate_size": 40}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
LEFT_OUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}


def tokens(i: int, length: int) -> Tensor:
    return torch.randint(2, WORDS, (length,), generator=torch.Generator().manual_seed(i))


def text(i: int) -> dict[str, Any]:
    return {"input_ids": tokens(i, 7), "attention_mask": torch.ones(7, dtype=torch.long)}


def some_labels(i: int, length: int) -> Tensor:
    labels = tokens(100 + i, length)
    labels[: i % 4] = -100
    return labels


def image(i: int) -> Tensor:
    return torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(i))


#: class, config, a row of the data, and what is adapted
CASES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "a loss without a name": (
        GPT2LMHeadModel,
        lambda: GPT2Config(vocab_size=WORDS, n_embd=24, n_layer=2, n_head=4, **LEFT_OUT),
        lambda i: {**text(i), "labels": some_labels(i, 7)},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "classes of texts": (
        BertForSequenceClassification,
        lambda: BertConfig(vocab_size=WORDS, **SIZES),
        lambda i: {**text(i), "labels": i % 3},
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "images": (
        ViTForImageClassification,
        lambda: ViTConfig(image_size=20, patch_size=5, **SIZES),
        lambda i: {"pixel_values": image(i), "labels": i % 3},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
    ),
}


class Rows(torch.utils.data.Dataset):
    def __init__(self, row: Any) -> None:
        self.row = row

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.row(i)


def trained(model: Any, row: Any, folder: Path, **options: Any) -> list[float]:
    args = transformers.TrainingArguments(**arguments(folder, max_steps=3, per_device_train_batch_size=2, **options))
    trainer = transformers.Trainer(model=model, args=args, train_dataset=Rows(row))
    trainer.train()
    return losses(trainer)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_losses_are_pefts(case: str, tmp_path: Path) -> None:
    kind, config, row, options = CASES[case]
    torch.manual_seed(0)
    base = kind(config()).eval()
    module = adaptc.compile(
        copy.deepcopy(base), adaptc.LoraConfig(r=5, lora_alpha=11, **options), training=True
    ).module()
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=5, lora_alpha=11, **options))
    g = torch.Generator().manual_seed(1)
    values = {k: torch.randn(t.shape, generator=g) * 0.1 for k, t in module.state_dict().items()}
    module.load_state_dict(values)
    peft.set_peft_model_state_dict(theirs, dict(values))
    # Where a loss is no mean over labels, Trainer divides nothing for PEFT: one batch a step.
    more = {"gradient_accumulation_steps": 2} if case == "a loss without a name" else {}
    expected = trained(theirs, row, tmp_path / "theirs", **more)
    found = trained(module, row, tmp_path / "ours", **more)
    assert len(set(found)) == 3
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
