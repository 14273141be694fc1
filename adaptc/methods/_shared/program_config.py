"""Define the base class of configs whose methods change the program as a whole: PEFT's ``PromptLearningConfig``.

Such a config chooses no layers. Its method is attached at the token embedding, which is found in the program; fields
that the config leaves to the model are filled in then.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from adaptc.errors import ConfigError
from adaptc.methods._shared.config import AdapterConfig
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.option_checks import check_integers
from adaptc.passes.analysis.attention.attention_for_prefixes import SelfAttentions
from adaptc.passes.protocol.program_method import ProgramMethod

#: field -> its names in the configs of models, in the order in which PEFT tries them
_MODEL_CONFIG_NAMES: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


@dataclass
class ProgramConfig(AdapterConfig):
    """Fields common to PEFT's configs of prompt methods.

    Attributes:
        num_virtual_tokens: the number of virtual tokens.
        token_dim: the width of the token embedding, filled in from the model.
        num_transformer_submodules: the number of stacks with virtual tokens, filled in from the model.
        num_attention_heads: the model's number of heads, filled in from it.
        num_layers: the model's number of blocks, filled in from it.
        modules_to_save: modules that are trained whole and saved with the adapter.

    Example:
        >>> class FewTokensConfig(adaptc.methods.ProgramConfig):
        ...     peft_type = "FEW_TOKENS"
        >>> FewTokensConfig(num_virtual_tokens=3).num_virtual_tokens
        3
    """

    #: the fields of an example config: those that have no default
    samples: ClassVar[Sequence[Mapping[str, Any]]] = ({"num_virtual_tokens": 5},)
    #: whether :meth:`with_model_defaults` needs the program's attentions
    reads_attentions: ClassVar[bool] = False
    #: whether the method supports models with an encoder and a decoder
    supports_encoders: ClassVar[bool] = True

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    # Configs that choose layers have these options; generic code reads them of all configs.
    layer_replication = cast("Any", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens is None:
            raise ConfigError(
                f"{type(self).__name__}.num_virtual_tokens must say how many tokens are put in front of those of a call"
            )
        check_integers(self, {"num_virtual_tokens": self.num_virtual_tokens})

    def method(self, name: str, kind: str) -> ProgramMethod:
        """Return the method of the program.

        Args:
            name: the name of the token embedding.
            kind: the kind of the op that consumes its weight, "embedding".

        Returns:
            the method.
        """
        raise AssertionError(f"{type(self).__name__} must define method()")

    def with_model_defaults(
        self, facts: ModelFacts, embedding_dim: int, attentions: SelfAttentions | None = None
    ) -> Self:
        """Return this config with the fields that it leaves to the model filled in, as PEFT's files have them.

        Args:
            facts: the model's class, its config and the types of its modules.
            embedding_dim: the width of the program's token embedding.
            attentions: the program's attentions, None unless :attr:`reads_attentions`.

        Returns:
            the resolved config.

        Raises:
            ConfigError: a field contradicts the program.
        """
        if self.token_dim not in (None, embedding_dim):
            raise ConfigError(
                f"{type(self).__name__}.token_dim={self.token_dim}, and the token embedding of this program has rows "
                f"of {embedding_dim}: leave it out"
            )
        both = self.supports_encoders and self.task_type == "SEQ_2_SEQ_LM"
        values: dict[str, Any] = {"token_dim": embedding_dim, "num_transformer_submodules": 2 if both else 1}
        for option, names in _MODEL_CONFIG_NAMES.items():
            known = (v for n in names if isinstance(v := getattr(facts.config, n, None), int))
            values[option] = next(known, None)
        return self.with_missing_filled(values)

    def check_stacks(self, has_encoder: bool) -> None:
        """Raise ConfigError where this resolved config has rows for more stacks than the program has.

        ``has_encoder``: whether the program has an encoder and a decoder.
        """
        if self.num_transformer_submodules not in ((1, 2) if has_encoder and self.supports_encoders else (1,)):
            has = "an encoder and a decoder" if has_encoder else "one stack"
            raise ConfigError(
                f"{type(self).__name__}.num_transformer_submodules={self.num_transformer_submodules} is not supported "
                f"for a model of {has}: leave it out, and task_type='SEQ_2_SEQ_LM' where there is no encoder"
            )

    @property
    def num_stacks(self) -> int:
        return self.num_transformer_submodules or 1

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        new = copy.copy(self)
        new.num_virtual_tokens = next(iter(ranks.values()), self.num_virtual_tokens)
        return new
