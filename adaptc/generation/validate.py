"""Refuse arguments of a generation before anything is computed.

Each check raises an AdaptcError that names what is wrong, and no cache has been written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, shown
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.spec import NOTHING, STATE, GenerationSpec, past_name
from adaptc.runtime.calls.call_names import call_with_tensors

#: arguments that ask for what a step program cannot do -> what to do instead; None and False are let through
_REFUSED = {
    "output_attentions": "its layers give no attention weights: ask the model itself",
    "output_hidden_states": "it gives no hidden states: ask the model itself",
    "cache_implementation": "it has a cache of its own, of the caller's: leave it out",
    "compile_config": "compile_for_generation(..., backend='inductor') compiles it",
    "labels": "it gives no loss: compile the model with adaptc.compile(model, config, training=True)",
    "token_type_ids": "it was captured without it: leave it out",
    "adapters": "each prompt has adapters of its own in a bank, gen.bank({...}).generate(ids, adapters=[...])",
    "adapter_names": "each prompt has adapters of its own in a bank, gen.bank({...}).generate(ids, adapters=[...])",
}

#: arguments of generation modes, which transformers hands on to steps
MODE = frozenset(
    {
        "tokenizer",
        "assistant_tokenizer",
        "assistant_model",
        "streamer",
        "synced_gpus",
        "inputs_tensor",
        "trust_remote_code",
    }
)


def arguments(
    facts: GenerationSpec, inputs: Tensor | None, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], int, bool]:
    """Return the checked arguments of ``generate``, an offset, and whether the last token is computed again.

    The offset is the number of cache positions whose tokens are not part of ``input_ids``. The last token is computed
    again where the cache holds the whole prompt, since its logits are needed. Raises AdaptcError for arguments that the
    program or its cache cannot take.
    """
    kwargs = dict(kwargs)
    past = kwargs.pop("past_key_values", None)
    past = kwargs.pop("cache", None) if past is None else past
    refuse(kwargs)
    with_cache(facts, kwargs)
    ids, given = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("inputs_embeds")
    if ids is not None:
        tokens(facts, ids)
        if ids.shape[1] == 0 and given is None:
            raise AdaptcError("input_ids has no tokens: give one at least, or leave it out for bos_token_id")
    if given is not None:
        embeddings(facts, given)
    mask, prompt = kwargs.get("attention_mask"), ids if given is None else given
    if past is None:
        if prompt is not None:
            check_mask(mask, prompt.shape, 0)
        return kwargs, 0, False
    if prompt is None:
        raise AdaptcError("a cache is continued by tokens: give input_ids")
    own_cache(facts, past, None).check_finished()
    kwargs[past_name()] = past
    before, (rows, length, *_) = past.length, prompt.shape
    if past.rows and past.rows % rows:
        raise AdaptcError(f"the cache has {past.rows} rows and this generation {rows}: give a prompt for each")
    if isinstance(mask, Tensor) and before and given is None and mask.shape == (rows, before + length):
        kwargs["attention_mask"] = past.shown(mask)
        return kwargs, before, False
    front = past.begun
    if front and given is not None:
        raise AdaptcError(
            f"inputs_embeds is not taken where the cache begins with {front} tokens of the adapter's: give input_ids"
        )
    if length < before - front:
        raise AdaptcError(
            f"the cache holds {before - front} positions and the prompt has {length}: give it from its first token on, "
            f"or the new tokens with an attention_mask for all {before + length}"
        )
    check_mask(mask, prompt.shape, 0)
    if mask is not None and front:
        kwargs["attention_mask"] = past.behind(mask)
    again = before == length + front and before > front
    if again:
        past.check_crop(before - 1)
    return kwargs, front, again


def with_cache(facts: GenerationSpec, kwargs: dict[str, Any]) -> None:
    """Set ``use_cache`` in the arguments of ``generate``, in place, to what the program was captured with.

    A generation config that training left with ``use_cache=False`` is overridden. Raises AdaptcError where a caller
    passes ``use_cache=False`` to a program with a cache, or ``return_dict=False``.
    """
    if kwargs.get("return_dict") is False:
        raise AdaptcError(
            "return_dict=False is not taken by generate, which gives tokens: return_dict_in_generate says whether they "
            "come in an object with scores and the cache"
        )
    kwargs.pop("return_dict", None)
    if facts.keeps == NOTHING:
        return
    if kwargs.get("use_cache") is False:
        raise AdaptcError("use_cache=False is not taken: the program was captured with a cache. Leave it out")
    kwargs["use_cache"] = True


def behind(count: int, mask: Tensor) -> Tensor:
    """Prepend ``count`` ones to ``mask`` (batch, tokens); returns (batch, count + tokens)."""
    return torch.cat([mask.new_ones(mask.shape[0], count), mask], 1)


def refuse(given: Mapping[str, Any]) -> None:
    """Raise AdaptcError for an argument that asks for what the program cannot do."""
    for name, why in _REFUSED.items():
        value = given.get(name)
        if value is not None and value is not False:
            raise AdaptcError(f"{name} is not taken by a program that generates: {why}")


def generation(
    facts: GenerationSpec, config: Any, mode: Any, batch: int, length: int, past: StepCache | None, offset: int
) -> None:
    """Check a generation as transformers has prepared it, and raise AdaptcError for what the program cannot do.

    ``config`` is the generation config in use, and ``batch`` the number of rows before beams. ``length`` is the number
    of positions that the cache needs beside the ``offset`` that it already holds.
    """
    refuse({name: getattr(config, name, None) for name in _REFUSED})
    if config.use_cache is False and facts.keeps != NOTHING:
        raise AdaptcError("use_cache=False is not taken: the program was captured with a cache. Leave it out")
    if facts.keeps == STATE and getattr(mode, "value", mode) == "assisted_generation":
        raise AdaptcError(
            "assisted decoding takes back what was guessed wrong, and the model keeps a state, which cannot be: leave "
            "out assistant_model and prompt_lookup_num_tokens"
        )
    beams = max(config.num_beams or 1, config.num_return_sequences or 1)
    rows = batch * beams
    begun = 0 if past is None else past.begun
    if past is not None and begun < past.length and begun and config.prefill_chunk_size:
        raise AdaptcError(
            f"prefill_chunk_size is not taken where a cache with text in it begins with {begun} tokens of the "
            "adapter's: leave it out"
        )
    fits(facts, rows, length + offset, f" ({batch} of {beams} sequences each)" if beams > 1 else "", begun)
    if past is not None and past.rows and past.rows != rows:
        raise AdaptcError(
            f"the cache has {past.rows} rows and this generation {rows}: cache.batch_repeat_interleave(n) makes n of "
            "each"
        )


def fits(facts: GenerationSpec, rows: int, length: int, of: str = "", begun: int = 0) -> None:
    """Raise AdaptcError where a cache cannot have ``rows`` rows or ``length`` positions.

    ``begun`` is the number of positions that are virtual tokens, and ``of`` explains the rows; both are for the
    message.
    """
    if rows > facts.max_batch:
        raise AdaptcError(
            f"{rows} rows{of} are more than max_batch={facts.max_batch}: give fewer at a time, or compile with more"
        )
    if length > facts.max_length:
        own = f", {begun} of them of tokens that the adapter has in front," if begun else ""
        raise AdaptcError(
            f"{length} positions{own} are more than max_length={facts.max_length}: give fewer tokens, ask for fewer "
            "(max_new_tokens), or compile with more"
        )


def tokens(facts: GenerationSpec, ids: Any) -> None:
    """Raise AdaptcError for anything but token ids (batch, tokens), int64 or int32, within the vocabulary."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 2:
        found = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        call = "" if isinstance(ids, Tensor) else f". {call_with_tensors('gen.generate', [], 'input_ids')}"
        raise AdaptcError(f"input_ids must be a tensor (batch, tokens) of int64, got {found}{call}")
    if ids.shape[0] == 0:
        raise AdaptcError("input_ids has no rows")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < facts.vocabulary:
        raise AdaptcError(
            f"input_ids has tokens from {int(ids.min())} to {int(ids.max())}, outside the vocabulary of "
            f"{facts.vocabulary}"
        )


