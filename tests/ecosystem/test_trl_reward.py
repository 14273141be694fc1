"""Reward models, which have one number for a text and train without labels."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from adaptc import AdaptcError, LoraConfig, compile
from tests.support.training import CONFIG, VOCABULARY, arguments, losses, model
from tests.support.words import text, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = {**CONFIG, "task_type": "SEQ_CLS"}


def reward_model(**options: Any) -> Any:
    torch.manual_seed(0)
    config = {**model().config.to_dict(), "num_labels": 1, "pad_token_id": VOCABULARY - 3, **options}
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config)).eval()


def run(trained: Any, folder: Path) -> list[float]:
    rng = random.Random(0)
    rows = [{"chosen": text(rng, 3 + i % 4), "rejected": text(rng, 2 + i % 3)} for i in range(24)]
    data = Dataset.from_list(rows)
    args = RewardConfig(**arguments(folder, max_steps=3, bf16=False, gradient_checkpointing=False))
    trainer = RewardTrainer(
        trained, args=args, train_dataset=data, eval_dataset=data.select(range(5)), processing_class=tokenizer()
    )
    trainer.train()
    return [*losses(trainer), trainer.evaluate()["eval_loss"]]


@pytest.mark.long
def test_reward_losses_are_pefts(tmp_path: Path) -> None:
    base = reward_model()
    trained = compile(base, LoraConfig(**OPTIONS), training=True).module()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**OPTIONS))
    values = {k: t + 0.1 * torch.randn(t.shape) for k, t in trained.state_dict().items()}
    trained.load_state_dict(values)
    peft.set_peft_model_state_dict(theirs, dict(values))
    ours, wanted = run(trained, tmp_path), run(theirs, tmp_path)
    assert len(set(ours)) == 4
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted), rtol=1e-5, atol=0)


@pytest.mark.long
def test_another_pad_token_than_the_captured_one_is_refused(tmp_path: Path) -> None:
    """The trainer sets the tokenizer's; by the captured one the program finds the end of a row."""
    trained = compile(reward_model(pad_token_id=5), LoraConfig(**OPTIONS), training=True).module()
    with pytest.raises(AdaptcError, match="pad_token_id is 94, and the program was captured with 5"):
        run(trained, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}]
)
def test_labels_that_are_numbers_may_be_left_out(options: dict[str, Any]) -> None:
    base = reward_model(**options)
    program = compile(base, LoraConfig(**OPTIONS), training=True)
    ids = torch.arange(14).reshape(2, 7)
    labels = torch.ones(2) if options["num_labels"] == 1 else torch.ones(2, 3)
    module = program.module().eval()
    wanted = base(input_ids=ids, labels=labels)
    found = module(input_ids=ids, labels=labels)
    torch.testing.assert_close((found.loss, found.logits), (wanted.loss, wanted.logits))
    without = module(input_ids=ids)
    assert list(without) == ["logits"]
    torch.testing.assert_close(without.logits, wanted.logits)
    assert program(input_ids=ids).loss.isnan()
