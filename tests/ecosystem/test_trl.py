"""TRL trains ``prog.module()`` as it trains PEFT's model, with the program's own base as the reference."""

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
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from adaptc import AdaptcError, LoraConfig, compile
from tests.support.training import CONFIG, arguments, losses, model, module, peft_model
from tests.support.words import text, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


def options(folder: Path) -> dict[str, Any]:
    return arguments(folder, max_steps=4, bf16=False, gradient_checkpointing=False)


def supervised(trained: Any, folder: Path, rows: list[dict[str, str]]) -> tuple[list[float], list[float]]:
    data, args = Dataset.from_list(rows), SFTConfig(**options(folder))
    trainer = SFTTrainer(trained, args=args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    return losses(trainer), [e["entropy"] for e in trainer.state.log_history if "entropy" in e]


@pytest.mark.long
def test_supervised_losses_are_pefts(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"prompt": text(rng, 3 + i % 4), "completion": text(rng, 2 + i % 3)} for i in range(24)]

    ours, theirs = (supervised(trained, tmp_path, rows) for trained in (module(), peft_model()))
    assert len(set(ours[0])) == 4
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_preference_losses_are_pefts(dropout: float, tmp_path: Path) -> None:
    """TRL turns layers of dropout off unless it is told otherwise."""
    config = {**CONFIG, "lora_dropout": dropout} if dropout else CONFIG
    rng = random.Random(1)
    kinds = {"prompt": 4, "chosen": 3, "rejected": 2}
    rows = [{name: text(rng, words + i % 3) for name, words in kinds.items()} for i in range(24)]

    def run(trained: Any, reference: Any) -> list[float]:
        data, args = Dataset.from_list(rows), DPOConfig(**options(tmp_path))
        trainer = DPOTrainer(trained, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer())
        trainer.train()
        return losses(trainer)

    trained = module(config)
    reference = trained.program.base.module()
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert reference.get_parameter(weight) is trained.get_parameter(weight), "a second model"
    ours, theirs = run(trained, reference), run(peft_model(config), copy.deepcopy(model()))
    assert len(set(ours)) == 4
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_trained_itself(tied: bool, tmp_path: Path) -> None:
    """TRL multiplies with the weight that trains, as with PEFT's."""
    torch.manual_seed(4)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**model().config.to_dict(), "tie_word_embeddings": tied})
    ).eval()
    config = {**CONFIG, "modules_to_save": ["lm_head", "embed_tokens"]}
    trained = compile(base, LoraConfig(**config), training=True).module()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    values = {k: t + 0.01 * torch.randn(t.shape) for k, t in trained.state_dict().items()}
    trained.load_state_dict(values)
    peft.set_peft_model_state_dict(theirs, dict(values))
    rng = random.Random(0)
    rows = [{"prompt": text(rng, 3 + i % 4), "completion": text(rng, 2 + i % 3)} for i in range(24)]
    before = trained.get_output_embeddings().weight.clone()
    ours, wanted = (supervised(m, tmp_path, rows) for m in (trained, theirs))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted), rtol=1e-5, atol=0)
    assert (trained.get_output_embeddings().weight - before).abs().max() > 1e-3, "the head did not train"


@pytest.mark.long
def test_a_head_with_an_adapter_has_no_weight_to_give(tmp_path: Path) -> None:
    """TRL would multiply with the base's weight, and train something else than was asked for."""
    untied = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**model().config.to_dict(), "tie_word_embeddings": False})
    ).eval()
    config = LoraConfig(**{**CONFIG, "target_modules": ["q_proj", "lm_head"]})
    trained = compile(untied, config, training=True).module()
    with pytest.raises(AdaptcError, match="output layer 'lm_head' has an adapter"):
        trained.get_output_embeddings()
    with pytest.raises(AdaptcError, match="output layer 'lm_head' has an adapter"):
        _ = trained.base_model
