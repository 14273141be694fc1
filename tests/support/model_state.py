"""All that a model is, as a value to compare: what must be as it was after adaptc ran or captured the model."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, Any]:
    """Path -> what is there: of every module, container, helper object, tensor and generator that a model reaches; and
    the random numbers that come next."""
    out: dict[str, Any] = {
        "random.torch": torch.get_rng_state().tolist(),
        "random.python": random.getstate(),
        "random.numpy": str(numpy.random.get_state()),
    }
    seen: dict[int, str] = {}
    pending: list[tuple[str, Any]] = [("model", model)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, (FunctionType, MethodType, ModuleType, type)):
            out[path] = id(value.__func__ if isinstance(value, MethodType) else value)
            continue
        children = _children_of(value)
        if not isinstance(value, Tensor) and children is None:
            out[path] = (type(value).__name__, value if isinstance(value, (int, float, str, bytes)) else repr(value))
            continue
        if id(value) in seen:
            out[path] = f"is {seen[id(value)]}"
            continue
        seen[id(value)] = path
        out[path] = (
            id(value),
            type(value).__name__,
            _tensor_facts(value) if isinstance(value, Tensor) else len(children),
        )
        if isinstance(value, Tensor):
            children = {} if not value.is_leaf or value.grad is None else {"grad": value.grad}
        pending += [(f"{path}.{name}", v) for name, v in children.items()]
    return out


def _children_of(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, dict):
        return {f"{i}:{k}": v for i, (k, v) in enumerate(value.items())}
    if isinstance(value, (list, tuple, deque)):
        return dict(enumerate(value))
    if isinstance(value, (set, frozenset)):
        return dict(enumerate(sorted(value, key=repr)))
    if isinstance(value, torch.Generator):
        return {"state": str(value.get_state().tolist())}
    if isinstance(value, numpy.random.Generator):
        return {"state": str(value.bit_generator.state)}
    return vars(value) if hasattr(value, "__dict__") and not isinstance(value, Tensor) else None


def _tensor_facts(t: Tensor) -> Any:
    data = hashlib.sha256(repr(t.detach().tolist()).encode()).hexdigest()
    return tuple(t.shape), t.stride(), t.dtype, t.requires_grad, t.data_ptr(), data


def changed_paths(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Where two states differ."""
    return sorted(k for k in before | after if before.get(k) != after.get(k))
