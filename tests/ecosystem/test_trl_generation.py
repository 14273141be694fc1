"""Trainers that generate while they train do so with ``prog.module()``: the same tokens, rewards and gradients as with
PEFT's model, on the same seed. Their reference is the program's own base, no second model."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.trainer.utils import add_fused_lm_head

import adaptc
from tests.support.training import arguments, first_values, model, module, peft_model
from tests.support.words import text, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def shared() -> Any:
    """One module, which captures what generates once."""
    return module()


@pytest.fixture
def trained(shared: Any) -> Iterator[Any]:
    shared.load_state_dict(first_values())
    forward = vars(shared).get("forward")
    yield shared
    vars(shared).pop("forward", None)  # TRL's
    assert forward is None


def prompts() -> Dataset:
    rng = random.Random(0)
    return Dataset.from_list([{"prompt": text(rng, 3 + i % 4)} for i in range(12)])


def reward(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(ord, c)) % 17 / 7 for c in completions]


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return arguments(folder, max_steps=2, bf16=False, gradient_checkpointing=False, **more)


def logged(trainer: Any, *names: str) -> torch.Tensor:
    trainer.train()
    entries = [[e[n] for n in names] for e in trainer.state.log_history if "loss" in e]
    assert len(entries) == 2
    return torch.tensor(entries)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_grpo_losses_are_pefts(trained: Any, tmp_path: Path) -> None:
    def run(policy: Any) -> torch.Tensor:
        args = GRPOConfig(**options(tmp_path), max_completion_length=5, num_generations=2)
        trainer = GRPOTrainer(
            policy, reward_funcs=reward, args=args, train_dataset=prompts(), processing_class=tokenizer()
        )
        return logged(trainer, "loss", "reward", "entropy", "grad_norm", "num_tokens")

    same(run(trained), run(peft_model()))


@pytest.mark.long
def test_grpo_losses_are_pefts_with_continuous_batching(trained: Any, tmp_path: Path) -> None:
    """Both sides answer under transformers' continuous batching, and draw the same numbers."""

    def run(policy: Any) -> torch.Tensor:
        args = GRPOConfig(
            **options(tmp_path),
            max_completion_length=5,
            num_generations=2,
            use_transformers_continuous_batching=True,
            transformers_continuous_batching_config={"num_blocks": 64, "page_size": 8, "max_batch_tokens": 32},
        )
        trainer = GRPOTrainer(
            policy, reward_funcs=reward, args=args, train_dataset=prompts(), processing_class=tokenizer()
        )
        return logged(trainer, "loss", "reward", "entropy", "grad_norm", "num_tokens")

    same(run(trained), run(peft_model()))


def run_with_reference(trainer_class: Any, args_class: Any, folder: Path, policy: Any, reference: Any) -> torch.Tensor:
    """What a trainer logs whose policy is held near ``reference``, None for the one that PEFT's model has."""
    beta = 0.5 if reference is None else 0.0
    args = args_class(**options(folder), max_completion_length=5, num_generations=2, beta=beta)
    trainer = trainer_class(
        policy, reward_funcs=reward, args=args, train_dataset=prompts(), processing_class=tokenizer()
    )
    if reference is not None:
        add_fused_lm_head(reference, temperature=trainer.temperature)
        trainer.ref_model, trainer.beta = reference, 0.5
    return logged(trainer, "loss", "reward", "kl", "grad_norm")


@pytest.mark.long
def test_rloo_losses_are_pefts_with_the_base_as_the_reference(trained: Any, tmp_path: Path) -> None:
    """PEFT's reference is the adapter as it was, so B is zero here, and it is the base."""
    zero = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in first_values().items()}
    trained.load_state_dict(zero)
    theirs = peft_model()
    peft.set_peft_model_state_dict(theirs, dict(zero))

    kinds = RLOOTrainer, RLOOConfig, tmp_path
    ours = run_with_reference(*kinds, trained, trained.owner.base.module())
    assert ours[1, 2] > 1e-4, "no reference"
    same(ours, run_with_reference(*kinds, theirs, None))


