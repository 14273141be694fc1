"""Generate with a model without an encoder: a prompt is read into the cache, and each step adds tokens to it.

A call of ``generate`` keeps the adapter that is current when it begins. The cache belongs to the call, or to its
caller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adaptc.generation.arguments import validate
from adaptc.generation.arguments.adapter_inputs import pop_step_inputs
from adaptc.generation.arguments.generate_options import check_options
from adaptc.generation.arguments.step_tokens import StepTokens
from adaptc.generation.cache.cache_change import CacheChange
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.cache.token_gates import TokenGates, refuse_token_gates
from adaptc.generation.generator import Generator, step_arguments
from adaptc.generation.prefix.prefix_for import (
    prefix_attachments,
    prefix_for,
    prefix_input_names,
    with_prefix_arguments,
)
from adaptc.generation.spec import GenerationSpec, cache_argument_name, step_output
from adaptc.generation.step_runner import StepRunner
from adaptc.runtime.calls.output_form import apply_return_dict


class CausalGenerator(Generator):
    """A generator over a step program of a causal model."""

    def __init__(self, runner: StepRunner, spec: GenerationSpec) -> None:
        super().__init__(runner, spec)
        #: the callable that computes a step, while a generation is running
        self.step: Callable[..., Any] | None = None
        #: the number of cache positions whose tokens are not part of ``input_ids``
        self.offset = 0
        #: the tokens at which an aLoRA adapter acts, while a generation is running
        self.token_gates: TokenGates | None = None

    # -- calls ---------------------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers' ``generate`` does, with the adapter that is current at the call.

        ``past_key_values`` (or ``cache``) is a cache of :meth:`prefill` or of an earlier call, to continue from.
        ``input_ids`` then begins with the tokens that are in the cache. With an ``attention_mask`` for all tokens, it
        may instead hold the new tokens alone. The call writes to the cache; ``cache.copy()`` keeps it as it was.
        Inputs that an adapter asks for, such as ``task_ids``, have a value for each prompt.

        Raises AdaptcError, before anything is computed, for what the program cannot do.
        """
        if self._is_of_bank(kwargs):
            prompts = next(
                (t for t in (inputs, *(kwargs.get(n) for n in ("input_ids", "inputs_embeds"))) if t is not None), None
            )
            return self.for_rows(kwargs.pop("adapters", ...), prompts).generate(inputs, generation_config, **kwargs)
        check_options(kwargs, generation_config, self.spec.vocab_size)
        scaled = self.pop_scale(kwargs)
        if prefix_attachments(self._runner):
            refuse_token_gates(self.spec.token_gate_inputs, "tokens of another adapter would stand in front")
            with scaled:
                pinned = self.snapshot_call()
            kwargs = with_prefix_arguments(pinned, inputs, kwargs)
            kwargs, pinned.offset, recomputes_last = validate.check_generate_arguments(self.spec, inputs, kwargs)
            return pinned.run_generate(inputs, generation_config, kwargs, recomputes_last)
        kwargs, offset, recomputes_last = validate.check_generate_arguments(self.spec, inputs, kwargs)
        with scaled:
            pinned = self.snapshot_call()
        pinned.offset = offset
        if pinned.token_gates is not None:
            ids = kwargs.get("input_ids") if inputs is None else inputs
            ids = None if kwargs.get("inputs_embeds") is not None else ids
            pinned.token_gates = pinned.token_gates.for_prompt(ids, kwargs.get(cache_argument_name()), offset)
        return pinned.run_generate(inputs, generation_config, kwargs, recomputes_last)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, **adapter_inputs: Any) -> StepCache:
        """Return the cache of a prompt (batch, tokens), from which :meth:`generate` continues.

        Copies of it can be continued any number of times. ``adapter_inputs`` are those that an adapter added, such as
        ``task_ids``.
        """
        if self._is_of_bank(adapter_inputs):
            pinned = self.for_rows(adapter_inputs.pop("adapters", ...), input_ids)
            return pinned.prefill(input_ids, attention_mask, **adapter_inputs)
        past = self.new_cache(
            **{n: adapter_inputs.pop(n) for n in prefix_input_names(self._runner) if n in adapter_inputs}
        )
        validate.check_input_ids(self.spec, input_ids)
        with torch.no_grad():
            positions = None
            if attention_mask is not None:
                validate.check_attention_mask(attention_mask, input_ids.shape, 0)
                attention_mask = past.prepend_prefix_mask(attention_mask)
                positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
                positions = past.adjust_position_ids(positions[:, past.prefix_length :])
            self.forward(input_ids, attention_mask, positions, past, logits_to_keep=1, **adapter_inputs)
        return past

    def new_cache(self, **adapter_inputs: Any) -> StepCache:
        prefix = prefix_for(self._runner, self.step, self.spec, self.device, adapter_inputs)
        return self.spec.new_cache(self.device, prefix)

    @property
    def is_pinned(self) -> bool:
        return self.step is not None

    def pin(self) -> None:
        step: Any = self._runner.snapshot_call()
        self.step = step
        if self.spec.token_gate_inputs and not prefix_attachments(self._runner):
            self.token_gates = TokenGates.from_binding(self.spec.token_gate_inputs, self._runner, step.binding)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Compute one step: the logits of new tokens (batch, tokens), whose keys and values go into the cache.

        ``attention_mask`` (batch, positions) covers the positions in the cache and the new ones. Without a cache, a new
        one is made and returned in the output. ``return_dict=False`` gives the output as a tuple.
        """
        returns_no_cache = use_cache is False and not self.spec.cache_mode.has_cache
        past = past_key_values if cache is None else cache
        prefix_inputs = (
            {} if past is not None else {n: others.pop(n) for n in prefix_input_names(self._runner) if n in others}
        )
        asked = inputs_embeds if input_ids is None else input_ids
        adapter_inputs = (
            pop_step_inputs(self._runner, others, asked.shape[0]) if isinstance(asked, Tensor) and asked.ndim else {}
        )
        validate.check_forward_arguments(None if returns_no_cache else use_cache, others)
        validate.check_tokens_or_embeddings(input_ids, inputs_embeds)
        if inputs_embeds is not None:
            validate.check_inputs_embeds(self.spec, inputs_embeds)
        elif not self.is_pinned:  # a generation checks its tokens when it begins
            validate.check_input_ids(self.spec, input_ids)
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
        if past is None:
            past = self.new_cache(**prefix_inputs)
            if isinstance(attention_mask, Tensor) and attention_mask.shape == shape:
                attention_mask = past.prepend_prefix_mask(attention_mask)
        else:
            past = self.own_cache(past, shape[0])
        new = StepTokens(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
        )
        new.check(self.spec, past, past.length)
        pinned = self.snapshot_call() if self.spec.token_gate_inputs and self.token_gates is None else self
        with CacheChange(past):
            inputs = new.write_to(past, self.spec, self.device) | adapter_inputs
            if pinned.token_gates is not None:
                inputs |= pinned.token_gates.step_inputs(input_ids, past, *new.shape)
            self.has_run_step = True
            step = pinned.step or self._runner
            logits = self.spec.cache_mode.run(step, past, inputs, new.shape[1], logits_to_keep)
            past.resize_rings(1)
            return apply_return_dict(step_output(logits, None if returns_no_cache else past), return_dict)

    # -- what transformers asks of a model -----------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next step: the new tokens and their position_ids."""
        embedded = inputs_embeds is not None and is_first_iteration
        name, new_tokens = ("inputs_embeds", inputs_embeds) if embedded else ("input_ids", input_ids)
        assert new_tokens is not None
        past = kwargs.get(cache_argument_name())
        if next_sequence_length is None and is_first_iteration and getattr(past, "prefix_length", 0):
            # transformers takes a text whose mask is longer than its tokens for a new one. Part of it may be in the
            # cache.
            next_sequence_length = new_tokens.shape[1] + self.offset - past.length  # type: ignore[union-attr]
        if next_sequence_length is not None:
            new_tokens = new_tokens[:, -next_sequence_length:]
        arguments = step_arguments(name, new_tokens, "position_ids", kwargs)
        if getattr(past, "counts_padding", False):  # transformers counts by the attention_mask
            arguments["position_ids"] = past.adjust_position_ids(arguments.get("position_ids"))  # type: ignore[union-attr]
        return arguments

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        name, offset = cache_argument_name(), self.offset
        past = model_kwargs.get(name)
        validate.check_generation(
            self.spec, generation_config, generation_mode, batch_size, max_cache_length, past, offset
        )
        if past is None and generation_config.use_cache is False:
            return  # a program without a cache gets the whole text for each token
        if past is None:
            past = model_kwargs[name] = self.new_cache()
        past.expected_length = max_cache_length + offset

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)  # type: ignore[misc]
        past = model_kwargs.get(cache_argument_name())
        return mask if past is None else past.full_mask(mask)


@cache
def causal_generator_class() -> type[CausalGenerator]:
    """Return :class:`CausalGenerator` as a subclass of ``transformers.GenerationMixin``."""
    from transformers import GenerationMixin

    return type("CausalGenerator", (CausalGenerator, GenerationMixin), {"__module__": __name__})
