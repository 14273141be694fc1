"""Poly: y' = y + s x A_t B_t; a router mixes A_t and B_t of skills for the task t of a row (Ponti et al., arXiv
2202.13914).

With several splits (MHR, Caccia et al., 2211.03831) inputs and outputs are cut into equal stretches, each with a mix of
its own. The weights of a mix are sigmoids of the router's logits, divided by their sum. In training they are drawn from
a relaxed Bernoulli distribution of these logits, with the random numbers that PEFT draws from the same seed. s is one
over the rank.

Slots: ``poly_lora_A`` (splits, skills, in / splits, r), ``poly_lora_B`` (splits, skills, r, out / splits) and
``poly_router.module_logits`` (tasks, splits, skills). PEFT's files have the logits as (tasks, splits * skills). The
program takes one more input, ``task_ids`` (batch,), int64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import CheckpointError, ConfigError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_integers
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.coefficients import ExtraInput, ExtraValues
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.extra_inputs import ExtraInputs
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.size_rule import SizeRule

A, B, LOGITS, TASKS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits", "task_ids"
_EPSILON = 1e-12


@dataclass
class PolyConfig(TargetedConfig):
    """PEFT's ``PolyConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        poly_type: "poly", the only kind.
        n_tasks: the number of tasks; calls take ``task_ids`` (batch,).
        n_skills: the number of LoRA adapters in a layer, which the tasks mix.
        n_splits: the number of parts of a layer that are mixed separately.

    Example:
        >>> config = adaptc.PolyConfig(r=8, n_tasks=3, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "POLY"

    r: int = 8
    init_weights: bool = True
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {name: getattr(self, name) for name in ("r", "n_tasks", "n_skills", "n_splits")}
        check_integers(self, sizes)
        if self.poly_type != "poly":
            raise ConfigError(f"PolyConfig.poly_type={self.poly_type!r} is not known; there is 'poly' alone")

    def method(self, name: str, kind: str) -> Poly:
        return Poly(self.r, self.n_skills, self.n_tasks, self.n_splits, self.init_weights)


class PolyFiles(FileFormat):
    method: Poly

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = dict(found)
        if LOGITS in values:
            logits = values[LOGITS]
            if logits.ndim != 2 or logits.shape[1] % self.method.splits:
                raise CheckpointError(
                    f"{LOGITS!r} has shape {tuple(logits.shape)}; expected a matrix with a multiple of "
                    f"n_splits={self.method.splits} columns"
                )
            values[LOGITS] = logits.unflatten(1, (self.method.splits, -1))
        return values

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        return {n: t.flatten(1) if n == LOGITS else t for n, t in slots.items()}


class PolyInputs(ExtraInputs):
    method: Poly

    def extras(self) -> Mapping[str, ExtraInput]:
        return {TASKS: ExtraInput(torch.int64)}

    def check_inputs(self, slots: Slots, given: ExtraValues) -> str:
        tasks = slots[LOGITS].shape[0]
        found = [int(t) for t in given[TASKS].unique() if not 0 <= t < tasks]
        return f"{TASKS} has {found[0]}, and the adapter has tasks from 0 to {tasks - 1}" if found else ""


@dataclass(frozen=True)
class Poly(Method):
    """Poly at one site. ``scheme`` False: the first values of B are random, too."""

    name: ClassVar[str] = "poly"
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"skills", "tasks"}
    takes_complex: ClassVar[bool] = False  # the router's probabilities are real numbers
    files = PolyFiles(names=(A, B, LOGITS))
    sizes = SizeRule(exact=True, rank_axes={A: 3})
    extra_inputs = PolyInputs()

    r: int = 8
    skills: int = 4
    tasks: int = 1
    splits: int = 1
    scheme: bool = True
    training: bool = False

    def slots(self, op: Op) -> dict[str, Slot]:
        if op.kind not in ("linear", "addmm") or not op.callable:
            raise TargetError(
                f"Poly mixes what a row's task adds to a linear layer, and this weight is one of kind {op.kind!r}; "
                "leave it out"
            )
        out, inputs = op.matrix_shape
        n, k = self.splits, self.skills
        if inputs % n or out % n:
            raise TargetError(
                f"Poly with n_splits={n} cuts the {inputs} inputs and the {out} outputs of a layer into as many equal "
                "stretches, and they do not divide; choose another n_splits, or leave it out"
            )
        return {
            A: Slot((n, k, inputs // n, self.r), free=(1, 3), apart=True),
            B: Slot((n, k, self.r, out // n), free=(1, 2), apart=True),
            LOGITS: Slot((self.tasks, n, k), free=(0, 2), apart=True),
        }

    def scale(self, op: Op) -> float:
        return 1 / self.r

    def rewrap(self, inner: Poly) -> Poly:
        """Return ``inner``, the method at another layer of the adapter, with the number of splits of this layer.

        It serves a layer that the adapter lacks: its identity must have as many tasks as the adapter.
        """
        return replace(inner, splits=self.splits)

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        source = torch.device("cpu") if generator is None else generator.device
        shapes = {n: s.shape for n, s in self.slots(op).items()}
        values = {n: torch.zeros(shape, device=source) for n, shape in shapes.items()}
        for name in (A,) if self.scheme else (A, B):
            skills = [values[name][i, k] for k in range(self.skills) for i in range(self.splits)]
            for one in skills:  # in PEFT's order, and as it draws them
                drawn = torch.empty(one.T.shape, device=source)
                one.copy_(torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator).T)
        torch.nn.init.uniform_(values[LOGITS], -1e-3, 1e-3, generator=generator)
        return InitialValues({n: t.to(W.device, dtype) for n, t in values.items()})

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        a = slots[A]
        # A layer tested without a program has no task_ids: it gets the first task.
        tasks = slots[TASKS] if TASKS in slots else torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device)
        mix = self._skill_weights(torch.index_select(slots[LOGITS], 0, tasks))
        down = torch.einsum("bqs,qsdr->bqdr", mix, a).flatten(1, 2)
        up = torch.einsum("bqs,qsrd->brqd", mix, slots[B]).flatten(2)
        rows = cast(x, a.dtype)
        rows = rows if x.ndim == 3 else rows.reshape(tasks.shape[0], -1, op.in_features)
        return cast(y + (rows @ down @ up).reshape(y.shape) * scale, y.dtype)

    def _skill_weights(self, logits: Tensor) -> Tensor:
        """Return the weight of each skill, (batch, splits, skills), for ``logits`` of the same shape."""
        if self.training:
            # eval() switches off the dropout ops of a program and nothing else, so a dropout of 1.0 shows the mode: it
            # gives zeros in training. In eval mode it gives ones, and no noise is added.
            still = F.dropout(torch.ones_like(logits), 1.0, training=True)
            eps = torch.finfo(logits.dtype).eps
            drawn = torch.rand_like(logits).clamp(eps, 1 - eps)
            logits = logits + torch.where(still > 0, 0.0, drawn.log() - (-drawn).log1p())
        chosen = torch.sigmoid(logits)
        return chosen / (chosen.sum(-1, keepdim=True) + _EPSILON)

    def check_merge(self, op: Op) -> str | None:
        return "Poly adds to a row what its task chooses, which no weight can"
