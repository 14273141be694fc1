"""Refuse arguments of an encoder-decoder's generation before anything is computed.

Each check raises an AdaptcError that names what is wrong, and no cache has been written to.

The program's encoder adds the virtual tokens of a prompt itself. Its states are then more than the positions of the
caller's mask. The decoder's cache begins with a KV prefix, as in a model without an encoder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.arguments import validate
from adaptc.generation.prefix.prefix_for import prefix_attachments, prefix_input_names
from adaptc.generation.seq2seq.seq2seq_cache import CrossCache, check_equal_rows
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.spec import StepRunner, cache_argument_name


def check_generate_arguments(
    spec: Seq2SeqSpec, inputs: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the checked arguments of ``generate``: the encoder's input, or None, and all others by name.

    Raises AdaptcError for arguments that the program or its cache cannot take.
    """
    inputs = validate.pop_main_input(spec, inputs, kwargs)
    past = validate.pop_cache(spec, kwargs)
    for name in ("inputs_embeds", "decoder_inputs_embeds"):
        if kwargs.get(name) is not None:
            raise AdaptcError(f"{name} is not taken by a program with an encoder: give {spec.main_input_name}")
    decoder_input_ids, mask = kwargs.get("decoder_input_ids"), kwargs.get("attention_mask")
    if decoder_input_ids is not None:
        validate.check_input_ids(spec, decoder_input_ids, "decoder_input_ids")
    if inputs is not None:
        check_encoder_input(spec, inputs, None if spec.feature_shape else mask)
    if (encoder_states := states_from_outputs(kwargs.get("encoder_outputs"))) is not None:
        check_encoder_states(spec, encoder_states, None if spec.feature_shape else mask)
    if past is None:
        read = require_encoder_input(spec, inputs if encoder_states is None else encoder_states)
        validate.check_cache_size(spec, read.shape[0], 0)
        if decoder_input_ids is not None:
            check_equal_rows(read.shape[0], decoder_input_ids.shape[0])
            _check_decoder_mask(kwargs, decoder_input_ids)
        return inputs, kwargs
    past = validate.as_own_cache(spec, past)
    past.check_finished()
    assert isinstance(past, CrossCache)
    return None, _arguments_with_cache(spec, past, inputs, encoder_states, kwargs)


