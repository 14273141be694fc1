"""What is known of a model beyond its graph, for configs that leave something to the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelFacts:
    """All of it may be missing for a bare exported program. ``types``: module path -> qualified class name.
    ``input_embedding``, ``output_embedding``: module paths."""

    types: Mapping[str, str] = field(default_factory=dict)
    #: ``config.model_type`` of a transformers model
    model_type: str | None = None
    output_embedding: str | None = None
    input_embedding: str | None = None
    #: modules that store stacked experts as (experts, in, out)
    transposed: frozenset[str] = frozenset()
    #: modules whose class derives from a linear layer's
    linear: frozenset[str] = frozenset()
    #: whether only the program is known, not the module it came from
    bare: bool = False
    #: the config of a transformers model
    config: Any = None
