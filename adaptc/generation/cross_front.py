"""What adapters have in front, in programs with an encoder: tokens before those that it reads, keys and values before
those of the decoder's tokens.

The program's encoder puts tokens there itself, at the places of its own. What is left to do: what they follow from is
handed to it, and its states are more than the mask of a caller has numbers for. With keys and values the decoder's own
cache begins, as that of a model without an encoder does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.checks import behind
from adaptc.generation.front import begins, taken

#: what the encoder reads in front, and what the decoder's cache begins with
ENCODED, DECODED = ("prompt",), ("cached",)


def popped(runs: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What adapters ask of a caller, by name, which is in ``kwargs`` no more."""
    return {name: value for name in taken(runs) if (value := kwargs.pop(name, None)) is not None}


def for_encoder(takes: Collection[str], runs: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of these what the encoder takes. Raises AdaptcError for what it lacks."""
    names = [n for n in taken(runs) if n in takes]
    for name in names:
        if not isinstance(given.get(name), Tensor):
            raise AdaptcError(f"the adapter needs {name}, a tensor with an entry for each row that is encoded")
    return {n: given[n].contiguous() for n in names}


def mask_of_states(runs: Any, states: Any, mask: Any) -> Any:
    """The mask of what an encoder gave, whose first states may be of the adapter's tokens, which are seen."""
    if not begins(runs, ENCODED) or not isinstance(mask, Tensor) or not isinstance(states, Tensor) or mask.ndim != 2:
        return mask
    return behind(max(states.shape[1] - mask.shape[1], 0), mask)
