"""Check the options of ``generate`` by their types, before transformers or torch fails on them.

A wrong type raises a ConfigError that names the option and what it takes. transformers itself checks the meaning of
values, and which options exclude each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from adaptc.errors import ConfigError, short_repr
from adaptc.torch_typing import is_list_or_tuple

_INTEGER_OPTIONS = (
    "max_length max_new_tokens min_length min_new_tokens num_beams num_return_sequences top_k no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens "
    "prefill_chunk_size"
)
_NUMBER_OPTIONS = (
    "temperature top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty "
    "length_penalty guidance_scale max_time"
)
_BOOLEAN_OPTIONS = (
    "do_sample use_cache output_scores output_logits return_dict_in_generate renormalize_logits remove_invalid_values "
    "synced_gpus"
)
_TOKEN_OPTIONS = (
    "eos_token_id pad_token_id bos_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id "
    "suppress_tokens begin_suppress_tokens"
)
#: options that must be at least one
_POSITIVE_OPTIONS = ("num_beams", "num_return_sequences")
#: options for tokens that are generated, which the vocabulary must therefore have
_GENERATED_TOKENS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim < 2 and not value.is_floating_point()
    return _is_integer(value) or (is_list_or_tuple(value) and all(map(_is_token_ids, value)))


def _is_callable_list(value: Any) -> bool:
    return is_list_or_tuple(value) and all(map(callable, value))


#: (what the option takes, for the message; whether a value is that)
_Rule = tuple[str, Callable[[Any], bool]]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_INTEGER_OPTIONS.split(), ("a whole number", _is_integer)),
    **dict.fromkeys(
        _NUMBER_OPTIONS.split(), ("a number", lambda v: not isinstance(v, bool) and isinstance(v, (Real, Tensor)))
    ),
    **dict.fromkeys(_BOOLEAN_OPTIONS.split(), ("True or False", lambda v: isinstance(v, bool))),
    **dict.fromkeys(_TOKEN_OPTIONS.split(), ("the number of a token, or a list of them", _is_token_ids)),
    "logits_processor": ("a list of functions of ids and scores", _is_callable_list),
    "stopping_criteria": ("a list of functions of ids and scores", _is_callable_list),
    "prefix_allowed_tokens_fn": ("a function of a row and its ids", callable),
    "streamer": ("an object with put and end", lambda v: hasattr(v, "put") and hasattr(v, "end")),
    "assistant_model": (
        "a model of transformers, or what generates here",
        lambda v: hasattr(v, "generate") and hasattr(v, "config"),
    ),
    "tokenizer": ("a tokenizer of transformers", lambda v: hasattr(v, "get_vocab")),
    "assistant_tokenizer": ("a tokenizer of transformers", lambda v: hasattr(v, "get_vocab")),
    "negative_prompt_ids": ("a tensor (batch, tokens)", lambda v: isinstance(v, Tensor) and v.ndim == 2),
    "watermarking_config": ("a WatermarkingConfig", lambda v: hasattr(v, "validate") or isinstance(v, dict)),
}


def check_options(kwargs: Mapping[str, Any], generation_config: Any, vocab_size: int) -> None:
    """Raise ConfigError for an option of a wrong type, and for a token to be generated that the vocabulary lacks.

    ``kwargs`` has the options by name, ``generation_config`` is a generation config or None, ``vocab_size`` the number
    of tokens.
    """
    from transformers import GenerationConfig

    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ConfigError(
            f"generation_config must be a transformers.GenerationConfig, got {short_repr(generation_config)}: "
            "GenerationConfig(**options) makes one of a dict"
        )
    for options in ({} if generation_config is None else vars(generation_config), kwargs):
        for name, (wanted, fits) in _RULES.items():
            value = options.get(name)
            if value is not None and not fits(value):
                raise ConfigError(f"{name}={short_repr(value)} is not taken by generate: it must be {wanted}")
        for name in _POSITIVE_OPTIONS:
            if (value := options.get(name)) is not None and value < 1:
                raise ConfigError(f"{name}={short_repr(value)} is not taken by generate: it must be one or more")
    for name in _GENERATED_TOKENS:
        value = kwargs.get(name)
        if value is not None and _is_integer(value) and not 0 <= value < vocab_size:
            raise ConfigError(f"{name}={short_repr(value)} is outside the vocabulary of {vocab_size} tokens")
