"""Cartridge: a KV prefix for every attention, distilled from a text (Eyuboglu et al., arXiv
2506.06266).

File key: ``prompt_embeddings`` (num_virtual_tokens, 2 * num_layers * token_dim). The rows of the first
``num_frozen_tokens`` tokens are not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.methods._shared.option_checks import check_integers
from adaptc.methods.prompt.key_values import KVPrefixConfig, KVPrefixMethod
from adaptc.methods.prompt.virtual_token_method import PROMPT_EMBEDDINGS, VirtualTokenFiles, VirtualTokenSizes
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import InitialValues
from adaptc.passes.protocol.parts.method_part import Slot, Slots

FROZEN, TRAINED = "frozen_embedding", "trainable_embedding"


@dataclass
class CartridgeConfig(KVPrefixConfig):
    """PEFT's ``CartridgeConfig``: same names, same defaults.

    Attributes:
        num_frozen_tokens: how many of the first tokens do not train; they are the attention sink.

    Example:
        >>> config = adaptc.CartridgeConfig(num_virtual_tokens=256)
    """

    peft_type: ClassVar[str] = "CARTRIDGE"

    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"num_frozen_tokens": self.num_frozen_tokens}, 0)
        if self.num_frozen_tokens > (self.num_virtual_tokens or 0):
            raise ConfigError(
                f"{type(self).__name__}.num_frozen_tokens={self.num_frozen_tokens} is more than the "
                f"{self.num_virtual_tokens} of num_virtual_tokens"
            )

    def method(self, name: str, kind: str) -> Cartridge:
        assert self.num_virtual_tokens is not None
        return Cartridge(self.num_virtual_tokens, (), 1, *self.kv_shape, self.num_frozen_tokens)


class CartridgeFiles(VirtualTokenFiles):
    method: Cartridge

    def keys(self, op: Op) -> list[str]:
        return [PROMPT_EMBEDDINGS]

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rest = {n: t for n, t in found.items() if n != PROMPT_EMBEDDINGS}
        return (
            {**rest, **self.method.split_rows(self.method.split_stacks(PROMPT_EMBEDDINGS, found[PROMPT_EMBEDDINGS]))}
            if PROMPT_EMBEDDINGS in found
            else rest
        )

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        return {PROMPT_EMBEDDINGS: self.method.prefix_rows(slots).detach()}


class CartridgeSizes(VirtualTokenSizes):
    method: Cartridge

    def with_sizes_of(self, op: Op, slots: Slots) -> Any:
        if FROZEN not in slots or TRAINED not in slots:
            return super().with_sizes_of(op, slots)
        frozen = slots[FROZEN].shape[0]
        return replace(self.method, count=frozen + slots[TRAINED].shape[0], frozen=frozen)


@dataclass(frozen=True)
class Cartridge(KVPrefixMethod):
    """Cartridge: a KV prefix of ``count`` tokens, of which the first ``frozen`` are not trained. ``first``: unused."""

    name: ClassVar[str] = "cartridge"
    swappable: ClassVar[frozenset[str]] = KVPrefixMethod.swappable | {"frozen"}
    peft_names: ClassVar[Mapping[str, str]] = {FROZEN: FROZEN, TRAINED: TRAINED}
    files = CartridgeFiles(names=(PROMPT_EMBEDDINGS,))
    sizes = CartridgeSizes(exact=True)

    frozen: int = 1

    def slots(self, op: Op) -> dict[str, Slot]:
        frozen = min(self.frozen, self.count)
        return {
            FROZEN: Slot((frozen, self.row_size), free=(0,), trainable=False),
            TRAINED: Slot((self.count - frozen, self.row_size), free=(0,)),
        }

    def free_size(self, slot: str) -> str:
        return slot

    def virtual_token_count(self, slots: Slots) -> int:
        return slots[FROZEN].shape[0] + slots[TRAINED].shape[0]

    def prefix_rows(self, slots: Slots) -> Tensor:
        return torch.cat([slots[FROZEN], slots[TRAINED]])

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        rows = torch.randn(self.count, self.row_size, generator=generator).to(W.device, dtype)
        return InitialValues(self.split_rows(rows))

    def split_rows(self, rows: Tensor) -> dict[str, Tensor]:
        frozen = min(self.frozen, rows.shape[0])
        return {FROZEN: rows[:frozen].clone(), TRAINED: rows[frozen:].clone()}

    # -- files ---------------------------------------------------------------------------------------------------------
