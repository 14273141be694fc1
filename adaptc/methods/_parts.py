"""Adapters that are made of others, which have files of their own: what is read of those, and what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """One of them as it was read: ``config`` an AdapterConfig, tensors by bare keys; ``source`` for messages."""

    config: Any
    tensors: Mapping[str, Tensor] = field(repr=False)
    source: str


@dataclass(frozen=True, eq=False)
class Divided:
    """An adapter as its files have it: config and tensors of its own file, and of each part, by the directory's name
    below it."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    parts: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]] = field(default_factory=dict, repr=False)
