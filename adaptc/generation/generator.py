"""Generate with adapters: transformers' own ``generate`` over a step program.

A call of ``generate`` keeps the adapter that is current when it begins.
The cache belongs to the call, or to its caller.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation import validate
from adaptc.generation.adapter_inputs import pop_step_inputs, with_zero_inputs
from adaptc.generation.cache.cache_change import CacheChange
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.cache.token_gates import TokenGates, gate_names_of_method, refuse_token_gates
from adaptc.generation.description import files_for_package, spec_to_json
from adaptc.generation.example_steps import draw_probe_steps, with_example_inputs
from adaptc.generation.generate_options import check_options
from adaptc.generation.generator_bank import GeneratorBank, make_bank
from adaptc.generation.model_interface import ModelInterface
from adaptc.generation.modes.cache_modes import captured_in_mode, make_cache, run_in_mode
from adaptc.generation.modes.static_step import token_inputs
from adaptc.generation.prefix.prefix_arguments import with_prefix_arguments
from adaptc.generation.prefix.prefix_for import prefix_attachments, prefix_for, prefix_input_names
from adaptc.generation.spec import UNCACHED, GenerationSpec, cache_argument_name, spec_for_passes, step_output
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.runtime.calls.output_form import apply_return_dict
from adaptc.state.bound import PinnedRunner
from adaptc.state.overrides import SCALE_KEYWORD


class Generator(ModelInterface):
    """A generator over a step program, made by ``adaptc.compile_for_generation``.

    ``config`` and ``generation_config`` are copies of the model's.
    """

    def __init__(self, runner: Any, spec: GenerationSpec) -> None:
        #: a program, a package of one, or an adapter bound to either
        self._runner, self.spec = runner, spec_for_passes(spec, runner)
        self.config, self.generation_config = spec.config, spec.generation_config
        #: the callable that computes a step, while a generation is running
        self.step: Callable[..., Any] | None = None
        #: the number of cache positions whose tokens are not part of ``input_ids``
        self.offset = 0
        #: the tokens at which an aLoRA adapter acts, while a generation is running
        self.token_gates: TokenGates | None = None
        #: whether this generation has computed a step
        self.has_run_step = False

    # -- the program inside --------------------------------------------------------------------------------------------

    @property
    def program(self) -> Any:
        """Return the step program, an :class:`AdaptedProgram` or a :class:`PackagedProgram`.

        ``swap``, ``merge``, ``save`` and the other functions of adaptc work on it. Raises AdaptcError for a generator
        that keeps one adapter.
        """
        if isinstance(self._runner, PinnedRunner):
            raise AdaptcError(
                f"this generator keeps {self._runner.binding.source!r}: swap, merge and save the one that it was bound "
                "to"
            )
        return self._runner

    @property
    def runner(self) -> Any:
        return self._runner

    def with_program(self, program: AdaptedProgram) -> Self:
        """Return a generator for another version of the program.

        Raises ConfigError where its adapters read token coefficients that this step does not take.
        """
        reads = {n for a in program.adaptation.attachments for n in gate_names_of_method(a.method)}
        refuse_token_gates(sorted(reads - set(self.spec.token_gate_inputs)), "a program that generates would be made")
        return self.with_runner(program)

    def with_runner(self, runner: Any) -> Self:
        """Return a generator with these configs for another program or a bound adapter."""
        new = type(self)(runner, self.spec)
        new.config, new.generation_config = self.config, self.generation_config
        return new

    def _current_spec(self) -> Any:
        """Return the spec with the current configs."""
        return replace(self.spec, config=self.config, generation_config=self.generation_config)

    def sidecar_texts(self) -> dict[str, str]:
        return spec_to_json(self._current_spec())

    def part_outputs(self) -> Mapping[str, Sequence[str]] | None:
        return None

    def notes(self) -> list[str]:
        return self.spec.notes()

    def package_files(self, tokenizer: Any) -> dict[str, bytes]:
        return files_for_package(self._current_spec(), tokenizer)

    def example_inputs(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return with_zero_inputs(self._runner, with_example_inputs(self.spec, self.device, options))

    def probes(self) -> list[dict[str, Tensor]]:
        """Return the inputs of two steps whose rows differ, which show where the rows lie in each tensor."""
        return draw_probe_steps(self.spec, self.device)

    @contextlib.contextmanager
    def as_program(self, model: Any) -> Iterator[Any]:
        if not isinstance(model, nn.Module):
            yield model.program if isinstance(model, Generator) else model
            return
        with captured_in_mode(
            model, self.spec.cache_mode, self.spec.layout.with_passes(1), token_gate_inputs=self.spec.token_gate_inputs
        ):
            yield model

    def bind(self, adapter: Any, **options: Any) -> Self:
        """Return a generator that keeps ``adapter``, whatever this one is swapped to; None gives the base.

        ``options`` and errors are those of :meth:`AdaptedProgram.bind`.
        """
        return self.with_runner(self.program.bind(adapter, **options))

    def bank(self, adapters: Mapping[str, Any] | None = None, **limits: Any) -> GeneratorBank:
        """Return a bank of adapters by name, of which each prompt of a batch takes its own.

        ``gen.bank({...}).generate(ids, adapters=["fr", None, {"de": 0.7, "style": 0.3}])`` generates with it.
        ``limits`` and errors are those of :meth:`AdaptedProgram.bank`.
        """
        return make_bank(self, adapters, limits)

    @property
    def base(self) -> Self:
        """Return a generator for the model without adapters; it shares the weights and needs no further memory for
        them."""
        return self.with_runner(self.program.base)

    @property
    def device(self) -> torch.device:
        return self._runner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.layout.dtype

    # -- calls ---------------------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers' ``generate`` does, with the adapter that is current at the call.

        ``past_key_values`` (or ``cache``) is a cache of :meth:`prefill` or of an earlier call, to continue from.
        ``input_ids`` then begins with the tokens that are in the cache. With an ``attention_mask`` for all tokens, it
        may instead hold the new tokens alone. The call writes to the cache; ``cache.copy()`` keeps it as it was.
        ``adapter_scale`` is as for calls of programs, for this generation alone. Inputs that an adapter asks for, such
        as ``task_ids``, have a value for each prompt.

        Raises AdaptcError, before anything is computed, for what the program cannot do.
        """
        check_options(kwargs, generation_config, self.spec.vocab_size)
        scale = kwargs.pop(SCALE_KEYWORD, None)
        if prefix_attachments(self._runner):
            refuse_token_gates(self.spec.token_gate_inputs, "tokens of another adapter would stand in front")
            pinned = self.snapshot_call(scale=scale)
            kwargs = with_prefix_arguments(pinned, inputs, kwargs)
            kwargs, pinned.offset, recomputes_last = validate.check_generate_arguments(self.spec, inputs, kwargs)
            return pinned.run_generate(inputs, generation_config, kwargs, recomputes_last)
        kwargs, offset, recomputes_last = validate.check_generate_arguments(self.spec, inputs, kwargs)
        pinned = self.snapshot_call(offset, scale)
        if pinned.token_gates is not None:
            ids = kwargs.get("input_ids") if inputs is None else inputs
            ids = None if kwargs.get("inputs_embeds") is not None else ids
            pinned.token_gates = pinned.token_gates.for_prompt(ids, kwargs.get(cache_argument_name()), offset)
        return pinned.run_generate(inputs, generation_config, kwargs, recomputes_last)

    def run_generate(
        self, inputs: Tensor | None, generation_config: Any, kwargs: dict[str, Any], recomputes_last: bool = False
    ) -> Any:
        """Return what transformers' ``generate`` gives, for a pinned generator.

        ``recomputes_last`` says that the cache holds the whole prompt. Its last token is then computed again for its
        logits, which overwrites that position.
        """
        past = kwargs.get(cache_argument_name())
        with contextlib.nullcontext() if past is None else CacheChange(past, generating=True):
            if recomputes_last and past is not None:
                past.crop(-1)
            try:
                with torch.no_grad():
                    return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
            except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, OSError) as error:
                if self.has_run_step or isinstance(error, AdaptcError):
                    raise
                raise ConfigError(str(error)) from error  # transformers refused an argument

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, **adapter_inputs: Any) -> StepCache:
        """Return the cache of a prompt (batch, tokens), from which :meth:`generate` continues.

        Copies of it can be continued any number of times. ``adapter_inputs`` are those that an adapter added, such as
        ``task_ids``.
        """
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
        """Return a cache that holds nothing but the virtual tokens of the current adapter.

        ``adapter_inputs`` has the inputs that these depend on, such as ``task_ids`` (batch,). Raises AdaptcError for
        inputs that the adapter does not take, or lacks.
        """
        front = prefix_for(self._runner, self.step, self.spec, self.device, adapter_inputs)
        return make_cache(self.spec, self.device, front)

    def snapshot_call(self, offset: int = 0, scale: Any = None) -> Self:
        """Return a generator that keeps the adapter that is current now, for one generation.

        ``offset`` is the number of cache positions whose tokens are not part of its ``input_ids``. ``scale`` is the
        ``adapter_scale``.
        """
        new, runner = self.shallow_copy(), self._runner
        if self.step is None:
            new.step = runner.snapshot_call(scale)
            if self.spec.token_gate_inputs and not prefix_attachments(runner):
                new.token_gates = TokenGates.from_binding(self.spec.token_gate_inputs, runner, new.step.binding)  # type: ignore[union-attr]
        new.offset, new.has_run_step = offset, False
        return new

    def __copy__(self) -> Self:
        """Return a generator on the same weights whose adapter is swapped independently."""
        return self.with_runner(copy.copy(self._runner))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self)(copy.deepcopy(self._runner, memo), copy.deepcopy(self.spec, memo))
        new.config, new.generation_config = copy.deepcopy((self.config, self.generation_config), memo)
        return new

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

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
        returns_no_cache = use_cache is False and self.spec.cache_mode == UNCACHED
        past = past_key_values if cache is None else cache
        prefix_inputs = (
            {} if past is not None else {n: others.pop(n) for n in prefix_input_names(self._runner) if n in others}
        )
        asked = inputs_embeds if input_ids is None else input_ids
        adapter_inputs = (
            pop_step_inputs(self._runner, others, asked.shape[0]) if isinstance(asked, Tensor) and asked.ndim else {}
        )
        validate.check_forward_arguments(input_ids, inputs_embeds, None if returns_no_cache else use_cache, others)
        if inputs_embeds is not None:
            validate.check_inputs_embeds(self.spec, inputs_embeds)
        elif self.step is None:  # a generation checks its tokens when it begins
            validate.check_input_ids(self.spec, input_ids)
        rows, tokens = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
        if past is None:
            past = self.new_cache(**prefix_inputs)
            if isinstance(attention_mask, Tensor) and attention_mask.shape == (rows, tokens):
                attention_mask = past.prepend_prefix_mask(attention_mask)
        else:
            past = validate.as_own_cache(self.spec, past, rows)
            past.check_finished(is_own_generation=self.step is not None)
        cached_length, new_length = past.length, past.length + tokens
        validate.check_cache_size(self.spec, rows, new_length, prefix_length=past.prefix_length)
        validate.check_attention_mask(attention_mask, (rows, tokens), cached_length)
        validate.check_step(self.spec, rows, tokens, position_ids, logits_to_keep)
        now = self.snapshot_call() if self.spec.token_gate_inputs and self.token_gates is None else self
        step, token_gates = now.step or self._runner, now.token_gates
        with CacheChange(past):
            past.reserve(rows, new_length)
            if attention_mask is None:
                past.mask[:, cached_length:new_length] = 1
            else:
                past.mask[:, :new_length] = past.mask_without_prefix_padding(attention_mask)
            inputs = token_inputs(self.spec, self.device, input_ids, inputs_embeds, rows, tokens) | adapter_inputs
            if self.spec.takes_position_ids:
                places = past.next_position_ids(rows, tokens) if position_ids is None else position_ids
                inputs["position_ids"] = places.to(past.device).expand(rows, -1).contiguous()
            if token_gates is not None:
                inputs |= token_gates.step_inputs(input_ids, past, rows, tokens)
            self.has_run_step = True
            logits = run_in_mode(self.spec, step, past, inputs, tokens, logits_to_keep)
            past.resize_rings(1)
            return apply_return_dict(step_output(logits, None if returns_no_cache else past), return_dict)

    def __repr__(self) -> str:
        f = self.spec
        what = "keeping" if isinstance(self._runner, PinnedRunner) else "of"
        return f"generates with up to {f.max_batch} rows of {f.max_length} positions, {what}\n{self._runner!r}"


@cache
def generator_class() -> type[Generator]:
    """Return :class:`Generator` as a subclass of ``transformers.GenerationMixin``."""
    from transformers import GenerationMixin

    return type("Generator", (Generator, GenerationMixin), {"__module__": __name__})
