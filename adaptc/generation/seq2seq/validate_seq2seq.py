"""Refuse arguments of an encoder-decoder's generation before anything is computed.

Each check raises an AdaptcError that names what is wrong, and no cache has been written to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation import validate
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.seq2seq.seq2seq_cache import CrossCache
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.spec import past_name


def arguments(facts: Seq2SeqSpec, inputs: Tensor | None, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the checked arguments of ``generate``: the encoder's input, or None, and all others by name.

    Raises AdaptcError for arguments that the program or its cache cannot take.
    """
    kwargs = dict(kwargs)
    named, past = kwargs.pop(facts.main, None), kwargs.pop("past_key_values", None)
    if inputs is not None and named is not None:
        raise AdaptcError(f"{facts.main} is given twice: by its name, and in the first place")
    inputs, past = named if inputs is None else inputs, kwargs.pop("cache", None) if past is None else past
    validate.refuse(kwargs)
    for name in ("inputs_embeds", "decoder_inputs_embeds"):
        if kwargs.get(name) is not None:
            raise AdaptcError(f"{name} is not taken by a program with an encoder: give {facts.main}")
    validate.with_cache(facts, kwargs)
    ids, mask = kwargs.get("decoder_input_ids"), kwargs.get("attention_mask")
    if ids is not None:
        validate.tokens(facts, ids)
    if inputs is not None:
        source(facts, inputs, None if facts.features else mask)
    if (given := given_states(kwargs.get("encoder_outputs"))) is not None:
        states(facts, given, None if facts.features else mask)
    if past is None:
        read = needed(facts, inputs if given is None else given)
        validate.fits(facts, read.shape[0], 0)
        if ids is not None:
            same_rows(read.shape[0], ids.shape[0])
            validate.check_mask(kwargs.get("decoder_attention_mask"), ids.shape, 0)
        return inputs, kwargs
    (held := own(facts, past)).check_finished()
    return None, _going_on(facts, held, inputs, given, kwargs)


def _going_on(facts: Seq2SeqSpec, past: CrossCache, inputs: Any, given: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a generation that continues from ``past``, which knows what the encoder read."""
    from transformers.modeling_outputs import BaseModelOutput

    if past.states is None:
        raise AdaptcError("the cache holds nothing: leave it out, or give what gen.prefill(...) gave")
    if inputs is not None or given is not None:
        what = facts.main if given is None else "encoder_outputs"
        raise AdaptcError(f"the cache knows what the encoder read: leave {what} out, or the cache")
    ids, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    if past.decoded and (ids is None or ids.shape[1] <= past.decoded):
        raise AdaptcError(
            f"the cache holds {past.decoded} positions: give decoder_input_ids with the tokens of all of them and at "
            "least one more"
        )
    if ids is not None:
        same_rows(past.rows, ids.shape[0])
        validate.check_mask(mask, ids.shape, 0)
    if past.decoded and mask is None:
        # Without one transformers would take all tokens for new ones.
        new = past.mask.new_ones(past.rows, ids.shape[1] - past.decoded)  # type: ignore[union-attr]
        kwargs["decoder_attention_mask"] = torch.cat([past.mask[:, past.begun : past.length], new], 1)
    known: Any = BaseModelOutput(last_hidden_state=past.states)  # type: ignore[arg-type]
    return {**kwargs, "encoder_outputs": known, "attention_mask": past.states_mask, past_name(): past}


def own(facts: Seq2SeqSpec, past: Any) -> CrossCache:
    """Return ``past`` if it is a cache of this program, or of what is bound to it; else raise AdaptcError."""
    found = validate.own_cache(facts, past, None)
    assert isinstance(found, CrossCache)
    return found


def needed(facts: Seq2SeqSpec, source: Tensor | None) -> Tensor:
    """Return the encoder's input ``source``. Raises AdaptcError where it is None."""
    if source is None:
        raise AdaptcError(f"there is nothing to encode: give {facts.main}, encoder_outputs, or a cache of gen.prefill")
    return source


def source(facts: Seq2SeqSpec, inputs: Any, mask: Any) -> None:
    """Raise AdaptcError for an input or mask that the encoder cannot take."""
    if facts.features is None:
        validate.tokens(facts, inputs)
        if inputs.shape[1] == 0:
            raise AdaptcError("input_ids has no tokens: give the encoder one at least")
        validate.check_mask(mask, inputs.shape, 0)
        if facts.source is not None and inputs.shape[1] > facts.source:
            raise AdaptcError(f"{inputs.shape[1]} tokens are more than the {facts.source} that the encoder is for")
        return
    found = tuple(inputs.shape) if isinstance(inputs, Tensor) else f"a {type(inputs).__name__}"
    mels, frames = facts.features
    # Longer recordings are cut by whisper's own generation.
    if not isinstance(inputs, Tensor) or inputs.ndim != 3 or inputs.shape[1] != mels or inputs.shape[2] < frames:
        raise AdaptcError(f"{facts.main} must be a tensor (batch, {mels}, {frames}), or longer; got {found}")


def given_states(outputs: Any) -> Tensor | None:
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


def states(facts: Seq2SeqSpec, given: Any, mask: Any) -> None:
    """Raise AdaptcError for states or a mask that no encoder of this model gave."""
    found = tuple(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"
    if not isinstance(given, Tensor) or given.ndim != 3 or given.shape[2] != facts.hidden:
        raise AdaptcError(f"encoder_outputs must hold a tensor (batch, positions, {facts.hidden}); got {found}")
    if given.dtype != facts.cross.dtype:
        raise AdaptcError(f"encoder_outputs are {given.dtype}, and the program takes {facts.cross.dtype}")
    if facts.features is None and mask is not None and tuple(mask.shape) != tuple(given.shape[:2]):
        raise AdaptcError(
            f"attention_mask must be a tensor {tuple(given.shape[:2])}, one number for each position of the encoder; "
            f"got {tuple(mask.shape)}"
        )


def same_rows(encoded: int, decoded: int) -> None:
    """Raise AdaptcError where the encoder and the decoder have different numbers of rows."""
    if encoded != decoded:
        raise AdaptcError(f"{encoded} rows were encoded, and decoder_input_ids has {decoded}: give as many")


def places(facts: Seq2SeqSpec, front: CachePrefix) -> None:
    """Raise ConfigError for rows with different numbers of virtual tokens, where the model takes no position_ids."""
    if not facts.positions and front.ahead is not None and bool(front.ahead.any()):
        raise ConfigError(
            f"the adapters of these rows put several numbers of tokens in front, up to {front.count}, and this model "
            "counts the positions of all rows alike: generate those of each number in a batch of their own"
        )


def nothing_decoded(past: CrossCache) -> None:
    """Raise AdaptcError where several sequences per row are asked for and the cache already holds decoded tokens."""
    if past.decoded:
        raise AdaptcError(
            f"the cache holds {past.decoded} positions of one sequence each, and several are asked for: leave out "
            "num_beams and num_return_sequences, or go on from what gen.prefill(...) gave"
        )
