"""Train one adapter of a bank: its parameters, optimizer, scheduler, clipping and number of steps.

A step needs gradients, which calls of the bank leave on the parameters. It is skipped where they are not finite, and
then nothing of the adapter, its optimizer or its scheduler changes.

What a run needs to go on is a file beside the adapter's PEFT directory. It has the parameters as they are, since not
every method's file gives them back to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from adaptc.adapter_files.atomic_write import explain_write_errors, fsync_file, move_keeping_mode, open_stage
from adaptc.adapter_files.safe_torch_save import open_for_torch_save
from adaptc.bank.training.step_report import StepResult
from adaptc.binding.binding import Binding
from adaptc.errors import CheckpointError, ConfigError, listing, short_repr
from adaptc.state.values import Constraints
from adaptc.torch_typing import is_dict, is_mapping

#: the keys of :meth:`AdapterTrainer.state_dict`
STATE_KEYS = ("parameters", "optimizer", "scheduler", "steps")
#: the file in an adapter's directory
TRAINING_STATE_NAME = "training_state.pt"
_FORMAT = 1


@dataclass(frozen=True)
class TrainingOptions:
    """Options of the training of one adapter. Raises ConfigError for a value of another kind.

    ``optimizer``: a function of a list of parameters that gives an optimizer; None for AdamW with torch's defaults.
    ``scheduler``: a function of the optimizer that gives a scheduler; None for none. ``max_grad_norm``: the norm to
    which gradients are clipped; None for no clipping.
    """

    optimizer: Callable[[list[Tensor]], Any] | None = None
    scheduler: Callable[[Any], Any] | None = None
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name, of in (("optimizer", "a list of parameters"), ("scheduler", "the optimizer")):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise ConfigError(
                    f"{name}={short_repr(given)} must be a function of {of}, such as "
                    "optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4), for each adapter has its own"
                )
        norm: Any = self.max_grad_norm  # callers may give anything
        if norm is None:
            return
        if isinstance(norm, bool) or not isinstance(norm, Real) or not isfinite(norm) or norm <= 0:
            raise ConfigError(f"max_grad_norm={short_repr(norm)} must be a positive number, or None for no clipping")

    def overridden_by(self, other: TrainingOptions) -> TrainingOptions:
        """Return the options of ``other``, and of these where it has none."""
        norm = self.max_grad_norm if other.max_grad_norm is None else other.max_grad_norm
        return TrainingOptions(other.optimizer or self.optimizer, other.scheduler or self.scheduler, norm)


class AdapterTrainer:
    """One adapter in training.

    ``parameters``: FQN -> each tensor that trains, once. ``optimizer`` and ``scheduler``: torch's, None for no
    scheduler. ``steps``: how many steps were taken.
    """

    def __init__(self, name: str, binding: Binding, options: TrainingOptions, constraints: Constraints) -> None:
        self.name, self.binding, self.options = name, binding, options
        self._constraints = constraints
        self.parameters = _distinct((n, t) for n, t in binding.values.items() if t.requires_grad)
        if not self.parameters:
            raise ConfigError(
                f"adapter {name!r} has no parameter that trains ({binding.config.peft_type}): a bank that trains "
                "takes adapters with parameters"
            )
        make = options.optimizer or torch.optim.AdamW
        given: Any = make([*self.parameters.values()])  # the caller's function may give anything
        if not isinstance(given, Optimizer):
            raise ConfigError(f"optimizer= of adapter {name!r} gave {short_repr(given)}, which is no torch optimizer")
        self.optimizer: Optimizer = given
        self._check_optimizer()
        self.scheduler: Any = None if options.scheduler is None else options.scheduler(given)
        if self.scheduler is not None and not (
            hasattr(self.scheduler, "step") and hasattr(self.scheduler, "get_last_lr")
        ):
            raise ConfigError(
                f"scheduler= of adapter {name!r} gave {short_repr(self.scheduler)}, which has no step() and "
                "get_last_lr(): give one of torch.optim.lr_scheduler. ReduceLROnPlateau is stepped by its caller"
            )
        self.steps = 0

    def _check_optimizer(self) -> None:
        own = {id(t) for t in self.parameters.values()}
        named = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not named <= own:
            raise ConfigError(
                f"optimizer= of adapter {self.name!r} has {len(named - own)} tensors that are not the adapter's: it "
                "would change others. Make it of the list that the function gets"
            )

    # -- gradients and steps -------------------------------------------------------------------------------------------

    @property
    def gradients(self) -> list[Tensor]:
        """Return the gradients that calls have left since the last step."""
        return [t.grad for t in self.parameters.values() if t.grad is not None]

    def add_gradients(self, gradients: Iterable[Tensor | None]) -> None:
        """Add to the gradients, given in the order of :attr:`parameters`; None adds nothing."""
        for p, g in zip(self.parameters.values(), gradients, strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for t in self.parameters.values():
            t.grad = None

    def constrain(self) -> None:
        """Hold the parameters to the constraints of their methods, where gradients are on."""
        self._constraints.enforce(self.binding.values.__getitem__)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Return the learning rate of each group of parameters."""
        return tuple(float(group["lr"]) for group in self.optimizer.param_groups)

    def step(self) -> StepResult:
        """Clip the gradients, take a step of the optimizer and then of the scheduler, and drop the gradients.

        Where the norm of the gradients is not finite, they are dropped, nothing else changes, and the result tells why.
        """
        gradients, rates = self.gradients, self.learning_rates
        norm = get_total_norm(gradients)
        if not bool(norm.isfinite()):
            wrong = [n for n, t in self.parameters.items() if t.grad is not None and not bool(t.grad.isfinite().all())]
            self.zero_grad()
            why = f"the gradients of {listing(map(repr, wrong), 2)} are not finite" if wrong else "the norm overflows"
            return StepResult(self.name, self.steps, float(norm), rates, why)
        if self.options.max_grad_norm is not None:
            clip_grads_with_norm_(self.parameters.values(), self.options.max_grad_norm, norm)
        try:
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        except Exception as error:
            error.add_note(f"It is the optimizer or the scheduler of adapter {self.name!r} of the bank.")
            raise
        self.steps += 1
        self.zero_grad()
        return StepResult(self.name, self.steps, float(norm), rates)

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on: the parameters by FQN, and the states of optimizer and scheduler."""
        return {
            "parameters": {n: t.detach() for n, t in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "steps": self.steps,
        }

    def check_state(self, state: Any, source: str) -> None:
        """Raise CheckpointError for a state that is not of an adapter with these parameters and a scheduler or none."""
        if not is_mapping(state) or set(state) != set(STATE_KEYS):
            raise CheckpointError(
                f"{source} holds no state of an adapter in training: expected {', '.join(STATE_KEYS)}"
            )
        found: Any = state["parameters"]
        shapes = {n: tuple(t.shape) for n, t in self.parameters.items()}
        theirs: dict[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in found.items()} if is_mapping(found) else {}
        if wrong := [n for n in {**shapes, **theirs} if shapes.get(n) != theirs.get(n)]:
            raise CheckpointError(
                f"{source}: {wrong[0]!r} has shape {theirs.get(wrong[0])} there, and {shapes.get(wrong[0])} in adapter "
                f"{self.name!r}: the state is of another adapter"
            )
        if (state["scheduler"] is None) != (self.scheduler is None):
            has = "no scheduler" if state["scheduler"] is None else "a scheduler"
            raise CheckpointError(f"{source} was written with {has}: load it with the same, scheduler=...")

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Take over a state that :meth:`state_dict` gave. Raises CheckpointError for one that does not fit."""
        self.check_state(state, source)
        try:
            self.optimizer.load_state_dict(dict(state["optimizer"]))
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{source} was written with another optimizer or scheduler than adapter {self.name!r} has now: {error}"
            ) from error
        with torch.no_grad():
            for name, t in self.parameters.items():
                t.copy_(state["parameters"][name])
        self.steps = int(state["steps"])


