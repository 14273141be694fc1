"""Compute grouped-query attention in a step without repeating the keys and values for each query head.

While a model with "sdpa" attention is captured, the queries that share a key head become further rows of one matmul.
transformers' own form repeats each key head for every query head that reads it. In a step that would copy the whole
cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class PackedAttention:
    """A replacement of transformers' "sdpa" attention function, with the same arguments.

    ``original`` is transformers' function. It computes all cases that are not packed.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self._float_masks: list[tuple[Tensor, int, Tensor]] = []

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
        special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "sinks"))
        # Other threads may run the same model while this one captures it.
        if not torch.compiler.is_exporting() or not _is_bool_mask(attention_mask) or special:
            return self.original(
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
        mask = self._float_mask(attention_mask, groups, query.dtype)
        # contiguous: ``view`` would otherwise depend on the strides, for which torch has no answer that holds for all
        # sizes.
        rows = query.contiguous().view(batch, key.shape[1], groups * length, dim) if groups > 1 else query
        out = scaled_dot_product_attention(rows, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
        if groups == 1:
            return out.transpose(1, 2).contiguous(), None
        untyped: Any = out  # torch gives unflatten no types
        apart: Tensor = untyped.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4)
        return apart.contiguous().view(batch, length, heads, value.shape[-1]), None

    def _float_mask(self, mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """Return the float mask that is added to the scores, made once for all layers that read the same ``mask``."""
        for known, times, float_mask in self._float_masks:
            if known is mask and times == groups:
                return float_mask
        batch, heads, length, keys = mask.shape
        wide = mask
        if groups > 1:
            wide = mask[:, :, None].expand(batch, heads, groups, length, keys).reshape(batch, heads, -1, keys)
        float_mask = torch.zeros(wide.shape, dtype=dtype, device=mask.device).masked_fill(~wide, float("-inf"))
        self._float_masks.append((mask, groups, float_mask))
        return float_mask

    def wrap_mask_function(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return transformers' mask function, changed so that it also makes the float mask that the layers read.

        Were that mask made in the first layer, this layer would differ from the others, which are traced once where all
        are equal.
        """

        def mask(*args: Any, **kwargs: Any) -> Any:
            made, dtype = original(*args, **kwargs), kwargs.get("dtype")
            groups = _queries_per_key_head(kwargs.get("config"))
            if torch.compiler.is_exporting() and _is_bool_mask(made) and groups and isinstance(dtype, torch.dtype):
                self._float_mask(made, groups, dtype)
            return made

        return mask


def _queries_per_key_head(config: Any) -> int | None:
    """Return how many query heads read one key head; None where the config does not say so."""
    heads = getattr(config, "num_attention_heads", None)
    kept = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(kept, int) or kept < 1 or heads % kept:
        return None
    return heads // kept


def _is_bool_mask(mask: Any) -> bool:
    """Return whether ``mask`` is a bool tensor with the four axes row, head, query and key."""
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.bool


@contextlib.contextmanager
def packed_attention() -> Generator[None]:
    """Run the block with :class:`PackedAttention` in the place of transformers' "sdpa" attention and masks."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTION

    functions: Any = ATTENTION  # of a class without types
    masks: Any = MASKS
    usual, mask = functions["sdpa"], masks["sdpa"]
    packed = PackedAttention(usual)
    functions["sdpa"], masks["sdpa"] = packed, packed.wrap_mask_function(mask)
    try:
        yield
    finally:
        functions["sdpa"], masks["sdpa"] = usual, mask
