"""TRL trains ``prog.module()`` as it trains PEFT's model, with the program's own base as the reference."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from adaptc import AdaptcError, LoraConfig, compile
from tests.support.training import CONFIG, VOCABULARY, arguments, losses, model, module, peft_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {**{f"w{i}": i for i in range(VOCABULARY - 3)}, "<pad>": VOCABULARY - 3, "<eos>": VOCABULARY - 2}
    inner = Tokenizer(models.WordLevel({**words, "<unk>": VOCABULARY - 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def text(rng: random.Random, words: int) -> str:
    return " " + " ".join(f"w{rng.randrange(VOCABULARY - 3)}" for _ in range(words))


def options(folder: Path) -> dict[str, Any]:
    return arguments(folder, max_steps=4, bf16=False, gradient_checkpointing=False)


def test_supervised_losses_are_pefts(tokenizer: Any, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"prompt": text(rng, 3 + i % 4), "completion": text(rng, 2 + i % 3)} for i in range(24)]

    def run(trained: Any) -> tuple[list[float], list[float]]:
        args = SFTConfig(**options(tmp_path))
        trainer = SFTTrainer(trained, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        return losses(trainer), [e["entropy"] for e in trainer.state.log_history if "entropy" in e]

    ours, theirs = run(module()), run(peft_model())
    assert len(set(ours[0])) == 4
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


def test_preference_losses_are_pefts(tokenizer: Any, tmp_path: Path) -> None:
    rng = random.Random(1)
    kinds = {"prompt": 4, "chosen": 3, "rejected": 2}
    rows = [{name: text(rng, words + i % 3) for name, words in kinds.items()} for i in range(24)]

    def run(trained: Any, reference: Any) -> list[float]:
        data, args = Dataset.from_list(rows), DPOConfig(**options(tmp_path))
        trainer = DPOTrainer(trained, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        return losses(trainer)

    trained = module()
    reference = trained.program.base.module()
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert reference.get_parameter(weight) is trained.get_parameter(weight), "a second model"
    ours, theirs = run(trained, reference), run(peft_model(), copy.deepcopy(model()))
    assert len(set(ours)) == 4
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


def test_a_head_with_an_adapter_has_no_weight_to_give(tokenizer: Any, tmp_path: Path) -> None:
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
