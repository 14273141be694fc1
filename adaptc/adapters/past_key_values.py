"""Turn a KV cache of one sequence into a KV prefix, as prefix tuning and cartridges have it.

The cache is transformers', or that of a generator program. An error says what the cache lacks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.methods import rows_from_kv_prefix

_EXPECTED = (
    "past_key_values is a cache of one sequence: one of transformers' with keys and values in every layer, pairs (key, "
    "value) of each layer, or what gen.prefill(input_ids) gives"
)


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """Return the first ``num_virtual_tokens`` tokens of a KV cache as PEFT's files of prefix tuning and cartridges have
    them.

    Each row has a token's key of the first layer, its value, and so on for each layer. They are as in the cache:
    rotated, and with one head for all queries that share it.

    Args:
        past_key_values: a transformers cache, or what ``prefill`` of a generator gives. It may also be the (key, value)
            pairs of the layers, each tensor (1, heads, length, width).
        num_virtual_tokens: the number of tokens to take.

    Returns:
        ``prompt_embeddings`` (num_virtual_tokens, 2 * layers * heads * width), in the cache's dtype and in memory of
        its own.

    Raises:
        ConfigError: ``num_virtual_tokens`` is no positive integer.
        AdaptcError: the cache has several sequences or fewer tokens, or layers with a sliding window have dropped the
            first ones. The same for layers that differ in shape or have no keys.

    Example:
        >>> pairs = [(torch.randn(1, 4, 7, 8), torch.randn(1, 4, 7, 8))]
        >>> adaptc.prefixes.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=3).shape
        torch.Size([3, 64])
    """
    return rows_from_kv_prefix([t[0] for t in first_cached_tokens(past_key_values, num_virtual_tokens)])


def first_cached_tokens(past_key_values: Any, count: int) -> list[Tensor]:
    """Return keys and values in turn, layer by layer, each (1, heads, count, width), without gradients.

    Raises like :func:`prompt_embeddings_from_past_key_values`.
    """
    check_token_count(count)
    pairs = _layer_key_values(past_key_values)
    if not pairs:
        raise AdaptcError(f"there are no layers in this cache. {_EXPECTED}")
    tensors: list[Tensor] = []
    for i, (pair, length) in enumerate(pairs):
        for what, t in zip(("keys", "values"), pair, strict=True):
            location = f"the {what} of layer {i}"
            if not isinstance(t, Tensor):
                raise AdaptcError(f"{location} are {'none' if t is None else f'a {type(t).__name__}'}. {_EXPECTED}")
            if t.ndim != 4 or t.shape[0] != 1:
                raise AdaptcError(
                    f"{location} have shape {tuple(t.shape)}, expected (1, heads, length, width): a cache of one "
                    "sequence"
                )
            if length is not None and length > t.shape[2]:
                raise AdaptcError(
                    f"{location} are of {t.shape[2]} of the {length} tokens that the layer has seen: it keeps the last "
                    "ones alone, and the first are needed. Read a text that is no longer than its window"
                )
            held = t.shape[2] if length is None else length
            if held < count:
                raise AdaptcError(f"{location} are of {held} tokens, and {count} are needed: read a longer text")
            first = tensors[0] if tensors else t
            if (t.shape[1], t.shape[3]) != (first.shape[1], first.shape[3]):
                raise AdaptcError(
                    f"{location} have {t.shape[1]} heads of {t.shape[3]}, and the keys of layer 0 {first.shape[1]} of "
                    f"{first.shape[3]}: what stands in front is of one shape in all layers"
                )
            tensors.append(t.detach()[:, :, :count].to(first.device))
    return tensors


def check_token_count(count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"num_virtual_tokens must be a positive integer, got {short_repr(count)}")


def _layer_key_values(cache: Any) -> list[tuple[tuple[Any, Any], int | None]]:
    """Return (keys, values) of each layer, with the number of tokens that it was given, None where that is not
    known."""
    layers = getattr(cache, "layers", None)
    if isinstance(layers, (list, tuple)):
        return [((getattr(x, "keys", None), getattr(x, "values", None)), _cached_length(x)) for x in layers]
    try:
        found = list(cache)
    except TypeError:
        found = [cache]
    for layer in found:
        if not isinstance(layer, (list, tuple)) or len(layer) < 2:
            raise AdaptcError(f"got a {type(cache).__name__} of {type(layer).__name__}. {_EXPECTED}")
    return [((layer[0], layer[1]), None) for layer in found]


def _cached_length(layer: Any) -> int | None:
    if not isinstance(getattr(layer, "keys", None), Tensor):
        return None
    length = layer.get_seq_length()
    return int(length)
