"""Define the base classes of methods that put a KV prefix in front of the keys and values of each attention.

File key: ``prompt_embeddings`` (num_virtual_tokens, 2 * num_layers * token_dim), in PEFT's order. A token's row holds
the key of the first layer, its value, the key of the second layer, and so on; ``token_dim`` is the width of all key
heads. The keys are not rotated: like the keys in a cache, they stand behind the rotation.

In a model with an encoder and a decoder, the prefix is that of the decoder's self-attention. With
``num_transformer_submodules=2``, the default for a ``task_type`` of SEQ_2_SEQ_LM, PEFT reads a file as if every other
pair were for the cross-attention. Layer i then has pair 2 i modulo the number of layers, and half of the pairs or more
are unused. Files mean the same here. With 1, each layer has its own pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptc.errors import ConfigError, TargetError
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.program_config import ProgramConfig
from adaptc.methods.prompt.virtual_token_method import VirtualTokenMethod
from adaptc.passes.analysis.attention.attention_for_prefixes import SelfAttentions
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.coefficients import ExtraValues
from adaptc.passes.protocol.parts.method_part import Slots


@dataclass
class KVPrefixConfig(ProgramConfig):
    """A config of a method with a KV prefix.

    ``num_layers``, ``num_attention_heads`` and ``token_dim`` describe keys and values, and are found in the program's
    attentions. A key head that several query heads share (grouped-query attention) counts once.
    """

    reads_attentions: ClassVar[bool] = True

    def with_model_defaults(
        self, facts: ModelFacts, embedding_dim: int, attentions: SelfAttentions | None = None
    ) -> Self:
        assert attentions is not None
        known = (getattr(facts.config, n, None) for n in ("decoder_layers", "num_decoder_layers", "num_hidden_layers"))
        layers = next((n for n in known if isinstance(n, int)), None)
        if layers is not None and layers != attentions.count:
            raise TargetError(
                f"{self.peft_type} puts keys and values in front of those of each layer, of which the model's config "
                f"has {layers}, and {attentions.count} attentions of its tokens were found in the program: models that "
                "have layers of another kind, or some that share their keys, are not supported"
            )
        values = {
            "num_layers": attentions.count,
            "num_attention_heads": attentions.heads,
            "token_dim": attentions.heads * attentions.head_dim,
        }
        for option, value in values.items():
            if getattr(self, option) not in (None, value):
                raise ConfigError(
                    f"{type(self).__name__}.{option}={getattr(self, option)}, and the program has {value}: leave it out"
                )
        return self.with_missing_filled(
            {**values, "num_transformer_submodules": 2 if self.task_type == "SEQ_2_SEQ_LM" else 1}
        )

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        """Return (layers, key heads, width of a head, :attr:`KVPrefixMethod.submodules`).

        The first three are 0 until :meth:`with_model_defaults` has found them.
        """
        heads = self.num_attention_heads or 0
        return self.num_layers or 0, heads, (self.token_dim or 0) // max(heads, 1), self.num_stacks


@dataclass(frozen=True)
class KVPrefixMethod(VirtualTokenMethod):
    """A method with a KV prefix for each attention of a program.

    ``layers``, ``heads`` and ``width`` (of a head): as the config has them. ``submodules``: the step, in pairs of a
    row, from one layer's key and value to those of the next layer.
    """

    layers: int = 0
    heads: int = 0
    width: int = 0
    submodules: int = 1

    @property
    def row_size(self) -> int:
        """Return the length of a token's row: the keys and values of all layers."""
        return 2 * self.layers * self.heads * self.width

    def config_from_model(self, op: Op) -> dict[str, Any]:
        heads = {"num_attention_heads": self.heads, "token_dim": self.heads * self.width}
        return {"num_layers": self.layers, **heads, "num_transformer_submodules": self.submodules}

    def prefix_rows(self, slots: Slots) -> Tensor:
        """Return the rows of all virtual tokens: (count, row)."""
        raise AssertionError(f"{type(self).__name__} must define prefix_rows()")

    def past_key_values(self, slots: Slots, given: ExtraValues) -> Tensor:
        rows = self.prefix_rows(slots)
        pairs = rows.view(rows.shape[0], self.layers, 2, self.heads, self.width)
        if self.submodules > 1:
            pairs = torch.stack([pairs[:, self.submodules * i % self.layers] for i in range(self.layers)], 1)
        return pairs.flatten(1, 2).permute(1, 2, 0, 3)


def rows_from_kv_prefix(keys_and_values: Sequence[Tensor]) -> Tensor:
    """Return the rows (count, row) for a KV prefix: the inverse of :meth:`KVPrefixMethod.cached`.

    ``cached``: the keys and values of each layer in turn, each (heads, count, width).
    """
    return torch.stack(list(keys_and_values)).permute(2, 0, 1, 3).flatten(1).contiguous()
