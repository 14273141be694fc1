"""Define the base class of configs whose methods add to an attention's output.

Such a config chooses attention layers and no weights. The attentions are found in the program; fields that the config
leaves to the model are filled in then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from adaptc.methods._shared.config import AdapterConfig
from adaptc.passes.protocol.attention_method import AttentionMethod


@dataclass
class AttentionConfig(AdapterConfig):
    """A config that chooses attention layers.

    Attributes:
        target_modules: the name of the attention modules; None for that of the program's last one.
        adapter_layers: how many of them are adapted, counted from the last one back.
    """

    #: the fields of an example config: those that have no default
    samples: ClassVar[Sequence[Mapping[str, Any]]] = ({"adapter_len": 10, "adapter_layers": 30},)

    # Configs that choose layers have these options; generic code reads them of all configs.
    layer_replication = cast("Any", None)

    target_modules: str | None = None
    adapter_layers: int | None = None

    def method(self, name: str, kind: str) -> AttentionMethod:
        raise AssertionError(f"{type(self).__name__} must define method()")
