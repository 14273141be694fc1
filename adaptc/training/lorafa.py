"""Train LoRA with its down projections frozen (LoRA-FA), by an optimizer that follows the gradient of the whole weight.

Zhang et al., arXiv 2308.03303; each step is that of PEFT's ``create_lorafa_optimizer``. The program has LoRA and is
trained through ``program.module()``. A no longer requires grad. Each step moves B as Adam does, by the gradient of B
times (A A^T)^-1 / s^2, where s is the scale. Of all moves of B, this one is nearest to a step of the weight along its
own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError
from adaptc.methods import TokenRows, TrainedParameter
from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.protocol.attachment import Attachment
from adaptc.state.core import ProgramCore
from adaptc.training.program_module import ProgramModule

#: the damping that is added to the diagonal of A A^T, as in PEFT
_DAMPING = 1e-8


def lorafa_optimizer(
    program: ProgramCore | ProgramModule,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    correct_bias: bool = True,
) -> torch.optim.Optimizer:
    """Return an optimizer for the LoRA adapter of a program, or of a module of one, and freeze the adapter's A.

    It is used like any other, in a loop or as ``Trainer(..., optimizers=(optimizer, None))``. Each layer keeps its own
    rank and scale. The adapter's other trainable tensors (whole modules, biases, trainable tokens) get Adam's steps.
    Matmuls run in float32 at least; PEFT rounds them to bfloat16.

    Args:
        program: a program whose adapter is LoRA, or a module of one.
        lr: the learning rate.
        weight_decay: a decay that is decoupled from the steps, as in AdamW.
        betas: the factors of Adam's moving averages.
        eps: the term that keeps Adam's divisor from zero.
        correct_bias: whether the averages are corrected for their beginning.

    Returns:
        the optimizer.

    Raises:
        AdaptcError: the adapter is not LoRA, has DoRA or is not trainable.
        ConfigError: a value is not possible.

    Example:
        >>> module = prog.module()
        >>> optimizer = adaptc.training.lorafa_optimizer(module, lr=1e-3)
        >>> module(x).sum().backward()
        >>> loss = optimizer.step()
    """
    wrong = {
        "lr": lr < 0,
        "weight_decay": weight_decay < 0,
        "eps": eps < 0,
        "betas": any(not 0 <= b < 1 for b in betas),
    }
    options = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "betas": betas}
    if bad := next((n for n, is_wrong in wrong.items() if is_wrong), None):
        raise ConfigError(
            f"lorafa_optimizer: {bad}={options[bad]!r} is not possible; betas lie in [0, 1), others from 0 on"
        )
    core = program.program if isinstance(program, ProgramModule) else program
    binding = program.binding() if isinstance(program, ProgramModule) else program.binding
    pairs, others = _trainable_tensors(core, binding)
    for pair in pairs:
        pair.down.requires_grad_(False)
    return LoraFA(pairs, others, {**options, "correct_bias": correct_bias})


@dataclass(frozen=True)
class LoraFactors:
    """The LoRA factors of one layer: ``down`` is A, ``up`` is B. ``experts``: the number of experts that the factors
    are stacked for; 0 where the layer has none."""

    down: Tensor
    up: Tensor
    scale: Tensor
    experts: int

    def projected_gradient(self) -> Tensor:
        """Return the gradient of B times (A A^T)^-1 / s^2, in B's shape and dtype. A step of B along it moves the
        weight along the weight's own gradient."""
        grad = self.up.grad
        assert grad is not None
        high = torch.promote_types(grad.dtype, torch.float32)
        A, g = self.down.detach().to(high).flatten(1), grad.to(high).flatten(1)
        n = max(self.experts, 1)
        A = A.reshape(n, -1, A.shape[-1])  # the rows of A lie expert by expert
        g = g.reshape(g.shape[0], -1, n).movedim(-1, 0)  # the columns of B lie rank by rank
        damped = A @ A.mT + _DAMPING * torch.eye(A.shape[1], dtype=high, device=A.device)
        new = g @ torch.linalg.pinv(damped, hermitian=True) / self.scale.to(g) ** 2
        return new.movedim(0, -1).reshape(grad.shape).to(grad.dtype)


class LoraFA(torch.optim.Optimizer):
    """A torch optimizer made by :func:`lorafa_optimizer`. Its state for each trainable parameter is two moving averages
    and a step count."""

    def __init__(self, pairs: Iterable[LoraFactors], others: Iterable[Tensor], options: dict[str, Any]) -> None:
        self._factors_by_up = {id(p.up): p for p in pairs}
        super().__init__([*(p.up for p in self._factors_by_up.values()), *others], options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    pair = self._factors_by_up.get(id(p))
                    self._adam_step(p, p.grad if pair is None else pair.projected_gradient(), group)
        return loss

    def _adam_step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (one, two) = self.state[p], group["betas"]
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        mean, square, count = state["exp_avg"], state["exp_avg_sq"], int(state["step"])
        mean.mul_(one).add_(grad, alpha=1 - one)
        square.mul_(two).addcmul_(grad, grad, value=1 - two)
        size = group["lr"]
        if group["correct_bias"]:
            size *= sqrt(1 - two**count) / (1 - one**count)
        p.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        p.mul_(1 - group["lr"] * group["weight_decay"])


def _trainable_tensors(program: ProgramCore, binding: Binding) -> tuple[list[LoraFactors], list[Tensor]]:
    """Return the A and B pairs of a program's LoRA sites, and its other trainable tensors. Raises AdaptcError for an
    adapter that is not LoRA."""
    for part in binding.joint_adapters.values() or [binding]:
        if part.config.peft_type != "LORA":
            raise AdaptcError(
                f"lorafa_optimizer is for LoRA, and the program's adapter is of type {part.config.peft_type or 'none'}:"
                " use an optimizer of torch's"
            )
    pairs: list[LoraFactors] = []
    other_tensors: dict[int, Tensor] = {}
    for a in program.adaptation.attachments:
        method = binding.methods.get(a.id)
        if type(method) is Lora:
            pairs.append(_factors_at(program, binding, a))
        elif method is not None and not isinstance(method, (TrainedParameter, TokenRows)):
            raise AdaptcError(f"lorafa_optimizer is for LoRA, and the adapter at {a.fqn!r} is {method.name}")
        if method is not None:
            other_tensors |= {id(t): t for t in _slot_tensors(binding, a) if t.requires_grad}
    factors = {id(t) for p in pairs for t in (p.down, p.up)}
    return pairs, [t for i, t in other_tensors.items() if i not in factors]


def _factors_at(program: ProgramCore, binding: Binding, attachment: Attachment) -> LoraFactors:
    down, up, *_ = _slot_tensors(binding, attachment)
    if not up.requires_grad:
        raise AdaptcError(f"the adapter at {attachment.key!r} is not trainable: compile it with inference_mode=False")
    op = program.ops[attachment.id]
    if op.groups > 1:
        raise AdaptcError(f"lorafa_optimizer has no meaning at {attachment.fqn!r}, a convolution of {op.groups} groups")
    assert attachment.scale_slot is not None
    return LoraFactors(down, up, binding.values[attachment.scale_slot], op.experts)


def _slot_tensors(binding: Binding, attachment: Attachment) -> Iterator[Tensor]:
    return (binding.values[f] for f in attachment.slots.values())
