"""The arguments of a generation whose text stands behind tokens of the adapter's.

Before: what a caller gives to ``generate``. After: the same with a cache that begins with these tokens, and a mask, so
that the text is what comes after them; as it was where the adapter has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.facts import past_name
from adaptc.generation.front import taken


def behind_front(gen: Any, inputs: Tensor | None, config: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``gen``: a generator that keeps its adapter. Raises AdaptcError for what the adapter does not take."""
    kwargs = dict(kwargs)
    given = {name: kwargs.pop(name) for name in taken(gen.runs) if name in kwargs}
    ids = kwargs.get("input_ids") if inputs is None else inputs
    past = next((v for name in ("past_key_values", "cache") if (v := kwargs.get(name)) is not None), None)
    if past is not None and any(v is not None for v in given.values()):
        raise AdaptcError(
            f"{next(iter(given))} says what a new cache begins with, and this one has begun: leave out one of the two"
        )
    if past is None:
        past = gen.new_cache(**given)
        if past.front is None:
            return kwargs
        rows = {v.shape[0] for v in given.values()}
        if isinstance(ids, Tensor) and rows and rows != {ids.shape[0]}:
            raise AdaptcError(
                f"{next(iter(given))} has {rows.pop()} entries, and there are {ids.shape[0]} rows of text"
            )
        if kwargs.get("attention_mask") is None and isinstance(ids, Tensor):
            kwargs["attention_mask"] = _seen(ids, config or gen.generation_config, kwargs)
        kwargs[past_name()] = past
    if getattr(past, "in_places", False) and kwargs.get("position_ids") is not None:
        raise AdaptcError(
            "position_ids is not taken behind tokens of a prompt: positions are places, those in front and padding "
            "counted. Leave it out"
        )
    return kwargs


def _seen(ids: Tensor, config: Any, given: Mapping[str, Any]) -> Tensor:
    """The mask of a prompt that comes without one, as transformers makes it: padding is not seen, where it is no
    end."""
    pad, end = (given.get(n, getattr(config, n, None)) for n in ("pad_token_id", "eos_token_id"))
    ends = [] if end is None else end if isinstance(end, list) else [end]
    return ids.new_ones(ids.shape) if pad is None or pad in ends else ids.ne(pad).long()