@pytest.mark.long
def test_grpo_losses_are_pefts_with_another_adapter_as_the_reference(trained: Any, tmp_path: Path) -> None:
    """PEFT's reference is the adapter as it was: here that is another adapter on the same weights of the base."""
    kinds = GRPOTrainer, GRPOConfig, tmp_path
    before = adaptc.save_adapter(trained, tmp_path / "before")
    other = copy.copy(trained.owner)
    other.swap(before)
    reference = other.module()
    reference.requires_grad_(False)
    ours = run_with_reference(*kinds, trained, reference)
    assert ours[1, 2] > 1e-4, "no reference"
    same(ours, run_with_reference(*kinds, peft_model(), None))
    policy_places, places = ({n: t.data_ptr() for n, t in m.named_parameters()} for m in (trained, reference))
    adapter = {n for n, t in trained.named_parameters() if t.requires_grad}
    assert {n for n, place in places.items() if place != policy_places[n]} == adapter
    _, sampler = vars(trained)["generator"]  # it wrote the completions
    for tensors in (
        sampler.program.base_tensors,
        {n: t for n, t in sampler.program.binding.values.items() if "lora_" in n},
    ):
        assert len(tensors) > 5
        assert {t.data_ptr() for t in tensors.values()} <= {*policy_places.values()}


@pytest.mark.long
def test_online_dpo_losses_are_pefts(trained: Any, tmp_path: Path) -> None:
    def run(policy: Any, reference: Any) -> torch.Tensor:
        args = OnlineDPOConfig(**options(tmp_path), max_new_tokens=5)
        trainer = OnlineDPOTrainer(
            policy,
            ref_model=reference,
            reward_funcs=reward,
            args=args,
            train_dataset=prompts(),
            processing_class=tokenizer(),
        )
        return logged(trainer, "loss", "logps/chosen", "objective/scores", "grad_norm")

    same(run(trained, trained.owner.base.module()), run(peft_model(), copy.deepcopy(model())))


@pytest.mark.long
def test_kto_losses_are_pefts(trained: Any, tmp_path: Path) -> None:
    def run(policy: Any, reference: Any) -> torch.Tensor:
        trainer = KTOTrainer(
            policy,
            ref_model=reference,
            args=KTOConfig(**options(tmp_path)),
            train_dataset=judged(),
            processing_class=tokenizer(),
        )
        return logged(trainer, "loss", "grad_norm")

    same(run(trained, trained.owner.base.module()), run(peft_model(), copy.deepcopy(model())))


def judged() -> Dataset:
    rng = random.Random(1)
    return Dataset.from_list(
        [{"prompt": text(rng, 4), "completion": text(rng, 3), "label": bool(i % 2)} for i in range(24)]
    )


def pairs() -> Dataset:
    rng = random.Random(1)
    sizes = {"prompt": 4, "chosen": 3, "rejected": 2}
    return Dataset.from_list([{n: text(rng, count + i % 3) for n, count in sizes.items()} for i in range(24)])


def of_dpo(policy: Any, folder: Path, **more: Any) -> Any:
    args = DPOConfig(**options(folder))
    return DPOTrainer(policy, args=args, train_dataset=pairs(), processing_class=tokenizer(), **more)


def of_kto(policy: Any, folder: Path) -> Any:
    args = KTOConfig(**options(folder))
    return KTOTrainer(policy, args=args, train_dataset=judged(), processing_class=tokenizer())


def of_rloo(policy: Any, folder: Path, **more: Any) -> Any:
    args = RLOOConfig(**options(folder), num_generations=2, **more)
    return RLOOTrainer(policy, args=args, reward_funcs=reward, train_dataset=prompts(), processing_class=tokenizer())


def of_grpo(policy: Any, folder: Path) -> Any:
    args = GRPOConfig(**options(folder), num_generations=2, beta=0.5)
    return GRPOTrainer(policy, args=args, reward_funcs=reward, train_dataset=prompts(), processing_class=tokenizer())


def of_online_dpo(policy: Any, folder: Path) -> Any:
    args = OnlineDPOConfig(**options(folder))
    return OnlineDPOTrainer(
        policy, args=args, reward_funcs=reward, train_dataset=prompts(), processing_class=tokenizer()
    )


def told(make: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(OSError):  # there is no such model to load
            make()
    return [str(w.message) for w in caught if issubclass(w.category, adaptc.AdaptcWarning)]


@pytest.mark.parametrize("make", [of_dpo, of_kto, of_rloo, of_grpo, of_online_dpo])
def test_a_second_model_is_told_of_before_it_is_there(make: Any, trained: Any, tmp_path: Path) -> None:
    said = told(lambda: make(trained, tmp_path))
    assert len(said) == 1
    assert "second model" in said[0] or "copy the whole model" in said[0]
    assert "prog.base.module()" in said[0]


def test_nothing_is_told_where_there_is_no_second_model(trained: Any, tmp_path: Path) -> None:
    reference = trained.owner.base.module()
    assert told(lambda: of_dpo(trained, tmp_path, ref_model=reference)) == []
    vars(trained).pop("forward")
    assert told(lambda: of_rloo(trained, tmp_path, beta=0.0)) == []
    vars(trained).pop("forward")
    assert told(lambda: trained.dtype) == told(lambda: copy.deepcopy(trained)) == []
