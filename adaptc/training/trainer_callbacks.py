"""Check gradients and cut ranks between the steps of a training.

The program trains through ``program.module()``. After each step the adapter has finite values, and for AdaLoRA the
ranks that its config wants. A loop of one's own calls :func:`check_gradients` and ``RankAllocator``. For transformers'
Trainer, :func:`trainer_callback` calls both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.methods.lora_family.adalora import AdaLoraConfig
from adaptc.methods.sparse.adamss import AdamssConfig
from adaptc.state.core import ProgramCore
from adaptc.training.checkpoints import check_output_dir
from adaptc.training.losses.kasa_loss import kasa_loss
from adaptc.training.losses.monteclora_loss import monteclora_loss
from adaptc.training.rank_allocator import RankAllocator, orthogonal_loss
from adaptc.training.subspace_allocator import SubspaceAllocator


def check_gradients(module: nn.Module, scaler: Any = None) -> None:
    """Raise AdaptcError that names the parameters whose gradients are not finite.

    Call it after ``backward()``. Call it before gradients are clipped, which spreads a bad value to all of them. Call
    it before the optimizer's step, which would spoil the adapter for good. It takes one pass over the adapter's
    gradients.

    Args:
        module: a module that ``program.module()`` made.
        scaler: the ``torch.amp.GradScaler`` of a loop in float16. It leaves out steps whose gradients are not finite,
            and makes its scale smaller. Such gradients are thus an error only once the scale is at most 1, where a
            smaller one cannot help.

    Raises:
        AdaptcError: a gradient is not finite.

    Example:
        >>> module = prog.module()
        >>> module(x).sum().backward()
        >>> adaptc.training.check_gradients(module)
    """
    named = {n: p.grad.detach().abs().sum() for n, p in module.named_parameters() if p.grad is not None}
    if wrong := _find_not_finite(named):
        wrong = [n for n in wrong if not module.get_parameter(n).grad.isfinite().all()]  # type: ignore[union-attr]
    _raise_not_finite(wrong, len(named), scaler)


def _find_not_finite(sums: Mapping[str, Tensor]) -> list[str]:
    if not sums or torch.stack([s.float().cpu() for s in sums.values()]).isfinite().all():
        return []
    return [n for n, s in sums.items() if not s.isfinite()]


def _raise_not_finite(names: Sequence[str], count: int, scaler: Any) -> None:
    if names and (scaler is None or not scaler.is_enabled() or scaler.get_scale() <= 1):
        raise AdaptcError(
            f"the gradients of {len(names)} of {count} parameters are not finite: {short_repr(list(names[:4]))}. The "
            "step was not taken, so the adapter is as it was; a smaller learning rate, clipped gradients or float32 "
            "may help"
        )


def trainer_callback(program: ProgramCore) -> Any:
    """Return a ``transformers.TrainerCallback`` for a Trainer whose model is ``program.module()``.

    Before each step it raises AdaptcError with the names of gradients that are not finite. Where a scaler leaves such
    steps out (fp16), it raises as :func:`check_gradients` says. For AdaLoRA it adds ``orthogonal_loss`` to the loss, as
    PEFT's model does, and cuts ranks after each step as :class:`RankAllocator` says. For KaSA it adds ``kasa_loss``,
    which PEFT leaves to the caller; ``KasaConfig(beta=0, gamma=0)`` adds nothing. For MonteCLoRA it adds
    ``monteclora_loss``. Both are added in training mode alone. For AdaMSS with ``use_asa`` it ends the training of
    clusters as :class:`SubspaceAllocator` says. When training begins it raises as these do, and ConfigError for options
    of the trainer that a program cannot serve.

    Args:
        program: the program that trains.

    Returns:
        the callback, for ``Trainer(..., callbacks=[...])``.

    Example:
        >>> import transformers
        >>> isinstance(adaptc.training.trainer_callback(prog), transformers.TrainerCallback)
        True
    """
    return _callback_class()(program)


#: option of LoraConfig -> the term that its method adds to the loss in training
_LOSS_TERMS: dict[str, Callable[[ProgramCore], Tensor]] = {
    "kasa_config": kasa_loss,
    "monteclora_config": monteclora_loss,
}


class _CallbackHooks:
    def __init__(self, program: ProgramCore) -> None:
        self.program = program
        self.allocator: RankAllocator | SubspaceAllocator | None = None
        self.gradient_sums: dict[str, Tensor] = {}
        self.hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if getattr(args, "predict_with_generate", False) and not getattr(kwargs["model"], "can_recapture", False):
            raise ConfigError(
                "predict_with_generate=True: this module does not generate. Leave it out, or train that of a model "
                "that does, adaptc.compile(model, config, training=True).module()"
            )
        if args.should_save:
            check_output_dir(args.output_dir, state.global_step, state.max_steps)
        if isinstance(self.program.binding.config, AdaLoraConfig):
            self.allocator = RankAllocator(self.program)
            kwargs["model"].extra_loss = partial(orthogonal_loss, self.program)
        elif isinstance(self.program.binding.config, AdamssConfig) and self.program.binding.config.use_asa:
            self.allocator = SubspaceAllocator(self.program)
        configs = [part.config for part in self.program.binding.adapters_by_name.values()]
        terms = [term for option, term in _LOSS_TERMS.items() if any(getattr(c, option, None) for c in configs)]
        if terms:
            kwargs["model"].extra_loss = partial(self.loss_of_methods, kwargs["model"], terms)
        # Trainer clips gradients before it calls back, so each one is summed by a hook when it is accumulated.
        self.remove_hooks()
        for name, p in kwargs["model"].named_parameters():
            if p.requires_grad:
                self.hooks.append(p.register_post_accumulate_grad_hook(partial(self.record_gradient, name)))

    def loss_of_methods(self, model: Any, terms: Sequence[Callable[[ProgramCore], Tensor]]) -> Tensor | float:
        """Return the sum of these terms in training mode, and 0 in evaluation, whose loss is the model's alone."""
        return sum(term(self.program) for term in terms) if model.training else 0.0

    def record_gradient(self, name: str, p: Tensor) -> None:
        if p.grad is not None:
            self.gradient_sums[name] = p.grad.detach().abs().sum()

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.gradient_sums = [], {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove_hooks()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _raise_not_finite(
            _find_not_finite(self.gradient_sums),
            len(self.gradient_sums),
            getattr(kwargs.get("optimizer"), "scaler", None),
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.allocator is not None:
            self.allocator.update_and_allocate(state.global_step)


@cache
def _callback_class() -> type:
    from transformers import TrainerCallback

    return type("AdapterCallback", (_CallbackHooks, TrainerCallback), {"__module__": __name__})