def step(facts: GenerationSpec, rows: int, count: int, positions: Any, keep: Any) -> None:
    """Raise AdaptcError for a step without tokens, and for position_ids or ``logits_to_keep`` that do not fit its
    tokens.

    The step has ``count`` tokens in each of ``rows`` rows. ``keep`` is the ``logits_to_keep``.
    """
    if count == 0:
        raise AdaptcError("a step has no tokens: give one at least")
    if facts.positions and positions is not None:
        shape = tuple(positions.shape) if isinstance(positions, Tensor) else None
        if shape not in ((rows, count), (1, count)) or positions.is_floating_point():
            found = f"a {type(positions).__name__}" if shape is None else f"{shape} of {positions.dtype}"
            raise AdaptcError(f"position_ids must be a tensor {(rows, count)} of int64, got {found}")
    if isinstance(keep, Tensor) and keep.ndim == 1 and keep.dtype == torch.int64:
        if keep.numel() == 0 or (int(keep.min()) >= 0 and int(keep.max()) < count):
            return
    elif isinstance(keep, int) and not isinstance(keep, bool) and keep >= 0:
        return
    raise AdaptcError(
        f"logits_to_keep={shown(keep)} must be a number of tokens, 0 for all, or a tensor (logits,) of int64 of those "
        f"among {count} that logits are wanted of"
    )


