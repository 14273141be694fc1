"""Methods that no paper has, to hold generic code to its word: it may assume of a method what the protocol says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import Tensor

import adaptc
from adaptc.methods import TargetedConfig
from adaptc.methods._shared import registry as _registry
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method, Slot


@dataclass(frozen=True)
class Shift(Method):
    """y + shift * scale, one number for a whole layer: no rank, and nothing that can be merged into a weight."""

    name: ClassVar[str] = "shift"
    swappable: ClassVar[frozenset[str]] = frozenset({"factor"})

    factor: float = 1.0

    def slots(self, op: Op) -> dict[str, Slot]:
        return {"shift": Slot((1,))}

    def scale(self, op: Op) -> float:
        return self.factor

    def apply(
        self,
        op: Op,
        x: Tensor,
        y: Tensor,
        W: Tensor,
        b: Tensor | None,
        slots: Mapping[str, Tensor],
        scale: Tensor | None,
    ) -> Tensor:
        return y + slots["shift"] * scale


@dataclass
class ShiftConfig(TargetedConfig):
    peft_type: ClassVar[str] = "SHIFT"

    factor: float = 1.0

    def method(self, name: str, kind: str) -> Shift:
        return Shift(self.factor)


@dataclass(frozen=True)
class Softmaxed(Method):
    """W + B softmax(A) over the rank, which no padding by a finite number leaves unchanged."""

    name: ClassVar[str] = "softmaxed"

    r: int = 2

    def slots(self, op: Op) -> dict[str, Slot]:
        return {"a": Slot((self.r, op.in_features), free=(0,)), "b": Slot((op.out_features, self.r), free=(1,))}

    def weight(self, op: Op, W: Tensor, slots: Mapping[str, Tensor], scale: Tensor | None) -> Tensor:
        return W + slots["b"] @ slots["a"].softmax(0)


@dataclass
class SoftmaxedConfig(TargetedConfig):
    peft_type: ClassVar[str] = "SOFTMAXED"

    r: int = 2

    def method(self, name: str, kind: str) -> Softmaxed:
        return Softmaxed(self.r)


def registered(monkeypatch: pytest.MonkeyPatch, config: type[TargetedConfig], method: type[Method]) -> None:
    """Make a method known for one test."""
    for table in (_registry.CONFIGS, _registry.METHODS, _registry._registered_classes):
        monkeypatch.setattr(_registry, next(n for n, v in vars(_registry).items() if v is table), dict(table))
    adaptc.methods.register_method(config, method)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    for config, method in ((ShiftConfig, Shift), (SoftmaxedConfig, Softmaxed)):
        registered(monkeypatch, config, method)
