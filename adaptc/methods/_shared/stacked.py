"""Apply a method to a weight that stacks the matrices of experts: once per expert.

Slots are the method's own with an axis of experts in front; slots that all sites share stay shared. Of other libraries
only LoRA has files with adapters of stacked experts, and LoRA defines its own layout for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptc.errors import CheckpointError
from adaptc.methods._shared.registry import method_from_dict
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Initial, Method, Scale, Slot, Slots
from adaptc.passes.protocol.method_hooks import SiteDescription


@dataclass(frozen=True)
class PerExpertMethod(Method):
    """The method ``inner`` at each expert of a weight (experts, out, in)."""

    name: ClassVar[str] = "stacked"
    stacks: ClassVar[bool] = True

    inner: Method = dataclasses.field(default_factory=Method)

    @classmethod
    def wrap(cls, inner: Method) -> PerExpertMethod:
        return cls(inner)

    def rank(self) -> int | None:
        return self.inner.rank()

    def with_rank(self, op: Op, rank: int) -> Any:
        inner = self.inner.with_rank(self.expert_op(op), rank)
        return None if inner is None else replace(self, inner=inner)

    def moves_base(self) -> bool:
        return self.inner.moves_base()

    @property
    def replaces(self) -> bool:  # type: ignore[override]  # a class has one answer, this one has its method's
        return self.inner.replaces

    @property
    def row_wise(self) -> bool:  # type: ignore[override]
        return self.inner.row_wise

    @property
    def takes_complex(self) -> bool:  # type: ignore[override]
        return self.inner.takes_complex

    def lineage(self) -> Any:
        return self.inner.lineage()

    def has_weight(self) -> bool:
        return self.inner.has_weight()

    def check_merge(self, op: Op) -> str | None:
        return self.inner.check_merge(self.expert_op(op))

    def in_place(self) -> bool:
        return self.inner.in_place()

    def inner_path(self, rest: str) -> str | None:
        return self.inner.inner_path(rest)

    def options(self) -> dict[str, Any]:
        return {"method": self.inner.name, "options": self.inner.options()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        return cls(method_from_dict(options))

    def structure(self) -> dict[str, Any]:
        return {"method": self.inner.name, **self.inner.structure()}

    @staticmethod
    def expert_op(op: Op) -> Op:
        """Return the op of one expert's weight."""
        return Op("weight", op.shape[1:])

    def slots(self, op: Op) -> dict[str, Slot]:
        def stack(s: Slot) -> Slot:
            return replace(s, shape=(op.experts, *s.shape), free=tuple(i + 1 for i in s.free))

        return {n: s if s.shared else stack(s) for n, s in self.inner.slots(self.expert_op(op)).items()}

    def _stack_experts(self, op: Op, experts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        shared = {n for n, s in self.inner.slots(self.expert_op(op)).items() if s.shared}
        return {n: t if n in shared else torch.stack([p[n] for p in experts]) for n, t in experts[0].items()}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Initial:
        parts = [self.inner.init(self.expert_op(op), w, dtype, generator) for w in W]
        bases = [p.base for p in parts if p.base is not None]
        return Initial(self._stack_experts(op, [p.slots for p in parts]), torch.stack(bases) if bases else None)

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return self._stack_experts(op, [self.inner.identity(self.expert_op(op), w, dtype) for w in W])

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        parts = [self._expert_slots(op, found, i) for i in range(op.experts)]
        each = self.expert_op(op)
        return self._stack_experts(op, [self.inner.derived(each, w, dtype, p) for w, p in zip(W, parts, strict=True)])

    def absent(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return self._stack_experts(op, [self.inner.absent(self.expert_op(op), w, dtype) for w in W])

    def minimal(self, op: Op) -> Method:
        return replace(self, inner=self.inner.minimal(self.expert_op(op)))

    def rebind(self, config: Any, place: SiteDescription) -> Method:
        return replace(self, inner=self.inner.rebind(config, place))

    def of_model(self, op: Op) -> dict[str, Any]:
        return self.inner.of_model(self.expert_op(op))

    def at(self, op: Op) -> Method:
        return replace(self, inner=self.inner.at(self.expert_op(op)))

    def following(self, home: str) -> Method | None:
        return None  # experts are tied to no embedding

    def shares(self) -> bool:
        return self.inner.shares()

    def unwrap(self, op: Op) -> tuple[Method, Op]:
        return self.inner, self.expert_op(op)

    def rewrap(self, inner: Method) -> Method:
        return replace(self, inner=inner)

    def keys(self, op: Op) -> list[str]:
        return self.inner.keys(self.expert_op(op))

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        each = self.expert_op(op)
        shared = {n for n, s in self.inner.slots(each).items() if s.shared}
        if not self.inner.defines("read"):
            return dict(found)
        for name, t in found.items():
            if name not in shared and t.shape[:1] != (op.experts,):
                raise CheckpointError(f"{name!r} has shape {tuple(t.shape)}; the first must be {op.experts} experts")
        return self._stack_experts(
            op, [self.inner.read(each, self._expert_slots(op, found, i)) for i in range(op.experts)]
        )

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        each = self.expert_op(op)
        return self._stack_experts(
            op, [self.inner.write(each, self._expert_slots(op, slots, i)) for i in range(op.experts)]
        )

    def with_sizes_of(self, op: Op, slots: Slots) -> Method:
        return replace(self, inner=self.inner.with_sizes_of(self.expert_op(op), self._expert_slots(op, slots, 0)))

    def scale(self, op: Op) -> float | None:
        return self.inner.scale(self.expert_op(op))

    def evaluated(self) -> Self:
        return replace(self, inner=self.inner.evaluated())

    def trained(self) -> Self:
        return replace(self, inner=self.inner.trained())

    def clash(self, other: Any) -> str:
        return self.inner.clash(other.inner if isinstance(other, PerExpertMethod) else other)

    def constrained(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        each = self.expert_op(op)
        return self._stack_experts(
            op, [self.inner.constrained(each, self._expert_slots(op, slots, i)) for i in range(op.experts)]
        )

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        each = self.expert_op(op)
        return torch.stack(
            [self.inner.weight(each, W[i], self._expert_slots(op, slots, i), scale) for i in range(op.experts)]
        )

    def looks_at_base(self) -> bool:
        return self.inner.looks_at_base()

    def weight_over(self, op: Op, base: Tensor, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        each = self.expert_op(op)
        parts = [self._expert_slots(op, slots, i) for i in range(op.experts)]
        changed = (self.inner.weight_over(each, base[i], W[i], part, scale) for i, part in enumerate(parts))
        return torch.stack(list(changed))

    def _expert_slots(self, op: Op, slots: Slots, i: int) -> dict[str, Tensor]:
        specs = self.inner.slots(self.expert_op(op))
        return {n: t if n in specs and specs[n].shared else t[i] for n, t in slots.items()}

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        return self.inner.fqn(place, slot, adapter)