def embeddings(facts: GenerationSpec, given: Any) -> None:
    """Raise AdaptcError for anything but embeddings (batch, tokens, width), or where the step takes none."""
    if not facts.embeds:
        raise AdaptcError("inputs_embeds is not taken: a step takes tokens alone")
    if not isinstance(given, Tensor) or given.ndim != 3 or given.shape[-1] != facts.width:
        found = tuple(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise AdaptcError(f"inputs_embeds must be a tensor (batch, tokens, {facts.width}), got {found}")
    if given.shape[0] == 0:
        raise AdaptcError("inputs_embeds has no rows")


def check_mask(mask: Any, shape: Sequence[int], before: int) -> None:
    """Raise AdaptcError for a mask that is not (batch, ``before`` + tokens), for a prompt of ``shape`` (batch, tokens).

    ``before`` is the number of positions in the cache. None is no mask, and passes.
    """
    if mask is None:
        return
    wanted = (shape[0], before + shape[1])
    if not isinstance(mask, Tensor) or mask.shape != wanted:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        has = f", {before} of them in the cache" if before else ""
        raise AdaptcError(f"attention_mask must be a tensor {wanted}, one number for each position{has}; got {found}")


def own_cache(facts: GenerationSpec, past: Any, rows: int | None) -> StepCache:
    """Return ``past`` if it is a cache of this program, or of what is bound to it, with ``rows`` rows; else raise
    AdaptcError.

    ``rows`` None means any number.
    """
    if not isinstance(past, StepCache):
        raise AdaptcError(
            f"a {type(past).__name__} is no cache of this program: gen.prefill(input_ids) and gen.generate(..., "
            "return_dict_in_generate=True) give one"
        )
    if past.owner is not facts:
        raise AdaptcError("this cache is of another program: compute the prompt again with gen.prefill(input_ids)")
    if rows is not None and past.rows and past.rows != rows:
        raise AdaptcError(f"the cache has {past.rows} rows, and the step {rows}")
    return past


def refuse_strange(given: Mapping[str, Any]) -> None:
    """Raise AdaptcError for an argument that is not an input of the program."""
    if strange := [n for n, v in given.items() if v is not None]:
        raise AdaptcError(f"{shown(strange[0])} is not an input of the program")


def forward(ids: Any, embeds: Any, use_cache: Any, others: Mapping[str, Any]) -> None:
    """Raise AdaptcError for arguments of ``forward`` that a step cannot take, and unless one of tokens and embeddings
    is given."""
    refuse(others)
    if use_cache is False:
        raise AdaptcError("use_cache=False is not taken: the program was captured with a cache. Leave it out")
    refuse_strange({n: v for n, v in others.items() if n not in _REFUSED})
    if (ids is None) == (embeds is None):
        raise AdaptcError("a step takes input_ids (batch, tokens), or inputs_embeds (batch, tokens, width) instead")
