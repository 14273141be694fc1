"""Loops of one's own: accelerate, PEFT's optimizers, AdaLoRA's steps, gradients that are not finite."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from torch.utils.data import DataLoader

import adaptc
from adaptc import AdaptcError
from tests.support.training import (
    Data,
    arguments,
    batch,
    first_values,
    losses,
    model,
    module,
    peft_model,
    steps,
    train,
    trainable,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def accelerated(trained: Any, folder: Path | None = None, *, count: int = 4, resume: bool = False) -> list[float]:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(trainable(trained), lr=1e-2)
    trained, optimizer, loader = accelerator.prepare(trained, optimizer, DataLoader(Data(16), batch_size=4))
    if resume:
        accelerator.load_state(str(folder))
    found = []
    for rows in list(loader)[:count]:
        with accelerator.accumulate(trained):
            loss = trained(**rows).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trainable(trained), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    if folder is not None and not resume:
        accelerator.save_state(str(folder))
    return found


def test_accelerate_trains_it_and_goes_on_from_what_it_saved(tmp_path: Path) -> None:
    torch.testing.assert_close(
        torch.tensor(accelerated(module())), torch.tensor(accelerated(peft_model())), rtol=1e-5, atol=0
    )
    first, second = module(), module()
    accelerated(first, tmp_path, count=2)
    assert (tmp_path / "model.safetensors").stat().st_size < 40_000, "the base was saved"
    before = {k: t.clone() for k, t in first.state_dict().items()}
    accelerated(second, tmp_path, count=0, resume=True)
    assert all(torch.equal(t, before[k]) for k, t in second.state_dict().items())
    assert not torch.equal(next(iter(before.values())), next(iter(first_values().values())))


def test_the_part_that_trains_is_pefts() -> None:
    assert module().get_nb_trainable_parameters() == peft_model().get_nb_trainable_parameters()


def test_an_optimizer_of_peft_takes_it() -> None:
    """LoRA+ has a learning rate of its own for the factors that its names tell."""

    def found(trained: Any) -> list[float]:
        kind = torch.optim.AdamW
        optimizer = create_loraplus_optimizer(model=trained, optimizer_cls=kind, lr=1e-2, loraplus_lr_ratio=4)
        losses = []
        for _ in range(4):
            loss = trained(**batch()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, theirs = found(module()), found(peft_model())
    assert len(set(ours)) == 4
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


ADALORA: dict[str, Any] = {
    "init_r": 6,
    "target_r": 3,
    "lora_alpha": 7,
    "tinit": 1,
    "tfinal": 2,
    "deltaT": 1,
    "total_step": 8,
    "target_modules": ["q_proj", "v_proj"],
}


@pytest.mark.long
def test_adalora_in_a_trainer_is_pefts(tmp_path: Path) -> None:
    """PEFT's model adds the penalty, and its users call update_and_allocate in a callback of their own."""
    prog = adaptc.compile(model(), adaptc.AdaLoraConfig(**ADALORA), training=True)
    torch.manual_seed(5)
    with torch.no_grad():
        for t in prog.binding.values.values():
            if t.requires_grad:
                t.copy_(torch.randn_like(t) * 0.1)
    adaptc.save_adapter(prog, tmp_path / "a")
    theirs = peft.get_peft_model(copy.deepcopy(model()), peft.AdaLoraConfig(**ADALORA, task_type="CAUSAL_LM"))
    trained = prog.module()
    peft.set_peft_model_state_dict(theirs, dict(trained.state_dict()))

    class Allocating(transformers.TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            theirs.base_model.update_and_allocate(state.global_step)

    def run(one: Any, callback: Any) -> Tensor:
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = transformers.Trainer(model=one, args=args, train_dataset=Data(), callbacks=[callback])
        trainer.train()
        return torch.tensor([e["loss"] for e in trainer.state.log_history if "loss" in e])

    ours = run(trained, adaptc.training.trainer_callback(prog))
    torch.testing.assert_close(ours, run(theirs, Allocating()), rtol=1e-4, atol=0)
    pattern = prog.binding.config.rank_pattern  # type: ignore[attr-defined]
    by_peft = theirs.peft_config["default"].rank_pattern
    assert pattern == {k.removesuffix(".default"): mask for k, mask in by_peft.items()}
    assert 0 < sum(sum(mask) for mask in pattern.values()) < 6 * len(pattern)
    trained.save_pretrained(tmp_path / "b")
    loaded = adaptc.compile(model(), tmp_path / "b")
    rows = {k: t for k, t in batch().items() if k != "labels"}
    torch.testing.assert_close(loaded(**rows).logits, trained.eval()(**rows).logits, rtol=1e-4, atol=1e-5)
    assert any(len(t) < 6 for t in trained.state_dict().values()), "cut ranks are in the file"


def spoiled(at: int) -> Any:
    """A module one of whose gradients is not a number from the ``at``-th step on."""
    trained, count = module(), [0]

    def spoil(g: Tensor) -> Tensor:
        count[0] += 1
        return g * float("nan") if count[0] > at else g

    trained.get_parameter("model.layers.1.mlp.down_proj.lora_B.default.weight").register_hook(spoil)
    return trained


@pytest.mark.long
def test_gradients_that_are_not_finite_are_named(tmp_path: Path) -> None:
    trained = spoiled(0)
    before = {k: t.clone() for k, t in trained.state_dict().items()}
    trained(**batch()).loss.backward()
    with pytest.raises(AdaptcError, match=r"1 of 12 parameters.*layers\.1\.mlp\.down_proj\.lora_B"):
        adaptc.training.check_gradients(trained)
    adaptc.training.check_gradients(module())  # has none
    trained, callback = spoiled(2), None
    callback = adaptc.training.trainer_callback(trained.owner)
    with pytest.raises(AdaptcError, match=r"layers\.1\.mlp\.down_proj\.lora_B.*not taken"):
        train(trained, tmp_path, callbacks=[callback], save_strategy="steps", save_steps=1)
    assert all(t.isfinite().all() for t in trained.state_dict().values())
    assert any(not torch.equal(t, before[k]) for k, t in trained.state_dict().items())
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}


