"""Trainable tokens: single rows of an embedding are trained, all others stay (PEFT's ``TrainableTokensConfig``).

The method is ``TokenRows``. File key: ``<module>.trainable_tokens_delta`` (tokens, width), the rows themselves. It is
there under the path of the embedding, and again under that of every module tied to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

from adaptc.errors import ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.saved_modules import TokenRows


@dataclass
class TrainableTokensConfig(TargetedConfig):
    """PEFT's ``TrainableTokensConfig``: same names, same defaults.

    ``target_modules`` is by default the input embedding; heads tied to it change with it.

    Attributes:
        token_indices: the rows to train.
        init_weights: whether the rows start as those of the embedding; False starts from random rows.

    Example:
        >>> config = adaptc.TrainableTokensConfig(token_indices=[5, 6], target_modules=["embed_tokens"])
    """

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    target_unit: ClassVar[str] = "rows"
    unsupported_fields: ClassVar[Mapping[str, str]] = {
        "target_parameters": "rows are those of a module's weight; name the module in target_modules",
    }

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    def with_model_defaults(self, facts: ModelFacts) -> Self:
        if not self.token_indices:
            raise ConfigError("TrainableTokensConfig.token_indices is empty: name the rows to train")
        # A string, as in PEFT's files, matches the whole path only; a list would match other modules with that ending.
        new = super().with_model_defaults(facts)
        return new.with_missing_filled({"target_modules": facts.input_embedding}) if facts.input_embedding else new

    def method(self, name: str, kind: str) -> TokenRows:
        return TokenRows(tuple(self.token_indices), within="", scheme=self.init_weights)
