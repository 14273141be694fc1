"""Answer what ``transformers.GenerationMixin`` asks of a model, where a step program has one answer."""

from __future__ import annotations

from typing import Any

from adaptc.errors import AdaptcError


class ModelInterface:
    """The part of a model's interface that is the same for all generators."""

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
