"""Generate with a model without an encoder: a prompt is read into the cache, and each step adds tokens to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from adaptc.generation.arguments import validate
from adaptc.generation.arguments.step_tokens import StepTokens, step_arguments
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.cache.token_gates import TokenGates, refuse_token_gates
from adaptc.generation.generator import Generator
from adaptc.generation.modes.prefill_part import PREFILL, can_prefill, run_prefill, run_step_part
from adaptc.generation.prefix.prefix_for import prefix_attachments, with_prefix_arguments
from adaptc.generation.spec import GenerationSpec, StepRunner, cache_argument_name
from adaptc.state.runner import ProgramPart


class CausalGenerator(Generator):
    """A generator over a step program of a causal model."""

    def __init__(self, runner: StepRunner, spec: GenerationSpec) -> None:
        super().__init__(runner, spec)
        #: the tokens at which an aLoRA adapter acts, while a generation is running
        self.token_gates: TokenGates | None = None
        #: the program's parts with the pinned adapter, while it is pinned; none of a program that is called as a whole
        self.parts: Mapping[str, ProgramPart] = {}

    def pinned_step(self) -> Any:
        """Return what runs steps with the adapter that is current now."""
        runner = self._runner.snapshot_call()
        if self.spec.part_outputs is None:
            return runner
        self.parts = runner.parts(self.spec.part_outputs)
        return self.parts["step"]

    def run_step_program(self, **inputs: Tensor) -> Tensor:
        """Run the step program of a pinned generator; return the logits (batch, kept, vocabulary)."""
        if isinstance(self.step, ProgramPart):
            return run_step_part(self.parts["step"], **inputs)
        assert callable(self.step)
        return self.step(**inputs)

    def pin(self) -> None:
        step = self.pinned_step()
        self.step = step
        if self.spec.token_gate_inputs and not prefix_attachments(self._runner):
            self.token_gates = TokenGates.from_binding(self.spec.token_gate_inputs, self._runner, step.binding)

    def prepare_generation(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        if prefix_attachments(self._runner):
            refuse_token_gates(self.spec.token_gate_inputs, "tokens of another adapter would stand in front")
            kwargs = with_prefix_arguments(self, inputs, kwargs)
        kwargs, self.offset, self.recomputes_last = validate.check_generate_arguments(self.spec, inputs, kwargs)
        if self.token_gates is not None:
            ids = kwargs.get("input_ids") if inputs is None else inputs
            ids = None if kwargs.get("inputs_embeds") is not None else ids
            self.token_gates = self.token_gates.for_prompt(ids, kwargs.get(cache_argument_name()), self.offset)
        return inputs, kwargs

    def read_prompt(
        self, past: StepCache, inputs: Tensor | None, attention_mask: Tensor | None, adapter_inputs: dict[str, Any]
    ) -> None:
        validate.check_input_ids(self.spec, inputs)
        positions = None
        if attention_mask is not None:
            assert inputs is not None
            validate.check_attention_mask(attention_mask, inputs.shape, 0)
            attention_mask = past.prepend_prefix_mask(attention_mask)
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            positions = past.adjust_position_ids(positions[:, past.prefix_length :])
            positions = None if self.spec.counts_padding or positions is None else positions + self.spec.first_position
        self.forward(inputs, attention_mask, positions, past, logits_to_keep=1, **adapter_inputs)

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
        new = StepTokens(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            of_images={n: others.pop(n) for n in self.spec.image_inputs if n in others} or None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            are_checked=self.is_generating,
        )
        return self.as_pinned().run_step(
            new,
            past_key_values if cache is None else cache,
            use_cache=use_cache,
            returns_cache=use_cache is not False or self.spec.cache_mode.has_cache,
            return_dict=return_dict,
            others=others,
        )

    def compute_logits(self, past: StepCache, new: StepTokens, inputs: dict[str, Tensor]) -> Tensor:
        if self.token_gates is not None:
            inputs |= self.token_gates.step_inputs(new.input_ids, past, *new.shape)
        if self.spec.has_prefill and isinstance(self.step, ProgramPart) and can_prefill(self.spec, past, new.shape[1]):
            return run_prefill(self.parts[PREFILL], past, inputs, new.shape[1], new.logits_to_keep)
        return self.spec.cache_mode.run(self.run_step_program, past, inputs, new.shape[1], new.logits_to_keep)

    def step_output(self, logits: Tensor, past: StepCache, returns_cache: bool) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        fields: dict[str, Any] = {cache_argument_name(): past if returns_cache else None}
        return CausalLMOutputWithPast(logits=logits, **fields)  # type: ignore[arg-type]

    def fit_cache(self, past: StepCache, generation_config: Any, rows: int, sequences: int) -> None:
        validate.check_continued_cache(past, generation_config, rows)

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
        if not embedded:
            for image_input in self.spec.image_inputs:
                kwargs.pop(image_input, None)
        past = kwargs.get(cache_argument_name())
        if next_sequence_length is None and is_first_iteration and getattr(past, "prefix_length", 0):
            # transformers takes a text whose mask is longer than its tokens for a new one. Part of it may be in the
            # cache.
            next_sequence_length = new_tokens.shape[1] + self.offset - past.length  # type: ignore[union-attr]
        if next_sequence_length is not None:
            new_tokens = new_tokens[:, -next_sequence_length:]
        if self.spec.counts_padding:
            kwargs.pop("position_ids", None)
        arguments = step_arguments(name, new_tokens, "position_ids", kwargs)
        if getattr(past, "counts_padding", False):  # transformers counts by the attention_mask
            arguments["position_ids"] = past.adjust_position_ids(arguments.get("position_ids"))  # type: ignore[union-attr]
        positions, first = arguments.get("position_ids"), self.spec.first_position
        if first and positions is not None and positions.ndim == 2:  # the model's own, along several axes, are complete
            arguments["position_ids"] = positions + first
        return arguments

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        made = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)  # type: ignore[misc]
        mask = cast(Tensor, made)  # transformers leaves its type open
        past = model_kwargs.get(cache_argument_name())
        return mask if past is None else past.full_mask(mask)
