"""What methods add to the loss of transformers' Trainer, with the callback: in training, and not in evaluation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

import adaptc
from adaptc.training import kasa_loss, monteclora_loss
from tests.support.training import CONFIG, Data, arguments, model

KASA = {"kasa_config": adaptc.KasaConfig(beta=0.2, gamma=0.3)}
#: without noise a call computes what LoRA computes, and the term is what the draws say
MONTECLORA = {"monteclora_config": adaptc.MontecloraConfig(num_samples=3, sample_scaler=0.0, kl_loss_weight=0.1)}
TERMS: dict[str, tuple[Any, Any]] = {"KaSA": (KASA, kasa_loss), "MonteCLoRA": (MONTECLORA, monteclora_loss)}


def losses(program: Any, folder: Path, callbacks: list[Any]) -> tuple[float, float]:
    """The loss of one step that changes nothing, and that of an evaluation."""
    told = transformers.TrainingArguments(
        **{**arguments(folder), "max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "save_strategy": "no"}
    )
    trainer = transformers.Trainer(
        program.module(), told, train_dataset=Data(), eval_dataset=Data(), callbacks=callbacks
    )
    trainer.train()
    (step,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return float(step), trainer.evaluate()["eval_loss"]


@pytest.mark.long
@pytest.mark.parametrize("name", list(TERMS))
@pytest.mark.few(2)
def test_the_callback_adds_the_term_in_training_alone(name: str, tmp_path: Path) -> None:
    options, term = TERMS[name]
    program = adaptc.compile(model(), adaptc.LoraConfig(**{**CONFIG, **options}), training=True)
    plain = losses(program, tmp_path / "plain", [])
    found = losses(program, tmp_path / "found", [adaptc.training.trainer_callback(program)])
    added = term(program).item()  # of what the last call in training drew
    assert abs(added) > 0.1
    assert found[0] - plain[0] == pytest.approx(added, rel=1e-3)
    assert found[1] == pytest.approx(plain[1], rel=1e-6)


@pytest.mark.long
def test_adapters_that_act_together_each_add_theirs() -> None:
    config = adaptc.LoraConfig(**{**CONFIG, **KASA})
    sampled = adaptc.LoraConfig(**{**CONFIG, **MONTECLORA})
    program = adaptc.compile(model(), {"one": config, "two": sampled}, training=True)
    module = program.module().train()
    told = SimpleNamespace(should_save=False, predict_with_generate=False)
    adaptc.training.trainer_callback(program).on_train_begin(told, SimpleNamespace(), None, model=module)
    both = kasa_loss(program) + monteclora_loss(program)
    assert module.extra_loss().item() == pytest.approx(both.item())
    assert monteclora_loss(module).item() == pytest.approx(monteclora_loss(program).item())
