"""Answer what ``transformers.GenerationMixin`` asks of a model: what its class can do, and the arguments of each step.

Only transformers calls these methods, before and while it generates. What a call of ``generate`` or of a step computes
is in ``generator``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation import validate
from adaptc.generation.adapter_inputs import used_input_names
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.spec import GenerationSpec, cache_argument_name
from adaptc.program.wrapper import ProgramWrapper


class ModelInterface(ProgramWrapper):
    """The part of a generator that transformers takes for a model."""

    spec: GenerationSpec
    #: the number of cache positions whose tokens are not part of ``input_ids``
    offset: int

    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    _is_stateful = False

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Raise AdaptcError: continuous batching runs the layers of a model, with a paged cache."""
        raise AdaptcError(
            "generate_batch needs the layers of a model: give gen.generate rows that are padded on the left"
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        return {}

    @abstractmethod
    def new_cache(self, **adapter_inputs: Any) -> StepCache:
        """Return a cache that holds nothing but the virtual tokens of the current adapter."""

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that came with the package; None where there is none."""
        return None if self.spec.tokenizer is None else self.spec.tokenizer()

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
        cut_position_ids(kwargs, "position_ids", new_tokens.shape[1])
        if getattr(past, "counts_padding", False):  # transformers counts by the attention_mask
            kwargs["position_ids"] = past.adjust_position_ids(kwargs.get("position_ids"))  # type: ignore[union-attr]
        # Arguments of generation modes, such as a tokenizer, are handed on to steps; their names were checked before.
        return {name: new_tokens, **{n: v for n, v in kwargs.items() if n not in validate.MODE_ARGUMENTS}}

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

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        own = used_input_names(self.runner).values()
        super()._validate_model_kwargs({n: v for n, v in model_kwargs.items() if n not in own})  # type: ignore[misc]

    def _get_stopping_criteria(self, generation_config: Any, stopping_criteria: Any, tokenizer: Any = None) -> Any:
        if tokenizer is None and generation_config.stop_strings is not None:
            tokenizer = self.tokenizer
        return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)  # type: ignore[misc]


def cut_position_ids(kwargs: dict[str, Any], name: str, count: int) -> None:
    """Cut the position_ids ``kwargs[name]``, if given, to those of the last ``count`` tokens."""
    positions = kwargs.get(name)
    if positions is not None and positions.shape[-1] != count:
        kwargs[name] = positions[:, -count:]
