"""Refuse arguments of a generation before anything is computed.

Each check raises an AdaptcError that names what is wrong, and no cache has been written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, short_repr
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.spec import GenerationSpec, cache_argument_name
from adaptc.runtime.calls.call_names import call_with_tensors
from adaptc.torch_typing import is_list_or_tuple

#: arguments that ask for what a step program cannot do -> what to do instead; None and False are let through
_UNSUPPORTED = {
    "output_attentions": "its layers give no attention weights: ask the model itself",
    "output_hidden_states": "it gives no hidden states: ask the model itself",
    "cache_implementation": "it has a cache of its own, of the caller's: leave it out",
    "compile_config": "compile_for_generation(..., backend='inductor') compiles it",
    "labels": "it gives no loss: compile the model with adaptc.compile(model, config, training=True)",
    "token_type_ids": "it was captured without it: leave it out",
    "adapters": "each prompt has adapters of its own in a bank, gen.bank({...}).generate(ids, adapters=[...])",
    "adapter_names": "each prompt has adapters of its own in a bank, gen.bank({...}).generate(ids, adapters=[...])",
}

_NEEDS_CACHE = "use_cache=False is not taken: the program was captured with a cache. Leave it out"


def check_generate_arguments(
    spec: GenerationSpec, inputs: Tensor | None, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], int, bool]:
    """Return the checked arguments of ``generate``, an offset, and whether the last token is computed again.

    The offset is the number of cache positions whose tokens are not part of ``input_ids``. The last token is computed
    again where the cache holds the whole prompt, since its logits are needed. Raises AdaptcError for arguments that the
    program or its cache cannot take.
    """
    past = pop_cache(spec, kwargs)
    ids, inputs_embeds = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("inputs_embeds")
    if ids is not None:
        check_input_ids(spec, ids)
        if ids.shape[1] == 0 and inputs_embeds is None:
            raise AdaptcError("input_ids has no tokens: give one at least, or leave it out for bos_token_id")
    if inputs_embeds is not None:
        check_inputs_embeds(spec, inputs_embeds)
    mask, prompt = kwargs.get("attention_mask"), ids if inputs_embeds is None else inputs_embeds
    if past is None:
        if prompt is not None:
            check_attention_mask(mask, prompt.shape, 0)
        return kwargs, 0, False
    if prompt is None:
        raise AdaptcError("a cache is continued by tokens: give input_ids")
    as_own_cache(spec, past).check_finished()
    kwargs[cache_argument_name()] = past
    cached_length, (rows, length, *_) = past.length, prompt.shape
    if past.rows and past.rows % rows:
        raise AdaptcError(f"the cache has {past.rows} rows and this generation {rows}: give a prompt for each")
    if (
        isinstance(mask, Tensor)
        and cached_length
        and inputs_embeds is None
        and mask.shape == (rows, cached_length + length)
    ):
        kwargs["attention_mask"] = past.mask_without_prefix_padding(mask)
        return kwargs, cached_length, False
    prefix_length = past.prefix_length
    if prefix_length and inputs_embeds is not None:
        raise AdaptcError(
            f"inputs_embeds is not taken where the cache begins with {prefix_length} tokens of the adapter's: give "
            "input_ids"
        )
    if length < cached_length - prefix_length:
        raise AdaptcError(
            f"the cache holds {cached_length - prefix_length} positions and the prompt has {length}: give it from its "
            f"first token on, or the new tokens with an attention_mask for all {cached_length + length}"
        )
    check_attention_mask(mask, prompt.shape, 0)
    if mask is not None and prefix_length:
        kwargs["attention_mask"] = past.prepend_prefix_mask(mask)
    again = cached_length == length + prefix_length and cached_length > prefix_length
    if again:
        past.check_crop(cached_length - 1)
    return kwargs, prefix_length, again


def find_prompts(spec: GenerationSpec, inputs: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the argument of ``generate`` that has a row for each prompt; None where there is none.

    A cache that an encoder's states are in stands for the prompts that were encoded.
    """
    encoded: Any = kwargs.get("encoder_outputs")
    past: Any = kwargs.get("past_key_values")
    encoded = encoded[0] if is_list_or_tuple(encoded) and encoded else getattr(encoded, "last_hidden_state", encoded)
    states = getattr(kwargs.get("cache") if past is None else past, "states", None)
    known = (inputs, kwargs.get(spec.main_input_name), kwargs.get("inputs_embeds"), encoded, states)
    return next((t for t in known if t is not None), None)


