"""Keys and values in front of those of a call's tokens, for each attention of a program.

File key: ``prompt_embeddings`` (num_virtual_tokens, 2 * num_layers * token_dim), in PEFT's order: of each token the key
of the first layer, its value, the key of the second, and so on, ``token_dim`` being all heads of keys. Nothing rotates
them: they stand where a cache has keys that were rotated before.

In a model with an encoder and a decoder they are those of the decoder's attention to its own tokens. PEFT reads a file
whose config says ``num_transformer_submodules=2``, which a ``task_type`` of SEQ_2_SEQ_LM makes the default, as if every
other pair were of the attention to the encoder: layer i has pair 2 i, from the first again behind the last, and half of
the pairs, or more, are read by nobody. Files mean the same here; with 1 each layer has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptc.errors import ConfigError, TargetError
from adaptc.methods._in_front import InFront
from adaptc.methods._model_facts import ModelFacts
from adaptc.methods._program_config import ProgramConfig
from adaptc.passes.analysis.attention_places import Attentions
from adaptc.passes.ir.coefficients import Given
from adaptc.passes.ir.method_hooks import Slots
from adaptc.passes.ir.ops import Op


@dataclass
class KeyValueConfig(ProgramConfig):
    """``num_layers``, ``num_attention_heads`` and ``token_dim`` are those of keys and values, found in the program's
    attentions: heads that several queries share count once."""

    reads_attentions: ClassVar[bool] = True

    def resolved(self, facts: ModelFacts, width: int, found: Attentions | None = None) -> Self:
        assert found is not None
        known = (getattr(facts.config, n, None) for n in ("decoder_layers", "num_decoder_layers", "num_hidden_layers"))
        layers = next((n for n in known if isinstance(n, int)), None)
        if layers is not None and layers != found.count:
            raise TargetError(
                f"{self.peft_type} puts keys and values in front of those of each layer, of which the model's config "
                f"has {layers}, and {found.count} attentions of its tokens were found in the program: models that "
                "have layers of another kind, or some that share their keys, are not supported"
            )
        values = {
            "num_layers": found.count,
            "num_attention_heads": found.heads,
            "token_dim": found.heads * found.width,
        }
        for option, value in values.items():
            if getattr(self, option) not in (None, value):
                raise ConfigError(
                    f"{type(self).__name__}.{option}={getattr(self, option)}, and the program has {value}: leave it out"
                )
        return self.completed({**values, "num_transformer_submodules": 2 if self.task_type == "SEQ_2_SEQ_LM" else 1})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Layers, heads, the width of a head, and :attr:`KeyValues.submodules`; zeros while they are not known."""
        heads = self.num_attention_heads or 0
        return self.num_layers or 0, heads, (self.token_dim or 0) // max(heads, 1), self.sides


@dataclass(frozen=True)
class KeyValues(InFront):
    """``layers``, ``heads`` and ``width`` (of a head): as the config has them. ``submodules``: by how many of a row's
    pairs the layers are apart."""

    layers: int = 0
    heads: int = 0
    width: int = 0
    submodules: int = 1

    @property
    def row(self) -> int:
        """How many numbers there are for a token."""
        return 2 * self.layers * self.heads * self.width

    def of_model(self, op: Op) -> dict[str, Any]:
        heads = {"num_attention_heads": self.heads, "token_dim": self.heads * self.width}
        return {"num_layers": self.layers, **heads, "num_transformer_submodules": self.submodules}

    def rows(self, slots: Slots) -> Tensor:
        """(count, row)"""
        raise AssertionError(f"{type(self).__name__} must define rows()")

    def cached(self, slots: Slots, given: Given) -> Tensor:
        rows = self.rows(slots)
        pairs = rows.view(rows.shape[0], self.layers, 2, self.heads, self.width)
        if self.submodules > 1:
            pairs = torch.stack([pairs[:, self.submodules * i % self.layers] for i in range(self.layers)], 1)
        return pairs.flatten(1, 2).permute(1, 2, 0, 3)


def as_rows(cached: Sequence[Tensor]) -> Tensor:
    """Inverse of :meth:`KeyValues.cached`: (count, row) of keys and values in turn, each (heads, count, width)."""
    return torch.stack(list(cached)).permute(2, 0, 1, 3).flatten(1).contiguous()
