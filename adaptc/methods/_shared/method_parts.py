"""Hold what is read and written of the expert adapters of which another adapter is made, each with files of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: an adapter to write: the content of its config as files have it, and its tensors by bare keys
AdapterContent = tuple[Mapping[str, Any], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class ExpertAdapter:
    """A LoRA adapter that was read as an expert of another adapter.

    ``config``: an AdapterConfig. ``tensors``: by bare keys. ``source``: its name in messages.
    """

    config: Any
    tensors: Mapping[str, Tensor] = field(repr=False)
    source: str
