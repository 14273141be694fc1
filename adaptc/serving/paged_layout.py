"""Describe the paged cache of transformers' continuous batching, as tensors that a step takes.

transformers keeps one flat tensor. Layers of one attention type are a group: the rows that they read and write have the
same indices. Each layer has its own view of the flat tensor, in which these indices find its keys or values.

A layer of multi-head latent attention (DeepSeek) has one view for both. A row holds what the keys and values of all
heads are made of: a latent vector, and a key with rotary embeddings. They are made again in each step, for all that is
read. So a step is told which text each read row is of, and adapters of the layers that make them are the text's.

Source: ``PagedAttentionCache``, and ``register_cache_tensor`` of ``FullAttentionCacheAllocator`` (transformers 5.17 to
5.25) and of ``MLACacheAllocator`` (5.25).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptc.errors import CaptureError
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.passes.analysis.cache_inputs import KV_KINDS, cache_input_name

#: the index in a group with a sliding window that stands for the next new token, which is not in the cache yet
SENTINEL = 1


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one attention type: "full_attention", or "sliding_attention" with a ``window``."""

    name: str
    layers: tuple[int, ...]
    window: int | None = None

    @property
    def read_name(self) -> str:
        """Return the name of the input with the rows that are read, int64 (read,)."""
        return f"read_{self.name}"

    @property
    def write_name(self) -> str:
        """Return the name of the input with the row that each token is written to, int64 (tokens,)."""
        return f"write_{self.name}"

    @property
    def reader_name(self) -> str:
        """Return the name of the input with a token that reads each read row, int64 (read,), of latent attention."""
        return f"reader_{self.name}"

    @property
    def mask_name(self) -> str:
        """Return the name of the input that says what each token attends to, bool (1, 1, tokens, read)."""
        return f"mask_{self.name}"


@dataclass(frozen=True)
class PagedLayout:
    """The groups of a model's layers, and the sizes (rows, ``heads``, ``dim``) of each layer's keys and values.

    ``latents``: the widths of the latent vector and of the rotary key in a row of latent attention. Then ``heads`` is 1
    and ``dim`` their sum. None for keys and values.
    """

    groups: tuple[LayerGroup, ...]
    heads: int
    dim: int
    dtype: torch.dtype
    latents: tuple[int, int] | None = None

    @classmethod
    def from_model(cls, model: nn.Module) -> Self:
        """Return the layout of the paged cache of a causal model.

        Raises CaptureError, with the reason, for a model whose cache cannot be paged.
        """
        from transformers.generation.continuous_batching.cache import group_layers_by_attn_type
        from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

        name, layout = type(model).__name__, CacheLayout.from_model(model)
        untyped: Any = model
        config = untyped.config.get_text_config(decoder=True)
        try:
            groups = group_layers_by_attn_type(config)
        except (ValueError, AttributeError) as error:
            raise CaptureError(f"transformers has no paged cache for {name}: {error}") from error
        if sorted(i for layers in groups.values() for i in layers) != list(range(len(layout.layers))):
            raise CaptureError(f"{name} has {len(layout.layers)} layers with a cache, and its config names others")
        made = tuple(
            LayerGroup(kind, tuple(layers), config.sliding_window if kind == "sliding_attention" else None)
            for kind, layers in groups.items()
        )
        sizes = {(layer.heads, layer.key_dim, layer.value_dim) for layer in layout.layers}
        heads, key_dim, value_dim = next(iter(sizes))
        if _has_latents(config):
            latents = (config.kv_lora_rank, config.qk_rope_head_dim)
            if sizes != {(1, *latents)} or [g.window for g in made] != [None]:
                raise CaptureError(f"{name} has other layers beside those of latent attention, and is not served")
            return cls(made, 1, sum(latents), layout.dtype, latents)
        if len(sizes) != 1 or key_dim != value_dim:
            raise CaptureError(
                f"{name} has keys and values of different sizes ({sorted(sizes)}), which a paged cache cannot hold"
            )
        if (heads, key_dim) != (reserved := (find_num_key_value_heads(config), find_head_dim(config))):
            raise CaptureError(
                f"{name} has {heads} key heads of {key_dim}, and transformers' paged cache reserves {reserved[0]} of "
                f"{reserved[1]} for it"
            )
        return cls(made, heads, key_dim, layout.dtype)

    @property
    def group_of_layer(self) -> dict[int, LayerGroup]:
        """Return the group of each layer."""
        return {i: group for group in self.groups for i in group.layers}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return what each layer has an input of: keys and values, or "keys" alone for rows of latents."""
        return KV_KINDS if self.latents is None else KV_KINDS[:1]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the inputs with keys and values, in turn, layer by layer."""
        return tuple(cache_input_name(kind, i) for i in range(len(self.group_of_layer)) for kind in self.kinds)

    def views(self, cache: Any) -> dict[str, Tensor]:
        """Return, by input name, each layer's view (rows, heads, dim) of a ``PagedAttentionCache``; all have as many
        rows."""
        views: dict[str, Tensor] = {}
        for allocator in cache.cache_allocators.values():
            page, flat = allocator.tokens_per_page, allocator.cache_tensor.view(-1, self.heads, self.dim)
            rows = flat.shape[0] - (len(self.kinds) * len(allocator.layer_indices) - 1) * page
            for i, layer in enumerate(allocator.layer_indices):
                for j, kind in enumerate(self.kinds):
                    start = (len(self.kinds) * i + j) * page
                    views[cache_input_name(kind, layer)] = flat[start : start + rows]
        return views

    def indices(
        self, read_index: list[Tensor], write_index: list[Tensor], new_ends: Tensor, read_ends: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return, by input name, the indices of a batch as transformers gives them, group by group.

        ``new_ends`` and ``read_ends`` (by group): zero, and where the new tokens and the read rows of each text end.
        transformers leaves out what is read where no request has a past. Then each token is read where it was written.
        """
        made: dict[str, Tensor] = {}
        for group, read, write in zip(self.groups, read_index, write_index, strict=True):
            if not read.numel():
                read = write if group.window is None else torch.full_like(write, SENTINEL)
            made |= {group.read_name: read, group.write_name: write}
            if self.latents is not None:
                made[group.reader_name] = new_ends[:-1].long().repeat_interleave(read_ends[group.name].diff())
        return made

    def masks(self, attention_mask: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, by input name, transformers' masks, which are zero where a token attends to a key."""
        by_group = {self.groups[0].name: attention_mask} if isinstance(attention_mask, Tensor) else attention_mask
        return {group.mask_name: by_group[group.name] == 0 for group in self.groups}


def _has_latents(config: Any) -> bool:
    """Return whether transformers' paged cache keeps the latent vectors of a model with this config."""
    from transformers.generation.continuous_batching import cache_allocators

    return getattr(config, "kv_lora_rank", None) is not None and hasattr(cache_allocators, "MLACacheAllocator")