def pop_cache(spec: GenerationSpec, kwargs: dict[str, Any]) -> Any:
    """Remove the cache from the arguments of ``generate``, in place, and return it; None where there is none.

    Sets ``use_cache`` to what the program was captured with, which overrides a generation config that training left
    with ``use_cache=False``. Raises AdaptcError for arguments that no program takes.
    """
    past = kwargs.pop("past_key_values", None)
    past = kwargs.pop("cache", None) if past is None else past
    refuse_unsupported(kwargs)
    if kwargs.get("return_dict") is False:
        raise AdaptcError(
            "return_dict=False is not taken by generate, which gives tokens: return_dict_in_generate says whether they "
            "come in an object with scores and the cache"
        )
    kwargs.pop("return_dict", None)
    if spec.cache_mode.has_cache:
        if kwargs.get("use_cache") is False:
            raise AdaptcError(_NEEDS_CACHE)
        kwargs["use_cache"] = True
    return past


def refuse_unsupported(kwargs: Mapping[str, Any]) -> None:
    """Raise AdaptcError for an argument that asks for what the program cannot do."""
    for name, why in _UNSUPPORTED.items():
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise AdaptcError(f"{name} is not taken by a program that generates: {why}")


def check_generation(
    spec: GenerationSpec, generation_config: Any, generation_mode: Any, batch: int, length: int, prefix_length: int
) -> None:
    """Check a generation as transformers has prepared it, and raise AdaptcError for what the program cannot do.

    ``generation_config`` is the generation config in use, and ``batch`` the number of rows before beams. ``length`` is
    the number of positions that the cache needs, of which ``prefix_length`` are virtual tokens.
    """
    refuse_unsupported({name: getattr(generation_config, name, None) for name in _UNSUPPORTED})
    if generation_config.use_cache is False and spec.cache_mode.has_cache:
        raise AdaptcError(_NEEDS_CACHE)
    is_assisted = getattr(generation_mode, "value", generation_mode) == "assisted_generation"
    if is_assisted and not spec.cache_mode.can_take_back:
        raise AdaptcError(
            "assisted decoding takes back what was guessed wrong, and the model keeps a state, which cannot be: leave "
            "out assistant_model and prompt_lookup_num_tokens"
        )
    count = count_sequences(generation_config)
    rows_note = f" ({batch} of {count} sequences each)" if count > 1 else ""
    check_cache_size(spec, batch * count, length, rows_note, prefix_length)


def count_sequences(generation_config: Any) -> int:
    """Return how many rows of the cache each prompt has: its beams, or its samples."""
    return max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)


def check_continued_cache(past: StepCache, generation_config: Any, rows: int) -> None:
    """Raise AdaptcError where a generation of ``rows`` rows cannot continue from the caller's cache ``past``."""
    begun = past.prefix_length
    if begun < past.length and begun and generation_config.prefill_chunk_size:
        raise AdaptcError(
            f"prefill_chunk_size is not taken where a cache with text in it begins with {begun} tokens of the "
            "adapter's: leave it out"
        )
    if past.rows and past.rows != rows:
        raise AdaptcError(
            f"the cache has {past.rows} rows and this generation {rows}: cache.batch_repeat_interleave(n) makes n of "
            "each"
        )


def check_cache_size(spec: GenerationSpec, rows: int, length: int, rows_note: str = "", prefix_length: int = 0) -> None:
    """Raise AdaptcError where a cache cannot have ``rows`` rows or ``length`` positions.

    ``prefix_length`` is the number of positions that are virtual tokens, and ``rows_note`` explains the rows; both are
    for the message.
    """
    if rows > spec.max_batch:
        raise AdaptcError(
            f"{rows} rows{rows_note} are more than max_batch={spec.max_batch}: give fewer at a time, or compile with "
            "more"
        )
    if length > spec.max_length:
        own = f", {prefix_length} of them of tokens that the adapter has in front," if prefix_length else ""
        raise AdaptcError(
            f"{length} positions{own} are more than max_length={spec.max_length}: give fewer tokens, ask for fewer "
            "(max_new_tokens), or compile with more"
        )


