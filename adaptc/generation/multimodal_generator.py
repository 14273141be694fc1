"""Generate from prompts with images or audio: their embeddings are computed once, and the steps go on from them.

The program has two parts (see ``prompt_part``), and transformers' own ``generate`` runs over the second. Prompts of
text alone take the second part only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation.arguments import validate
from adaptc.generation.arguments.adapter_inputs import expected_inputs
from adaptc.generation.arguments.step_tokens import StepTokens
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.causal_generator import CausalGenerator
from adaptc.generation.multimodal.multimodal_spec import MultimodalSpec
from adaptc.generation.multimodal.prompt_part import EMBEDS, POSITIONS, PROMPT_OUTPUTS
from adaptc.generation.prefix.prefix_for import prefix_attachments
from adaptc.generation.spec import cache_argument_name

#: the names of settings of configs that say which tokens images and audio take the place of
PLACEHOLDERS = tuple(f"{what}_token_{form}" for what in ("image", "video", "audio") for form in ("id", "index"))


class MultimodalGenerator(CausalGenerator):
    """A generator over a model that reads images or audio beside text, made by ``adaptc.compile_for_generation`` with
    an example of such a prompt.

    ``.program`` is one program for both parts, so a swap changes the tower, the projector and the language model.
    """

    spec: MultimodalSpec
    draws_own_inputs = True

    def bank(self, adapters: Mapping[str, Any] | None = None, **limits: Any) -> NoReturn:
        """Raise ConfigError: images of several prompts lie in one tensor, which does not say whose they are."""
        raise ConfigError(
            "a bank has adapters for each prompt, and the images of all prompts lie in one tensor: generate the "
            "prompts of each adapter by themselves, with gen.bind(adapter).generate(...)"
        )

    # -- prompts -------------------------------------------------------------------------------------------------------

    def prepare_generation(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        prompt = self._pop_prompt(kwargs)
        inputs, kwargs = super().prepare_generation(inputs, kwargs)
        if prompt:
            ids: Any = kwargs.get("input_ids") if inputs is None else inputs
            kwargs |= self.embed_prompt(prompt, ids, kwargs, kwargs.get(cache_argument_name()))
        return inputs, kwargs

    def read_prompt(
        self, past: StepCache, inputs: Tensor | None, attention_mask: Tensor | None, adapter_inputs: dict[str, Any]
    ) -> None:
        if self._pop_prompt(dict(adapter_inputs)):
            self.forward(inputs, attention_mask, None, past, logits_to_keep=1, **adapter_inputs)
        else:
            super().read_prompt(past, inputs, attention_mask, adapter_inputs)

    def run_step(self, new: StepTokens, past: Any, *, others: dict[str, Any], **options: Any) -> Any:
        """Compute the step of the tokens ``new``; ``others`` may have the images or audio of their prompt."""
        if prompt := self._pop_prompt(others):
            given = {**others, **{n: getattr(new, n) for n in ("inputs_embeds", "attention_mask", "position_ids")}}
            made = self.embed_prompt(prompt, new.input_ids, given, past)
            of_images = {n: made.pop(n) for n in self.spec.image_inputs} or None
            new = replace(new, input_ids=None, of_images=of_images, **made)
        elif isinstance(new.input_ids, Tensor) and not getattr(past, "length", 0):
            self._refuse_placeholders(new.input_ids)
        return super().run_step(new, past, others=others, **options)

    def _refuse_placeholders(self, input_ids: Tensor) -> None:
        """Raise AdaptcError for tokens in whose place images or audio belong, where none are given."""
        for name in PLACEHOLDERS:
            token = getattr(self.config, name, None)
            if isinstance(token, int) and bool((input_ids == token).any()):
                raise AdaptcError(
                    f"input_ids has placeholders ({name}={token}) without their images or audio: give "
                    f"{', '.join(self.spec.prompt_inputs)}, too"
                )

    def _pop_prompt(self, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Remove the inputs of images or audio from ``kwargs`` and return them; {} for a prompt of text alone.

        Raises AdaptcError where some are missing.
        """
        spec = self.spec
        given = {n: v for n in spec.prompt_inputs if (v := kwargs.pop(n, None)) is not None}
        if not given.keys() - set(spec.token_inputs):
            marked = [n for n, v in given.items() if isinstance(v, Tensor) and bool(v.any())]
            if marked:
                raise AdaptcError(f"{marked[0]} marks tokens of images or audio, and the prompt has none")
            return {}
        if missing := [n for n in spec.prompt_inputs if n not in given]:
            raise AdaptcError(
                f"the prompt has {', '.join(given)} and lacks {', '.join(missing)}: give all that the processor returns"
            )
        if strange := [n for n, v in given.items() if not isinstance(v, Tensor)]:
            raise AdaptcError(f"{strange[0]} must be a tensor, not a {type(given[strange[0]]).__name__}")
        return given

    def embed_prompt(
        self, prompt: Mapping[str, Tensor], input_ids: Any, others: Mapping[str, Any], past: Any
    ) -> dict[str, Any]:
        """Return inputs_embeds and what else a step reads of a prompt with images or audio, by name.

        position_ids are among it where the model has its own, unless the caller gave some.

        ``others`` are the further arguments of the call. Raises AdaptcError for a prompt that cannot begin a cache.
        """
        spec = self.spec
        if others.get("inputs_embeds") is not None:
            raise AdaptcError("inputs_embeds is not taken beside images or audio, whose placeholders are tokens")
        if self.token_gates is not None or prefix_attachments(self._runner):
            raise AdaptcError(
                "the current adapter reads the tokens of a prompt, or puts its own in front, and images or audio are "
                "not taken beside them: give prompts of text, or swap to another adapter"
            )
        if past is not None and past.length:
            raise AdaptcError(
                "images and audio are read into a new cache, and this one holds a text: give the whole prompt without "
                "the cache"
            )
        validate.check_input_ids(spec, input_ids)
        mask = others.get("attention_mask")
        validate.check_attention_mask(mask, input_ids.shape, 0)
        validate.check_cache_size(spec, *input_ids.shape)
        mask = torch.ones_like(input_ids) if mask is None else mask.long()
        part = self.parts["prompt"]
        whole = spec.part_inputs({"input_ids": input_ids, "attention_mask": mask, **prompt})
        whole |= {n: v for n, v in others.items() if n in part.inputs and n not in whole}
        known = expected_inputs(self._runner)
        with torch.no_grad():
            made = part.run(**{n: _cast_like(whole[n], known[n]).to(self.device).contiguous() for n in part.inputs})
        out: dict[str, Any] = {"inputs_embeds": made[EMBEDS]}
        if spec.position_axes and others.get("position_ids") is None:
            out["position_ids"] = made[POSITIONS].permute(2, 0, 1)
        return out | {name: made[PROMPT_OUTPUTS[name]] for name in spec.image_inputs}

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.prefill_chunk_size and model_kwargs.get("inputs_embeds") is not None:
            raise AdaptcError(
                "prefill_chunk_size is not taken for a prompt with images or audio, which is read as a whole: leave it "
                "out"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs({n: v for n, v in model_kwargs.items() if n not in self.spec.image_inputs})


def _cast_like(value: Tensor, expected: Any) -> Tensor:
    """Return ``value`` in the dtype of the expected input, since processors give float32 and int64 for any model."""
    kinds = {(t.dtype.is_floating_point, t.dtype == torch.bool) for t in (value, expected)}
    return value.to(expected.dtype) if len(kinds) == 1 else value