def _distinct(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return each tensor once, under its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, t in named:
        found.setdefault(id(t), (name, t))
    return dict(found.values())


def write_training_state(directory: Path, write_adapter: Callable[[], Path], state: Mapping[str, Any]) -> Path:
    """Write an adapter's ``directory`` with ``write_adapter``, and ``state`` into it; returns the directory.

    The state is written first, beside the directory, so that the adapter is replaced only where there is room for both.
    Raises CheckpointError where the place cannot be written, and then nothing there has changed.
    """
    with explain_write_errors(directory), open_stage(directory.parent) as stage:
        new = stage / TRAINING_STATE_NAME
        with open_for_torch_save(new) as file:
            torch.save({"format": _FORMAT, "state": dict(state)}, file)
        fsync_file(new)
        made = write_adapter()
        move_keeping_mode(new, made / TRAINING_STATE_NAME)
    return made


def read_training_state(directory: str | os.PathLike[str], device: torch.device) -> tuple[Mapping[str, Any], str]:
    """Return the state in an adapter's directory, with its tensors on ``device``, and the path of the file.

    Nothing in the file is executed. Raises CheckpointError where there is none, or it is damaged.
    """
    path = Path(directory) / TRAINING_STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: bank.save_state writes it beside the adapter. bank.add takes a directory without "
            "it, and begins with a new optimizer"
        )
    try:
        found: Any = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # unpickling forged bytes raises anything
        raise CheckpointError(f"{path} is damaged, or holds more than tensors and numbers: {error}") from error
    if not is_dict(found) or found.get("format") != _FORMAT or not is_dict(found.get("state")):
        raise CheckpointError(f"{path} is no state of an adapter in training of format {_FORMAT}")
    return found["state"], str(path)
