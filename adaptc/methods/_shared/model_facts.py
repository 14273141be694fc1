"""Hold the facts of a model beyond its graph that configs need to fill in their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model that its graph does not tell; for a bare exported program any of them may be missing.

    ``module_types``: module path -> qualified class name. ``input_embedding``, ``output_embedding``: module paths.
    """

    module_types: Mapping[str, str] = field(default_factory=dict)
    #: ``config.model_type`` of a transformers model
    model_type: str | None = None
    output_embedding: str | None = None
    input_embedding: str | None = None
    #: paths of the modules that store stacked experts as (experts, in, out)
    transposed_experts: frozenset[str] = frozenset()
    #: paths of the modules whose class derives from a linear layer's
    linear_modules: frozenset[str] = frozenset()
    #: whether only the exported program is known, not the module it came from
    is_bare_program: bool = False
    #: the config of a transformers model
    config: Any = None
