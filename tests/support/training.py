"""A small language model with tied weights, one adapter for it, and the same training with PEFT and with adaptc."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import adaptc

VOCABULARY = 97
CONFIG: dict[str, Any] = {
    "r": 5,
    "lora_alpha": 11,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


@functools.cache
def model() -> Any:
    """Not to be changed: every test has the same."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


@functools.cache
def program() -> adaptc.AdaptedProgram:
    return adaptc.compile(model(), adaptc.LoraConfig(**CONFIG), training=True)


@functools.cache
def first_values() -> dict[str, Tensor]:
    """An adapter in PEFT's keys, with no factor at zero."""
    g = torch.Generator().manual_seed(1)
    return {k: torch.randn(t.shape, generator=g) * 0.1 for k, t in program().module().state_dict().items()}


def module(config: dict[str, Any] = CONFIG) -> Any:
    """A module of a program of its own, with :func:`initial_values`."""
    own = program() if config is CONFIG else adaptc.compile(model(), adaptc.LoraConfig(**config), training=True)
    made = copy.deepcopy(own).module()
    made.load_state_dict(first_values())
    return made


@functools.cache
def quantized_program(scheme: str = "nf4") -> adaptc.AdaptedProgram:
    """Not to be changed: a program of the model in bfloat16, with quantised weights and a float32 adapter."""
    base = adaptc.quantize(copy.deepcopy(model()).to(torch.bfloat16), scheme)
    return adaptc.compile(base, adaptc.LoraConfig(**CONFIG), training=True)


def quantized_module(scheme: str = "nf4") -> Any:
    """A module of a program of its own with a quantised base, with :func:`first_values`."""
    made = copy.deepcopy(quantized_program(scheme)).module()
    made.load_state_dict(first_values())
    return made


def peft_model(config: dict[str, Any] = CONFIG) -> Any:
    wrapped = peft.get_peft_model(copy.deepcopy(model()), peft.LoraConfig(**config))
    peft.set_peft_model_state_dict(wrapped, dict(first_values()))
    return wrapped


class Data(torch.utils.data.Dataset):
    """Rows of nine tokens, the first of which have no label in some."""

    def __init__(self, count: int = 24) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(0, VOCABULARY, (9,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[: i % 7] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def batch(rows: int = 3) -> dict[str, Tensor]:
    data = Data()
    return {k: torch.stack([data[i][k] for i in range(rows)]) for k in data[0]}


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """What trainers are told."""
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **more,
    }


def train(
    trained: nn.Module, folder: Path, *, resume: Any = None, callbacks: Any = None, rows: Any = None, **options: Any
) -> tuple[list[float], Any]:
    """The losses of each step that transformers' Trainer takes, and the trainer."""
    args = transformers.TrainingArguments(**arguments(folder, **options))
    data = {"train_dataset": Data() if rows is None else rows, "eval_dataset": Data(7)}
    trainer = transformers.Trainer(model=trained, args=args, callbacks=callbacks, **data)
    trainer.train(resume_from_checkpoint=resume)
    return losses(trainer), trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainable(trained: nn.Module) -> list[nn.Parameter]:
    return [p for p in trained.parameters() if p.requires_grad]


def optimizer_of(trained: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(trained), lr=1e-2)


def check_gradient_checkpointing(program: adaptc.AdaptedProgram, **inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """A module in training, and its gradients of one step: with blocks that are computed again they are the same."""
    grads: list[dict[str, Tensor]] = []
    found: Any = None
    for checkpoints in (False, True):
        found = program.module()
        if checkpoints:
            found.gradient_checkpointing_enable()
        found.train()
        torch.manual_seed(3)
        found(**inputs).loss.backward()
        grads.append({n: p.grad.clone() for n, p in found.named_parameters() if p.grad is not None})
        found.zero_grad()
    assert grads[0]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)
    return found, grads[0]


def steps(
    loss_of: Callable[[], Tensor],
    parameters: list[nn.Parameter],
    count: int,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 1e-2,
) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=lr)
    found = []
    for _ in range(count):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found
