"""Configs of methods that add to what attentions give: they choose layers of attention and no weights.

Where the attentions are is found in the program, and what the config leaves to the model is filled in when they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from adaptc.methods._config import AdapterConfig
from adaptc.passes.ir.attention_method import AttentionMethod


@dataclass
class AttentionConfig(AdapterConfig):
    """``target_modules``: the name of the modules of attention, by default that of the last one of the program;
    ``adapter_layers``: how many, from the last one back."""

    #: as for configs that choose layers
    samples: ClassVar[Sequence[Mapping[str, Any]]] = ({"adapter_len": 10, "adapter_layers": 30},)

    # Options of configs that choose layers.
    layer_replication = cast("Any", None)

    target_modules: str | None = None
    adapter_layers: int | None = None

    def method(self, name: str, kind: str) -> AttentionMethod:
        raise AssertionError(f"{type(self).__name__} must define method()")
