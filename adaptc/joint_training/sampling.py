"""Sample texts with an adapter that trains, on the same tensors.

A generator is captured once for the adapters of a bank. It shares the base with the program that trains. Each call
binds the adapter's own tensors, so nothing is copied, and no value that was computed from older ones is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.generation.compile_generation import compile_for_generation
from adaptc.generation.generator import Generator
from adaptc.global_generator import seeded_global_generator
from adaptc.program.add_adapter import to_adapter_data
from adaptc.state.core import ProgramCore
from adaptc.torch_typing import is_list_or_tuple, to_python
from adaptc.value_types import field_rules, validate_option

#: the most rows of a cache, and the most positions where the model numbers none: only memory limits them
_UNLIMITED = 2**24


@dataclass(frozen=True)
class SamplingParams:
    """The options of sampling. Raises ConfigError for a value that is none.

    Attributes:
        max_tokens: the most new tokens of a text.
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_k: from how many tokens to draw; 0 for all.
        top_p: from which part of the probability to draw.
        seed: the seed of the draws; None for torch's global generator.
        stop: ids of tokens that end a text; None for the model's own.

    Example:
        >>> adaptc.training.SamplingParams(max_tokens=4, temperature=0).top_p
        1.0
    """

    max_tokens: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, rule in field_rules(type(self)).items():
            validate_option(name, rule, getattr(self, name))
        if self.max_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"{self} cannot be sampled with: max_tokens is from 1, temperature and top_k from 0 upwards, and top_p "
                "above 0 and at most 1"
            )

    def generation_options(self) -> dict[str, Any]:
        """Return the options as ``generate`` takes them."""
        options: dict[str, Any] = {"max_new_tokens": self.max_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {"temperature": float(self.temperature), "top_k": self.top_k, "top_p": self.top_p}
        return options if self.stop is None else options | {"eos_token_id": list(self.stop) or None}


@dataclass(frozen=True, eq=False)
class SampledSequence:
    """A text that was sampled. ``prompt``: the index of its prompt. ``tokens``: the new ones, with that which ended it.
    ``logprobs``: the model's for each, at temperature 1, float (tokens,). ``stop_reason``: "stop" or "length"."""

    prompt: int
    tokens: list[int]
    logprobs: Tensor
    stop_reason: str


class Sampler:
    """A generator for adapters of ``program``, a program of ``model`` that trains. ``config``: one with its sites."""

    def __init__(self, model: Any, program: ProgramCore, config: Any) -> None:
        text = model.config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None)
        self._program = program
        self._generator: Generator = compile_for_generation(
            model,
            config,
            max_batch=_UNLIMITED,
            max_length=None if positions is not None else _UNLIMITED,
            autocast_adapter_dtype=program.adaptation.autocast,
        )
        self._generator.generation_config = model.generation_config

    def sample(
        self, binding: Binding, prompts: Sequence[Sequence[int]], count: int, params: SamplingParams
    ) -> list[SampledSequence]:
        """Return ``count`` texts for each prompt, those of one prompt together."""
        shares = binding.values.keys() == self._generator.program.binding_plans.tensor_names
        adapter = replace(binding) if shares else to_adapter_data(self._program, binding.name, binding)
        longest, device = max(map(len, prompts)), self._generator.device
        rows = [[0] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        options, ends = params.generation_options(), _as_list(self._generator.generation_config.eos_token_id)
        ends = ends if params.stop is None else list(params.stop)
        seeded = contextlib.nullcontext() if params.seed is None else seeded_global_generator(params.seed, device)
        with torch.no_grad(), seeded:
            made: Any = self._generator.bind(adapter).generate(
                torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                num_return_sequences=count,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
        new = made.sequences[:, longest:]
        logprobs = torch.stack(list(made.logits), 1).float().log_softmax(-1).gather(-1, new[..., None])[..., 0].cpu()
        return [_cut(i // count, tokens, logprobs[i], ends) for i, tokens in enumerate(to_python(new))]


def read_prompts(prompts: Any, vocab_size: int) -> list[list[int]]:
    """Return prompts as lists of token ids. Raises AdaptcError, with the number of the prompt, for one that is none."""
    if not is_list_or_tuple(prompts) or not prompts:
        raise AdaptcError(f"prompts={short_repr(prompts)} must be a list of lists of token ids")
    found: list[list[int]] = []
    for i, one in enumerate(prompts):
        source = one.to_ints() if hasattr(one, "to_ints") else one
        ids: Any = to_python(source) if isinstance(source, Tensor) else source
        if not is_list_or_tuple(ids) or not ids or not all(type(n) is int and 0 <= n < vocab_size for n in ids):
            raise AdaptcError(f"prompts[{i}] is {short_repr(ids)}: expected token ids from 0 to {vocab_size - 1}")
        found.append([*ids])
    return found


def _as_list(value: Any) -> list[int]:
    return [] if value is None else [*value] if is_list_or_tuple(value) else [value]


def _cut(prompt: int, tokens: list[int], logprobs: Tensor, ends: Sequence[int]) -> SampledSequence:
    last = next((i for i, t in enumerate(tokens) if t in ends), None)
    length = len(tokens) if last is None else last + 1
    return SampledSequence(prompt, tokens[:length], logprobs[:length], "length" if last is None else "stop")