def in_float16(trained: Any, scale: float, check: Callable[[Any], None]) -> tuple[list[float], int]:
    """The losses of 20 steps, and how many steps the scaler left out."""
    optimizer = torch.optim.AdamW(trainable(trained), lr=1e-2)
    scaler, found, left_out = torch.amp.GradScaler("cpu", init_scale=scale), [], 0
    for _ in range(20):
        with torch.autocast("cpu", torch.float16):
            loss = trained(**batch()).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        check(scaler)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        left_out += scaler.get_scale() < before
        found.append(loss.item())
    return found, left_out


def test_losses_in_float16_are_pefts() -> None:
    """Logits are rounded to float16, and so is some of what they are made of."""
    ours, theirs = (in_float16(m, 2.0**12, lambda _: None) for m in (module(), peft_model()))
    assert ours[1] == theirs[1] == 0
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=2**-11, atol=0)


def test_a_scaler_may_leave_steps_out() -> None:
    """Adapters' gradients are float32, so fewer of ours are too large than of PEFT's."""
    trained = module()
    found, left_out = in_float16(trained, 2.0**24, lambda scaler: adaptc.training.check_gradients(trained, scaler))
    assert 0 < left_out <= in_float16(peft_model(), 2.0**24, lambda _: None)[1] < 10
    assert found[-1] < found[0] - 0.1
    with pytest.raises(AdaptcError, match="12 of 12 parameters are not finite"):
        in_float16(trained, 2.0**24, lambda _: adaptc.training.check_gradients(trained))
    wrong = spoiled(0)
    with pytest.raises(AdaptcError, match="1 of 12 parameters are not finite"):
        in_float16(wrong, 8.0, lambda scaler: adaptc.training.check_gradients(wrong, scaler))


def scaled(trained: Any, folder: Path, scale: float) -> tuple[list[float], float]:
    """The losses of Trainer as it trains in float16 on a GPU, and the scale at the end. It takes no scaler on a CPU."""
    args = transformers.TrainingArguments(**arguments(folder, fp16=True, max_steps=12))
    callbacks = [adaptc.training.trainer_callback(trained.owner)] if hasattr(trained, "owner") else None
    trainer = transformers.Trainer(model=trained, args=args, train_dataset=Data(), callbacks=callbacks)
    trainer.accelerator.scaler, trainer.accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True
    trainer.train()
    return losses(trainer), trainer.accelerator.scaler.get_scale()


@pytest.mark.long
def test_trainer_goes_on_where_a_scaler_leaves_steps_out(tmp_path: Path) -> None:
    ours, theirs = (scaled(m, tmp_path, 2.0**12) for m in (module(), peft_model()))
    assert ours[1] == theirs[1] == 2.0**12
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=2**-11, atol=0)
    found, scale = scaled(module(), tmp_path, 2.0**22)
    assert scale < 2.0**22
    assert found[4:] != ours[0][4:], "no step was left out"
    trained = spoiled(0)
    with pytest.raises(AdaptcError, match=r"parameters are not finite: .*layers\.1\.mlp\.down_proj\.lora_B"):
        scaled(trained, tmp_path, 8.0)
    assert all(torch.equal(t, first_values()[k]) for k, t in trained.state_dict().items())


@pytest.mark.long
def test_fp16_without_a_scaler_is_looked_at(tmp_path: Path) -> None:
    """On a CPU Trainer takes fp16=True, and trains in float32."""
    trained = spoiled(2)
    with pytest.raises(AdaptcError, match="1 of 12 parameters are not finite"):
        train(trained, tmp_path, callbacks=[adaptc.training.trainer_callback(trained.owner)], fp16=True)
    ours, theirs = (train(m, tmp_path, fp16=True)[0] for m in (module(), peft_model()))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


def test_steps_of_a_loop_are_seen_by_the_program() -> None:
    trained = module()
    steps(lambda: trained(**batch()).loss, trainable(trained), 2)
    rows = {k: t for k, t in batch().items() if k != "labels"}
    torch.testing.assert_close(trained.owner(**rows).logits, trained.eval()(**rows).logits, rtol=1e-5, atol=1e-6)
