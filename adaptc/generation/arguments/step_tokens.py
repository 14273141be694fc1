"""Check the new tokens of a step as a caller gives them, and turn them into inputs of the step program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from adaptc.generation.arguments import validate
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.modes.static_step import token_inputs
from adaptc.generation.spec import GenerationSpec

#: arguments of generation modes, which transformers hands on to steps
MODE_ARGUMENTS = frozenset(
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


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """The new tokens of one step: ``input_ids`` (rows, tokens), or ``inputs_embeds`` (rows, tokens, width) instead.

    ``of_images`` are the further inputs of a step with the embeddings of images, by name; None for text.

    ``attention_mask`` is (rows, positions), of the positions in the cache and the new ones; None where none is padding.
    ``position_ids`` is (rows, tokens) or (1, tokens), or (axes, rows, tokens) where the step numbers tokens along
    several axes; None counts on from the cache. ``logits_to_keep`` is the number
    of last tokens whose logits are wanted, 0 for all, or a tensor of token indices. ``name_prefix`` is what the names
    of these arguments begin with in errors: "decoder_" where the model has an encoder, too. ``are_checked`` says that
    a generation has checked the token ids.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None = None
    of_images: Mapping[str, Tensor] | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    logits_to_keep: int | Tensor = 0
    name_prefix: str = ""
    are_checked: bool = False

    @property
    def row_count(self) -> int:
        """Return the number of rows; 0 for what is no tensor of rows."""
        tokens = self.inputs_embeds if self.input_ids is None else self.input_ids
        return tokens.shape[0] if isinstance(tokens, Tensor) and tokens.ndim else 0

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of rows, and the number of new tokens in each."""
        given = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        assert given is not None
        return given.shape[0], given.shape[1]

    def check_tokens(self, spec: GenerationSpec) -> None:
        """Raise AdaptcError for anything but one of token ids and embeddings that the program takes."""
        validate.check_tokens_or_embeddings(self.input_ids, self.inputs_embeds, f"{self.name_prefix}input_ids")
        if self.inputs_embeds is not None:
            validate.check_inputs_embeds(spec, self.inputs_embeds)
        elif not self.are_checked:
            validate.check_input_ids(spec, self.input_ids, f"{self.name_prefix}input_ids")

    def after_prefix_of(self, past: StepCache) -> Self:
        """Return the tokens with an attention_mask that also covers the virtual tokens in ``past``, a new cache."""
        mask = self.attention_mask
        if not isinstance(mask, Tensor) or mask.shape != self.shape:
            return self
        return replace(self, attention_mask=past.prepend_prefix_mask(mask))

    def check(self, spec: GenerationSpec, past: StepCache) -> None:
        """Raise AdaptcError where the cache ``past`` has no room for the tokens, or an argument does not fit them."""
        rows, tokens = self.shape
        validate.check_cache_size(spec, rows, past.length + tokens, prefix_length=past.prefix_length)
        validate.check_attention_mask(
            self.attention_mask, (rows, tokens), past.get_seq_length(), f"{self.name_prefix}attention_mask"
        )
        validate.check_step(
            spec, rows, tokens, self.position_ids, self.logits_to_keep, f"{self.name_prefix}position_ids"
        )

    def write_to(self, past: StepCache, spec: GenerationSpec, device: torch.device) -> dict[str, Any]:
        """Make room for the tokens in ``past``, write their mask, and return the inputs of a step of them."""
        rows, tokens = self.shape
        past.reserve(rows, past.length + tokens)
        past.write_mask(self.attention_mask, tokens)
        inputs = token_inputs(spec, device, self.input_ids, self.inputs_embeds, rows, tokens, self.of_images)
        if spec.takes_position_ids:
            positions = past.offset_positions(self.position_ids, tokens)
            if positions is None:
                positions = past.next_position_ids(rows, tokens) + spec.first_position
            inputs["position_ids"] = spec.step_positions(
                positions.to(past.device).expand(*positions.shape[:-2], rows, -1)
            )
        return inputs


def step_arguments(name: str, new_tokens: Tensor, positions_name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the next step: ``new_tokens`` as ``name``, their position_ids, and all others.

    Arguments of generation modes, such as a tokenizer, are left out; transformers hands them on to steps.
    """
    others = {n: v for n, v in kwargs.items() if n not in MODE_ARGUMENTS}
    positions, count = others.get(positions_name), new_tokens.shape[1]
    if positions is not None and positions.shape[-1] != count:
        others[positions_name] = positions[..., -count:]
    return {name: new_tokens, **others}
