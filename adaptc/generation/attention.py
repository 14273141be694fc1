"""Attention of a step: grouped queries are attended together, so that no step copies the cache once for each group.

Before: a model whose attention is transformers' "sdpa". After, while it is captured: queries that share a head of keys
lie behind one another as rows of one product. In transformers' own form every head of keys is copied for each query
head that reads it, which for a step is the whole cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class PackedAttention:
    """See the module docstring. Takes what transformers' function takes, which is ``usual`` and does the rest."""

    def __init__(self, usual: Callable[..., Any]) -> None:
        self.usual = usual
        self._masks: list[tuple[Tensor, int, Tensor]] = []

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        plain = isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 and attention_mask.dtype == torch.bool
        special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "sinks"))
        # Other threads may run the same model while this one captures it.
        if not torch.compiler.is_exporting() or not plain or special:
            return self.usual(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **kwargs,
            )
        assert attention_mask is not None
        batch, heads, length, dim = query.shape
        groups = heads // key.shape[1]
        mask = self._mask(attention_mask, groups, query.dtype)
        # contiguous: torch would otherwise ask how it lies, for which it has no answer that holds for all sizes.
        rows = query.contiguous().view(batch, key.shape[1], groups * length, dim) if groups > 1 else query
        out = scaled_dot_product_attention(rows, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
        if groups == 1:
            return out.transpose(1, 2).contiguous(), None
        apart = out.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4)
        return apart.contiguous().view(batch, length, heads, value.shape[-1]), None

    def _mask(self, mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, made once for all layers that read one mask."""
        for known, times, made in self._masks:
            if known is mask and times == groups:
                return made
        batch, heads, length, keys = mask.shape
        wide = mask
        if groups > 1:
            wide = mask[:, :, None].expand(batch, heads, groups, length, keys).reshape(batch, heads, -1, keys)
        made = torch.zeros(wide.shape, dtype=dtype, device=mask.device).masked_fill(~wide, float("-inf"))
        self._masks.append((mask, groups, made))
        return made


@contextlib.contextmanager
def packed_attention() -> Iterator[None]:
    """Captures inside it have :class:`PackedAttention`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = PackedAttention(usual)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = usual
