"""Convert a text to token ids (1, length), int64, from a string with its tokenizer or from ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import ConfigError, short_repr


def text_to_ids(
    text: str | Tensor | Sequence[int], tokenizer: Any, use_chat_template: bool = True, max_length: int | None = None
) -> Tensor:
    """Return the token ids (1, length), int64, of ``text``, with at least one token.

    With ``use_chat_template``, a string becomes the system turn of a conversation if ``tokenizer`` has a chat template.
    ``max_length`` is the most tokens. Raises ConfigError for anything but a text with its tokenizer, or ids of one
    text.
    """
    if max_length is not None and max_length < 1:
        raise ConfigError(f"max_length={max_length} leaves nothing of the text")
    if isinstance(text, str):
        if tokenizer is None:
            raise ConfigError("the text is a string, and there is no tokenizer: give one, or the ids of its tokens")
        ids = _tokenize(text, tokenizer, use_chat_template, max_length)
    else:
        if tokenizer is not None:
            raise ConfigError("the text is given as token ids, which need no tokenizer: leave it out")
        ids = _check_ids(text)
    ids = ids if max_length is None else ids[:, :max_length]
    if not ids.numel():
        raise ConfigError("the text has no tokens")
    return ids


def _tokenize(text: str, tokenizer: Any, use_chat_template: bool, max_length: int | None) -> Tensor:
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, return_tensors="pt")
    else:
        cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
        ids = tokenizer(text, return_tensors="pt", **cut)["input_ids"]
    return _check_ids(ids)


def _check_ids(tokens: Any) -> Tensor:
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the text is a string or token ids, got {short_repr(tokens)}") from error
    ids = ids[None] if ids.ndim == 1 else ids
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or ids.shape[0] != 1 or not (whole or not ids.numel()):
        raise ConfigError(
            f"token ids are whole numbers (length,) or (1, length), of one text; got {tuple(ids.shape)} of {ids.dtype}"
        )
    return ids.to(torch.int64)
