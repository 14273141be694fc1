"""Train one method on a task with transformers' Trainer, and time its steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import adaptc
from tests.comparison.task import Row, Task

#: steps at the end whose mean loss is the final loss
_LAST_STEPS = 5


class _Rows(torch.utils.data.Dataset[Row]):
    def __init__(self, task: Task) -> None:
        self.rows = task.train_rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i]


class _Clock(TrainerCallback):
    """A callback that times steps and tells ``progress`` how many are done."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self.seconds: list[float] = []
        self.start, self.progress = 0.0, progress

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.progress(state.global_step)


@dataclass(frozen=True)
class Trained:
    """``parameters``: the number of trained ones; ``step_seconds``: the median; ``final_loss``: of the last steps."""

    parameters: int
    step_seconds: float
    final_loss: float


def make_optimizer(module: nn.Module, head: str, rate: float, head_rate: float | None) -> torch.optim.Optimizer:
    """Return AdamW for an adapter and, at a rate of its own, for the module ``head``; "" where none is trained."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    of_head = [p for name, p in trained.items() if head and head in name.split(".")]
    groups: list[dict[str, Any]] = [{"params": [p for p in trained.values() if all(p is not h for h in of_head)]}]
    if of_head:
        groups.append({"params": of_head, "lr": head_rate})
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)


def train(
    program: adaptc.AdaptedProgram,
    task: Task,
    settings: Mapping[str, Any],
    rate: float,
    folder: str,
    progress: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train the adapter of ``program`` in place. The rate rises in the first tenth of the steps and then falls to 0.

    ``settings``: ``steps``, ``batch``, ``seed`` and ``head_rate``. ``folder``: where Trainer may write.
    """
    module = program.module()
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    arguments = TrainingArguments(
        folder,
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        learning_rate=rate,
        warmup_steps=settings["steps"] // 10,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        seed=settings["seed"],
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    clock = _Clock(progress)
    trainer = Trainer(
        module,
        arguments,
        train_dataset=_Rows(task),
        data_collator=task.collate,
        callbacks=[adaptc.training.trainer_callback(program), clock],
        optimizers=(make_optimizer(module, task.head, rate, settings["head_rate"]), None),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = losses[-_LAST_STEPS:]
    return Trained(parameters, statistics.median(clock.seconds), sum(last) / len(last))
