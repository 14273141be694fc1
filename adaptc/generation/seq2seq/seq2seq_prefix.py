"""Handle the virtual tokens of adapters in programs with an encoder.

The program's encoder adds the virtual tokens of a prompt itself. The inputs that they depend on are passed to it. Its
states are then more than the positions of the caller's mask. The decoder's cache begins with a KV prefix, as in a model
without an encoder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.prefix.prefix_for import begins, taken
from adaptc.generation.validate import behind

#: the openings of the encoder, and those of the decoder's cache
ENCODED, DECODED = ("prompt",), ("cached",)


def pop_adapter_inputs(runs: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the inputs that adapters' virtual tokens depend on from ``kwargs`` and return them by name."""
    return {name: value for name in taken(runs) if (value := kwargs.pop(name, None)) is not None}


def for_encoder(takes: Collection[str], runs: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the ``given`` inputs that the encoder takes, whose names are in ``takes``.

    Raises AdaptcError for a missing one.
    """
    names = [n for n in taken(runs) if n in takes]
    for name in names:
        if not isinstance(given.get(name), Tensor):
            raise AdaptcError(f"the adapter needs {name}, a tensor with an entry for each row that is encoded")
    return {n: given[n].contiguous() for n in names}


def mask_of_states(runs: Any, states: Any, mask: Any) -> Any:
    """Return the mask of the encoder's states: ``mask`` with ones in front for the adapter's virtual tokens."""
    if not begins(runs, ENCODED) or not isinstance(mask, Tensor) or not isinstance(states, Tensor) or mask.ndim != 2:
        return mask
    return behind(max(states.shape[1] - mask.shape[1], 0), mask)