def check_input_ids(spec: GenerationSpec, input_ids: Any, name: str = "input_ids") -> None:
    """Raise AdaptcError for anything but token ids (batch, tokens), int64 or int32, within the vocabulary.

    ``name`` is the name of the argument, for the message.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32) or input_ids.ndim != 2:
        found = (
            f"{tuple(input_ids.shape)} of {input_ids.dtype}"
            if isinstance(input_ids, Tensor)
            else f"a {type(input_ids).__name__}"
        )
        call = "" if isinstance(input_ids, Tensor) else f". {call_with_tensors('gen.generate', [], name)}"
        raise AdaptcError(f"{name} must be a tensor (batch, tokens) of int64, got {found}{call}")
    if input_ids.shape[0] == 0:
        raise AdaptcError(f"{name} has no rows")
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < spec.vocab_size:
        raise AdaptcError(
            f"{name} has tokens from {int(input_ids.min())} to {int(input_ids.max())}, outside the vocabulary of "
            f"{spec.vocab_size}"
        )


def check_step(
    spec: GenerationSpec,
    rows: int,
    tokens: int,
    position_ids: Any,
    logits_to_keep: Any,
    positions_name: str = "position_ids",
) -> None:
    """Raise AdaptcError for a step without tokens, and for position_ids or ``logits_to_keep`` that do not fit its
    tokens.

    The step has ``tokens`` tokens in each of ``rows`` rows.
    """
    if tokens == 0:
        raise AdaptcError("a step has no tokens: give one at least")
    if spec.takes_position_ids and position_ids is not None:
        shape = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else None
        along_axes = [(spec.position_axes, rows, tokens)] if spec.position_axes else []
        if shape not in ((rows, tokens), (1, tokens), *along_axes) or position_ids.is_floating_point():
            found = f"a {type(position_ids).__name__}" if shape is None else f"{shape} of {position_ids.dtype}"
            raise AdaptcError(f"{positions_name} must be a tensor {(rows, tokens)} of int64, got {found}")
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 1 and logits_to_keep.dtype == torch.int64:
        if logits_to_keep.numel() == 0 or (int(logits_to_keep.min()) >= 0 and int(logits_to_keep.max()) < tokens):
            return
    elif isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool) and logits_to_keep >= 0:
        return
    raise AdaptcError(
        f"logits_to_keep={short_repr(logits_to_keep)} must be a number of tokens, 0 for all, or a tensor (logits,) of "
        f"int64 of those among {tokens} that logits are wanted of"
    )


def check_inputs_embeds(spec: GenerationSpec, inputs_embeds: Any) -> None:
    """Raise AdaptcError for anything but embeddings (batch, tokens, width), or where the step takes none."""
    if not spec.takes_inputs_embeds:
        raise AdaptcError("inputs_embeds is not taken: a step takes tokens alone")
    if not isinstance(inputs_embeds, Tensor) or inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != spec.hidden_size:
        found = tuple(inputs_embeds.shape) if isinstance(inputs_embeds, Tensor) else f"a {type(inputs_embeds).__name__}"
        raise AdaptcError(f"inputs_embeds must be a tensor (batch, tokens, {spec.hidden_size}), got {found}")
    if inputs_embeds.shape[0] == 0:
        raise AdaptcError("inputs_embeds has no rows")


def check_attention_mask(
    attention_mask: Any, shape: Sequence[int], cached_length: int, name: str = "attention_mask"
) -> None:
    """Raise AdaptcError for a mask that is not (batch, ``cached_length`` + tokens), for a prompt of ``shape`` (batch,
    tokens).

    ``cached_length`` is the number of positions in the cache, and ``name`` that of the argument. None is no mask, and
    passes.
    """
    if attention_mask is None:
        return
    wanted = (shape[0], cached_length + shape[1])
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != wanted:
        found = (
            tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else f"a {type(attention_mask).__name__}"
        )
        has = f", {cached_length} of them in the cache" if cached_length else ""
        raise AdaptcError(f"{name} must be a tensor {wanted}, one number for each position{has}; got {found}")


def as_own_cache(spec: GenerationSpec, past: Any) -> StepCache:
    """Return ``past`` if it is a cache of this program, or of what is bound to it; else raise AdaptcError."""
    name = spec.main_input_name
    if not isinstance(past, StepCache):
        raise AdaptcError(
            f"a {type(past).__name__} is no cache of this program: gen.prefill({name}) and gen.generate(..., "
            "return_dict_in_generate=True) give one"
        )
    if past.owner is not spec:
        raise AdaptcError(f"this cache is of another program: compute the prompt again with gen.prefill({name})")
    return past


def refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    """Raise AdaptcError for an argument that is not an input of the program."""
    if strange := [n for n, v in kwargs.items() if v is not None]:
        raise AdaptcError(f"{short_repr(strange[0])} is not an input of the program")


def check_forward_arguments(use_cache: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise AdaptcError for further arguments ``kwargs`` of a step that no step takes, and for ``use_cache=False``."""
    refuse_unsupported(kwargs)
    if use_cache is False:
        raise AdaptcError(_NEEDS_CACHE)
    refuse_unknown({n: v for n, v in kwargs.items() if n not in _UNSUPPORTED})


def check_tokens_or_embeddings(input_ids: Any, inputs_embeds: Any, name: str) -> None:
    """Raise AdaptcError unless one of the two is given; ``name`` is the name of ``input_ids``."""
    if (input_ids is None) == (inputs_embeds is None):
        is_causal = name == "input_ids"
        hint = (
            ", or inputs_embeds (batch, tokens, width) instead"
            if is_causal
            else ": give the tokens that begin the answer"
        )
        raise AdaptcError(f"a step takes {name} (batch, tokens){hint}")


def pop_main_input(spec: GenerationSpec, inputs: Any, kwargs: dict[str, Any]) -> Any:
    """Return ``inputs``, or else the argument with the name of the main input, which is removed from ``kwargs``.

    Raises AdaptcError where both are given.
    """
    named = kwargs.pop(spec.main_input_name, None)
    if inputs is not None and named is not None:
        raise AdaptcError(f"{spec.main_input_name} is given twice: by its name, and in the first place")
    return named if inputs is None else inputs
