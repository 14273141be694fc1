"""Adapters that are made of others, which have files of their own: what is read of those, and what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: the content of a config as files have it, and tensors by bare keys
Written = tuple[Mapping[str, Any], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Part:
    """One of them as it was read: ``config`` an AdapterConfig, tensors by bare keys; ``source`` for messages."""

    config: Any
    tensors: Mapping[str, Tensor] = field(repr=False)
    source: str
