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
from adaptc.generation.arguments.validate import prepend_ones
from adaptc.generation.prefix.prefix_for import prefix_attachments, prefix_input_names
from adaptc.generation.step_runner import StepRunner

#: the openings of the encoder, and those of the decoder's cache
ENCODER_OPENINGS, DECODER_OPENINGS = ("prompt",), ("past_key_values",)


def pop_adapter_inputs(runner: StepRunner, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the inputs that adapters' virtual tokens depend on from ``kwargs`` and return them by name."""
    return {name: value for name in prefix_input_names(runner) if (value := kwargs.pop(name, None)) is not None}


def select_encoder_inputs(
    input_names: Collection[str], runner: StepRunner, adapter_inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return those of the ``adapter_inputs`` inputs that the encoder takes, whose names are in ``input_names``.

    Raises AdaptcError for a missing one.
    """
    names = [n for n in prefix_input_names(runner) if n in input_names]
    for name in names:
        if not isinstance(adapter_inputs.get(name), Tensor):
            raise AdaptcError(f"the adapter needs {name}, a tensor with an entry for each row that is encoded")
    return {n: adapter_inputs[n].contiguous() for n in names}


def encoder_states_mask(runner: StepRunner, states: Any, mask: Any) -> Any:
    """Return the mask of the encoder's states: ``mask`` with ones in front for the adapter's virtual tokens."""
    if (
        not prefix_attachments(runner, ENCODER_OPENINGS)
        or not isinstance(mask, Tensor)
        or not isinstance(states, Tensor)
        or mask.ndim != 2
    ):
        return mask
    return prepend_ones(max(states.shape[1] - mask.shape[1], 0), mask)
