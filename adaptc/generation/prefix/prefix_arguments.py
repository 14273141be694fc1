"""Prepare the arguments of a generation with an adapter that has virtual tokens.

The text then stands behind the virtual tokens in a cache that begins with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.prefix.prefix_for import prefix_input_names
from adaptc.generation.spec import cache_argument_name


def with_prefix_arguments(generator: Any, inputs: Tensor | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``generate``, with a cache that begins with the adapter's virtual tokens.

    ``generator`` is a generator that keeps its adapter. The arguments stay as they are where the adapter has no virtual
    tokens. Raises AdaptcError for arguments that the adapter does not take.
    """
    kwargs = dict(kwargs)
    adapter_inputs = {name: kwargs.pop(name) for name in prefix_input_names(generator.runner) if name in kwargs}
    input_ids = kwargs.get("input_ids") if inputs is None else inputs
    past = next((v for name in ("past_key_values", "cache") if (v := kwargs.get(name)) is not None), None)
    if past is not None and any(v is not None for v in adapter_inputs.values()):
        raise AdaptcError(
            f"{next(iter(adapter_inputs))} says what a new cache begins with, and this one has begun: leave out one of "
            "the two"
        )
    if past is None:
        past = generator.new_cache(**adapter_inputs)
        if past.prefix is None:
            return kwargs
        rows = {v.shape[0] for v in adapter_inputs.values()}
        if isinstance(input_ids, Tensor) and rows and rows != {input_ids.shape[0]}:
            raise AdaptcError(
                f"{next(iter(adapter_inputs))} has {rows.pop()} entries, and there are {input_ids.shape[0]} rows of "
                "text"
            )
        kwargs[cache_argument_name()] = past
    if getattr(past, "counts_padding", False) and kwargs.get("position_ids") is not None:
        raise AdaptcError(
            "position_ids is not taken behind tokens of a prompt: positions are places, those in front and padding "
            "counted. Leave it out"
        )
    return kwargs