def _arguments_with_cache(
    spec: Seq2SeqSpec, past: CrossCache, inputs: Any, encoder_states: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a generation that continues from ``past``, which knows what the encoder read."""
    from transformers.modeling_outputs import BaseModelOutput

    if past.states is None:
        raise AdaptcError("the cache holds nothing: leave it out, or give what gen.prefill(...) gave")
    if inputs is not None or encoder_states is not None:
        what = spec.main_input_name if encoder_states is None else "encoder_outputs"
        raise AdaptcError(f"the cache knows what the encoder read: leave {what} out, or the cache")
    decoder_input_ids, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    if past.decoded_length and (decoder_input_ids is None or decoder_input_ids.shape[1] <= past.decoded_length):
        raise AdaptcError(
            f"the cache holds {past.decoded_length} positions: give decoder_input_ids with the tokens of all of them "
            "and at least one more"
        )
    if decoder_input_ids is not None:
        check_equal_rows(past.rows, decoder_input_ids.shape[0])
        _check_decoder_mask(kwargs, decoder_input_ids)
    if past.decoded_length and mask is None:
        # Without one transformers would take all tokens for new ones.
        new = past.mask.new_ones(past.rows, decoder_input_ids.shape[1] - past.decoded_length)  # type: ignore[union-attr]
        kwargs["decoder_attention_mask"] = torch.cat([past.mask[:, past.prefix_length : past.length], new], 1)
    known: Any = BaseModelOutput(last_hidden_state=past.states)  # type: ignore[arg-type]
    return {**kwargs, "encoder_outputs": known, "attention_mask": past.states_mask, cache_argument_name(): past}


def _check_decoder_mask(kwargs: Mapping[str, Any], decoder_input_ids: Tensor) -> None:
    name = "decoder_attention_mask"
    validate.check_attention_mask(kwargs.get(name), decoder_input_ids.shape, 0, name)


def require_encoder_input(spec: Seq2SeqSpec, source: Tensor | None) -> Tensor:
    """Return the encoder's input ``source``. Raises AdaptcError where it is None."""
    if source is None:
        raise AdaptcError(
            f"there is nothing to encode: give {spec.main_input_name}, encoder_outputs, or a cache of gen.prefill"
        )
    return source


def check_encoder_input(spec: Seq2SeqSpec, inputs: Any, mask: Any) -> None:
    """Raise AdaptcError for an input or mask that the encoder cannot take."""
    if spec.feature_shape is None:
        validate.check_input_ids(spec, inputs)
        if inputs.shape[1] == 0:
            raise AdaptcError("input_ids has no tokens: give the encoder one at least")
        validate.check_attention_mask(mask, inputs.shape, 0)
        if spec.max_source_length is not None and inputs.shape[1] > spec.max_source_length:
            raise AdaptcError(
                f"{inputs.shape[1]} tokens are more than the {spec.max_source_length} that the encoder is for"
            )
        return
    found = tuple(inputs.shape) if isinstance(inputs, Tensor) else f"a {type(inputs).__name__}"
    mels, frames = spec.feature_shape
    # Longer recordings are cut by whisper's own generation.
    if not isinstance(inputs, Tensor) or inputs.ndim != 3 or inputs.shape[1] != mels or inputs.shape[2] < frames:
        raise AdaptcError(f"{spec.main_input_name} must be a tensor (batch, {mels}, {frames}), or longer; got {found}")


def states_from_outputs(outputs: Any) -> Tensor | None:
    """Return the last hidden states in the encoder's output, a tensor or a model output; None for None.

    Raises AdaptcError for anything else.
    """
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    try:
        return outputs[0]
    except (TypeError, LookupError):
        raise AdaptcError(
            f"encoder_outputs must be what the encoder gave, gen.get_encoder()(...), got a {type(outputs).__name__}"
        ) from None


def check_encoder_states(spec: Seq2SeqSpec, encoder_states: Any, mask: Any) -> None:
    """Raise AdaptcError for states or a mask that no encoder of this model gave."""
    found = tuple(encoder_states.shape) if isinstance(encoder_states, Tensor) else f"a {type(encoder_states).__name__}"
    if (
        not isinstance(encoder_states, Tensor)
        or encoder_states.ndim != 3
        or encoder_states.shape[2] != spec.encoder_hidden_size
    ):
        raise AdaptcError(
            f"encoder_outputs must hold a tensor (batch, positions, {spec.encoder_hidden_size}); got {found}"
        )
    if encoder_states.dtype != spec.cross_layout.dtype:
        raise AdaptcError(
            f"encoder_outputs are {encoder_states.dtype}, and the program takes {spec.cross_layout.dtype}"
        )
    if spec.feature_shape is None and mask is not None and tuple(mask.shape) != tuple(encoder_states.shape[:2]):
        raise AdaptcError(
            f"attention_mask must be a tensor {tuple(encoder_states.shape[:2])}, one number for each position of the "
            f"encoder; got {tuple(mask.shape)}"
        )


def check_nothing_decoded(past: CrossCache) -> None:
    """Raise AdaptcError where several sequences per row are asked for and the cache already holds decoded tokens."""
    if past.decoded_length:
        raise AdaptcError(
            f"the cache holds {past.decoded_length} positions of one sequence each, and several are asked for: leave "
            "out num_beams and num_return_sequences, or go on from what gen.prefill(...) gave"
        )


#: the openings of the encoder, and those of the decoder's cache
ENCODER_OPENINGS, DECODER_OPENINGS = ("prompt",), ("past_key_values",)


def select_encoder_inputs(
    input_names: Collection[str], runner: StepRunner, adapter_inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return those of the ``adapter_inputs`` inputs that the encoder takes, whose names are in ``input_names``.

    Raises AdaptcError for a missing one.
    """
    names = [n for n in prefix_input_names(runner, ENCODER_OPENINGS) if n in input_names]
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
    count = max(states.shape[1] - mask.shape[1], 0)
    return torch.cat([mask.new_ones(mask.shape[0], count), mask], 1)
