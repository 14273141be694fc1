"""Configs of methods that speak of the program and not of single layers: PEFT's ``PromptLearningConfig``.

They choose no layers. Where the method stands, its token embedding, is found in the program, and what the config leaves
to the model is filled in when that is known.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from adaptc.errors import ConfigError
from adaptc.methods._checks import check_integers
from adaptc.methods._config import AdapterConfig
from adaptc.methods._model_facts import ModelFacts
from adaptc.passes.analysis.attention_places import Attentions
from adaptc.passes.ir.program_method import ProgramMethod

#: field -> the names that models' configs have for it, as PEFT reads them
_SIZES: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


@dataclass
class ProgramConfig(AdapterConfig):
    """Fields common to PEFT's configs of prompt methods. ``token_dim``, ``num_transformer_submodules``,
    ``num_attention_heads`` and ``num_layers`` are the model's, and filled in."""

    #: as for configs that choose layers
    samples: ClassVar[Sequence[Mapping[str, Any]]] = ({"num_virtual_tokens": 5},)
    #: whether its method stands in the program's attentions
    reads_attentions: ClassVar[bool] = False
    #: whether it is for models with an encoder and a decoder
    takes_encoders: ClassVar[bool] = True

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    # Options of configs that choose layers.
    layer_replication = cast("Any", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens is None:
            raise ConfigError(
                f"{type(self).__name__}.num_virtual_tokens must say how many tokens are put in front of those of a call"
            )
        check_integers(self, {"num_virtual_tokens": self.num_virtual_tokens})

    def method(self, name: str, kind: str) -> ProgramMethod:
        raise AssertionError(f"{type(self).__name__} must define method()")

    def resolved(self, facts: ModelFacts, width: int, found: Attentions | None = None) -> Self:
        """This config with what it leaves to the model filled in, as PEFT's files have it; ``width``: that of the
        program's token embedding; ``found``: its attentions, if :attr:`reads_attentions`. Raises ConfigError where they
        do not agree."""
        if self.token_dim not in (None, width):
            raise ConfigError(
                f"{type(self).__name__}.token_dim={self.token_dim}, and the token embedding of this program has rows "
                f"of {width}: leave it out"
            )
        both = self.takes_encoders and self.task_type == "SEQ_2_SEQ_LM"
        values: dict[str, Any] = {"token_dim": width, "num_transformer_submodules": 2 if both else 1}
        for option, names in _SIZES.items():
            known = (v for n in names if isinstance(v := getattr(facts.config, n, None), int))
            values[option] = next(known, None)
        return self.completed(values)

    def check_sides(self, encodes: bool) -> None:
        """Raises ConfigError where this config, resolved, has rows for more stacks than a program has. ``encodes``: it
        has an encoder and a decoder."""
        if self.num_transformer_submodules not in ((1, 2) if encodes and self.takes_encoders else (1,)):
            has = "an encoder and a decoder" if encodes else "one stack"
            raise ConfigError(
                f"{type(self).__name__}.num_transformer_submodules={self.num_transformer_submodules} is not supported "
                f"for a model of {has}: leave it out, and task_type='SEQ_2_SEQ_LM' where there is no encoder"
            )

    @property
    def sides(self) -> int:
        return self.num_transformer_submodules or 1

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        new = copy.copy(self)
        new.num_virtual_tokens = next(iter(ranks.values()), self.num_virtual_tokens)
        return new
