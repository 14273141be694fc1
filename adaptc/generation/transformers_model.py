"""Answer what transformers' ``generate`` asks of a model's class and of its methods.

``generate`` itself is transformers' own, which ``compile_generation`` mixes in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from adaptc.errors import AdaptcError
from adaptc.generation.arguments import validate
from adaptc.generation.arguments.adapter_inputs import used_input_names
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.spec import GenerationSpec, StepRunner, cache_argument_name


class TransformersModel(ABC):
    """A generator, as far as transformers' ``generate`` knows it."""

    main_input_name: str = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    _is_stateful = False

    _runner: StepRunner
    spec: GenerationSpec
    #: the number of cache positions whose tokens are not part of the ids
    offset: int

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """Return the tokenizer that came with the package; None where there is none."""

    @abstractmethod
    def new_cache(self, **adapter_inputs: Any) -> StepCache:
        """Return a cache that holds nothing but the virtual tokens of the current adapter."""

    @abstractmethod
    def fit_cache(self, past: StepCache, generation_config: Any, rows: int, sequences: int) -> None:
        """Make the caller's cache one of ``rows`` rows, ``sequences`` of each prompt, or raise AdaptcError."""

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

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        name = cache_argument_name()
        past, sequences = model_kwargs.get(name), validate.count_sequences(generation_config)
        prefix_length = 0 if past is None else min(past.prefix_length, self.offset)
        validate.check_generation(
            self.spec, generation_config, generation_mode, batch_size, max_cache_length + self.offset, prefix_length
        )
        if past is None and generation_config.use_cache is False:
            return  # a program without a cache gets the whole text for each token
        made = self.new_cache() if past is None else past
        length = max_cache_length + max(self.offset, made.prefix_length)
        validate.check_cache_size(self.spec, batch_size * sequences, length, prefix_length=made.prefix_length)
        if past is None:
            model_kwargs[name] = made
        else:
            self.fit_cache(past, generation_config, batch_size * sequences, sequences)
        made.expected_length = length

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        own = used_input_names(self._runner).values()
        super()._validate_model_kwargs({n: v for n, v in model_kwargs.items() if n not in own})  # type: ignore[misc]

    def _get_stopping_criteria(self, generation_config: Any, stopping_criteria: Any, tokenizer: Any = None) -> Any:
        if tokenizer is None and generation_config.stop_strings is not None:
            tokenizer = self.tokenizer
        return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)  # type: ignore[misc]
