"""Prompt tuning: learned virtual tokens before the token embeddings (Lester et al., arXiv 2104.08691).

File key: ``prompt_embeddings`` (num_virtual_tokens, width), with no module path. The first values are normal random
numbers, the embeddings of random tokens, or those of a text, repeated or cut to the number of rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError, short_repr
from adaptc.methods._shared.option_checks import warn_unused
from adaptc.methods._shared.program_config import ProgramConfig
from adaptc.methods.prompt.virtual_tokens import PROMPT_EMBEDDINGS, VirtualTokens
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import InitialValues

RANDOM, TEXT, SAMPLE_VOCAB = "RANDOM", "TEXT", "SAMPLE_VOCAB"


@dataclass
class PromptTuningConfig(ProgramConfig):
    """PEFT's ``PromptTuningConfig``: same names, same defaults.

    Attributes:
        prompt_tuning_init: "RANDOM" starts from normal random numbers, "SAMPLE_VOCAB" from the embeddings of random
            tokens, "TEXT" from those of a text.
        prompt_tuning_init_text: the text of "TEXT".
        tokenizer_name_or_path: the tokenizer of the text.
        tokenizer_kwargs: further options of that tokenizer.

    Example:
        >>> config = adaptc.PromptTuningConfig(num_virtual_tokens=20)
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    init_schemes: ClassVar[tuple[str, ...]] = (RANDOM, TEXT, SAMPLE_VOCAB)

    prompt_tuning_init: str = RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.prompt_tuning_init not in self.init_schemes:
            raise ConfigError(
                f"{name}.prompt_tuning_init={short_repr(self.prompt_tuning_init)} is not one of "
                f"{', '.join(self.init_schemes)}"
            )
        if self.prompt_tuning_init == TEXT:
            for option in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, option):
                    raise ConfigError(f"{name}.prompt_tuning_init='TEXT' needs {option}")
        elif self.tokenizer_kwargs:
            raise ConfigError(f"{name}.tokenizer_kwargs is for prompt_tuning_init='TEXT': leave it out")
        if self.prompt_tuning_init != TEXT:
            why = f"with prompt_tuning_init={self.prompt_tuning_init!r}: 'TEXT' is what reads it"
            warn_unused(self, ("prompt_tuning_init_text",), why)
        if "trust_remote_code" in (self.tokenizer_kwargs or {}):
            raise ConfigError(f"{name}.tokenizer_kwargs: trust_remote_code would run code of others; leave it out")

    def init_scheme(self) -> tuple[Any, ...]:
        """Return the scheme of the first values in the form of the method's field ``first``."""
        if self.prompt_tuning_init != TEXT:
            return (self.prompt_tuning_init,)
        options = json.dumps(self.tokenizer_kwargs or {}, sort_keys=True)
        return (TEXT, self.prompt_tuning_init_text, self.tokenizer_name_or_path, options)

    def method(self, name: str, kind: str) -> PromptTuning:
        assert self.num_virtual_tokens is not None
        return PromptTuning(self.num_virtual_tokens, self.init_scheme(), self.num_stacks)


@dataclass(frozen=True)
class PromptTuning(VirtualTokens):
    """Prompt tuning with ``count`` virtual tokens. ``first``: the config's scheme of the first values."""

    name: ClassVar[str] = "prompt_tuning"

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        return InitialValues(
            {PROMPT_EMBEDDINGS: self.split_stacks(PROMPT_EMBEDDINGS, initial_rows(self, op, W, generator).to(dtype))}
        )


def initial_rows(method: VirtualTokens, op: Op, W: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the first values of the rows of all stacks, (rows, width) in float32.

    ``W``: the canonical embedding weight (width, vocabulary). Raises ConfigError where the tokenizer gives a token that
    the embedding lacks.
    """
    count = method.count * method.sides
    how, *more = method.first or (RANDOM,)
    if how == RANDOM:
        return torch.randn(count, op.out_features, generator=generator).to(W.device)
    if how == SAMPLE_VOCAB:
        ids = torch.randint(0, op.in_features, (count,), generator=generator)
    else:
        found = tokenize_text(*more)
        ids = torch.tensor(found)[torch.arange(count) % len(found)]
    if int(ids.max()) >= op.in_features:
        raise ConfigError(
            f"the tokenizer of the prompt's text has token {int(ids.max())}, and the model's embedding "
            f"{op.in_features} rows: name the model's own tokenizer in tokenizer_name_or_path"
        )
    return W.detach()[:, ids.to(W.device)].t().contiguous().float()


def tokenize_text(text: str, tokenizer: str, options: str) -> list[int]:
    """Return the token ids of ``text``; raise ConfigError where there is no such tokenizer, or the text has no tokens.

    ``options``: keyword arguments of the tokenizer, as JSON.
    """
    from transformers import AutoTokenizer

    try:
        ids = AutoTokenizer.from_pretrained(tokenizer, **json.loads(options))(text)["input_ids"]
    except Exception as error:  # whatever a tokenizer has to say
        raise ConfigError(
            f"tokenizer_name_or_path={short_repr(tokenizer)} cannot be read: {short_repr(str(error))}"
        ) from error
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={short_repr(text)} has no tokens")
    return list(ids)
