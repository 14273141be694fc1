"""Ask a method once per expert of a stacked weight, and stack the answers.

A method around an inner one (``method.inner``) takes functions made here as its own. Arguments with an axis of experts
in front are divided among the calls of the inner function: tensors, and the slots that sites do not share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import InitialValues, Method
from adaptc.passes.protocol.parts.method_part import MethodPart


def expert_op(op: Op) -> Op:
    """Return the op of one expert's weight."""
    return Op("weight", op.shape[1:])


def per_expert(name: str) -> Any:
    """Return a function that asks the inner method's function ``name``: for each expert, where the answer is tensors.

    The answers of all experts are stacked, but for slots that all sites share.
    """

    def ask(self: Any, *args: Any) -> Any:
        method = self.method if isinstance(self, MethodPart) else self
        op = next((expert_op(a) for a in args if isinstance(a, Op)), None)

        @cache
        def shared() -> set[str]:
            return set() if op is None else {n for n, s in method.inner.slots(op).items() if s.shared}

        def of_expert(value: Any, i: int) -> Any:
            if isinstance(value, Mapping):
                return {n: t if n in shared() else t[i] for n, t in value.items()}
            if isinstance(value, Tensor):
                return value[i] if value.ndim else value
            return op if isinstance(value, Op) else value.inner if type(value) is type(method) else value

        def stack(answers: list[Any]) -> Any:
            if isinstance(answers[0], Tensor):
                return torch.stack(answers)
            return {n: t if n in shared() else torch.stack([a[n] for a in answers]) for n, t in answers[0].items()}

        def answer(i: int) -> Any:
            return attrgetter(name)(method.inner)(*(of_expert(a, i) for a in args))

        first, count = answer(0), next((a.experts for a in args if isinstance(a, Op)), 1)
        if isinstance(first, Method):
            return replace(method, inner=first)
        if isinstance(first, InitialValues):
            found = [first, *map(answer, range(1, count))]
            base = None if first.base is None else stack([f.base for f in found])
            return InitialValues(stack([f.slots for f in found]), base)
        values = first.values() if isinstance(first, dict) else [first]
        return stack([first, *map(answer, range(1, count))]) if all(isinstance(v, Tensor) for v in values) else first

    return ask


def part_per_expert(name: str, *functions: str, **own: Any) -> Any:
    """Return the object ``name`` of a method, which asks the inner method's object in these functions."""
    kind = type(getattr(Method, name))
    return type(kind.__name__, (kind,), {f: per_expert(f"{name}.{f}") for f in functions} | own)()
