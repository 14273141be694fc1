"""What happens between the steps of a training: gradients are looked at, and ranks are cut.

Before: a program that trains through ``program.module()``. After each step: an adapter of finite values, and for
AdaLoRA the ranks that its config wants. For loops of one's own there are :func:`check_gradients` and ``RankAllocator``;
for transformers' Trainer :func:`trainer_callback` calls both.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn

from adaptc.errors import AdaptcError, shown
from adaptc.methods.adalora import AdaLoraConfig
from adaptc.program.core import ProgramCore
from adaptc.program.rank_allocator import RankAllocator, orthogonal_loss


def check_gradients(module: nn.Module) -> None:
    """Raises AdaptcError that names the parameters whose gradients are not finite; to be called after ``backward()``
    and before the optimizer's step, which would spoil them for good. Takes one pass over the adapter's gradients."""
    named = [(n, p.grad) for n, p in module.named_parameters() if p.grad is not None]
    if not named:
        return
    sums = torch.stack([g.detach().abs().sum().float().cpu() for _, g in named])
    if not sums.sum().isfinite():
        wrong = [n for (n, g), s in zip(named, sums, strict=True) if not s.isfinite() and not g.isfinite().all()]
        if wrong:
            raise AdaptcError(
                f"the gradients of {len(wrong)} of {len(named)} parameters are not finite: {shown(wrong[:4])}. The "
                "step was not taken, so the adapter is as it was; a smaller learning rate, clipped gradients or "
                "float32 may help"
            )


def trainer_callback(program: ProgramCore) -> Any:
    """A ``transformers.TrainerCallback`` for a Trainer whose model is ``program.module()``.

    Before each step it looks for gradients that are not finite (but for fp16, where the scaler skips such steps), and
    raises AdaptcError with their names. For AdaLoRA it adds ``orthogonal_loss`` to the loss, as PEFT's model does, and
    cuts ranks after each step as :class:`RankAllocator` says; raises as that does when training begins.
    """
    return _kind()(program)


class _Between:
    def __init__(self, program: ProgramCore) -> None:
        self.program = program
        self.allocator: RankAllocator | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.program.binding.config, AdaLoraConfig):
            self.allocator = RankAllocator(self.program)
            kwargs["model"].penalty = partial(orthogonal_loss, self.program)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.fp16:
            check_gradients(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.allocator is not None:
            self.allocator.update_and_allocate(state.global_step)


@cache
def _kind() -> type:
    from transformers import TrainerCallback

    return type("AdapterCallback", (_Between, TrainerCallback), {"__module__": __name__})
