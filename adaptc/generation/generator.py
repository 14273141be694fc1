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
from adaptc.generation.adapter_inputs import given_names, taken_from, with_given
from adaptc.generation.cache.cache_change import CacheChange
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.cache.token_gates import TokenGates, of_tokens, refuse_acting
from adaptc.generation.description import carried, described
from adaptc.generation.example_steps import drawn, pair
from adaptc.generation.generate_options import check_options
from adaptc.generation.generator_bank import GeneratorBank, bank_of
from adaptc.generation.model_interface import ModelInterface
from adaptc.generation.modes.cache_modes import cache_for, run_as, stepping_as
from adaptc.generation.modes.static_step import token_inputs
from adaptc.generation.prefix.prefix_arguments import behind_front
from adaptc.generation.prefix.prefix_for import begins, prefix_for, taken
from adaptc.generation.spec import NOTHING, GenerationSpec, facts_for, past_name, step_output
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import ProgramWrapper
from adaptc.runtime.calls.output_form import as_asked
from adaptc.state.bound import Keeping
from adaptc.state.overrides import SCALE


class Generator(ModelInterface, ProgramWrapper):
    """A generator over a step program, made by ``adaptc.compile_for_generation``.

    ``config`` and ``generation_config`` are copies of the model's.
    """

    def __init__(self, runs: Any, facts: GenerationSpec) -> None:
        #: a program, a package of one, or an adapter bound to either
        self._runs, self.facts = runs, facts_for(facts, runs)
        self.config, self.generation_config = facts.config, facts.generation_config
        #: the callable that computes a step, while a generation is running
        self.step: Callable[..., Any] | None = None
        #: the number of cache positions whose tokens are not part of ``input_ids``
        self.offset = 0
        #: the tokens at which an aLoRA adapter acts, while a generation is running
        self.acting: TokenGates | None = None
        #: whether this generation has computed a step
        self.begun = False

    # -- the program inside --------------------------------------------------------------------------------------------

    @property
    def program(self) -> Any:
        """Return the step program, an :class:`AdaptedProgram` or a :class:`PackagedProgram`.

        ``swap``, ``merge``, ``save`` and the other functions of adaptc work on it. Raises AdaptcError for a generator
        that keeps one adapter.
        """
        if isinstance(self._runs, Keeping):
            raise AdaptcError(
                f"this generator keeps {self._runs.binding.source!r}: swap, merge and save the one that it was bound to"
            )
        return self._runs

    @property
    def runs(self) -> Any:
        return self._runs

    def holding(self, program: AdaptedProgram) -> Self:
        """Return a generator for another version of the program.

        Raises ConfigError where its adapters read token coefficients that this step does not take.
        """
        reads = {n for a in program.adaptation.attachments for n in of_tokens(a.method)}
        refuse_acting(sorted(reads - set(self.facts.acts)), "a program that generates would be made")
        return self.with_runs(program)

    def with_runs(self, runs: Any) -> Self:
        """Return a generator with these configs for another program or a bound adapter."""
        new = type(self)(runs, self.facts)
        new.config, new.generation_config = self.config, self.generation_config
        return new

    def _known(self) -> Any:
        """Return the facts now."""
        return replace(self.facts, config=self.config, generation_config=self.generation_config)

    def beside(self) -> dict[str, str]:
        return described(self._known())

    def divided(self) -> Mapping[str, Sequence[str]] | None:
        return None

    def notes(self) -> list[str]:
        return self.facts.notes()

    def carried(self, tokenizer: Any) -> dict[str, bytes]:
        return carried(self._known(), tokenizer)

    def drawn(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return with_given(self._runs, drawn(self.facts, self.device, options))

    def probes(self) -> list[dict[str, Tensor]]:
        """Return the inputs of two steps whose rows differ, which show where the rows lie in each tensor."""
        return pair(self.facts, self.device)

    @contextlib.contextmanager
    def as_program(self, model: Any) -> Iterator[Any]:
        if not isinstance(model, nn.Module):
            yield model.program if isinstance(model, Generator) else model
            return
        with stepping_as(model, self.facts.keeps, self.facts.layout.of_passes(1), acts=self.facts.acts):
            yield model

    def bind(self, adapter: Any, **options: Any) -> Self:
        """Return a generator that keeps ``adapter``, whatever this one is swapped to; None gives the base.

        ``options`` and errors are those of :meth:`AdaptedProgram.bind`.
        """
        return self.with_runs(self.program.bind(adapter, **options))

    def bank(self, adapters: Mapping[str, Any] | None = None, **limits: Any) -> GeneratorBank:
        """Return a bank of adapters by name, of which each prompt of a batch takes its own.

        ``gen.bank({...}).generate(ids, adapters=["fr", None, {"de": 0.7, "style": 0.3}])`` generates with it.
        ``limits`` and errors are those of :meth:`AdaptedProgram.bank`.
        """
        return bank_of(self, adapters, limits)

    @property
    def base(self) -> Self:
        """Return a generator for the model without adapters; it shares the weights and needs no further memory for
        them."""
        return self.with_runs(self.program.base)

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that came with the package; None where there is none."""
        return None if self.facts.tokenizer is None else self.facts.tokenizer()

    @property
    def device(self) -> torch.device:
        return self._runs.device

    @property
    def dtype(self) -> torch.dtype:
        return self.facts.layout.dtype

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
        check_options(kwargs, generation_config, self.facts.vocabulary)
        scale = kwargs.pop(SCALE, None)
        if begins(self._runs):
            refuse_acting(self.facts.acts, "tokens of another adapter would stand in front")
            new = self.pinned(scale=scale)
            kwargs = behind_front(new, inputs, kwargs)
            kwargs, new.offset, again = validate.arguments(self.facts, inputs, kwargs)
            return new.generated(inputs, generation_config, kwargs, again)
        kwargs, offset, again = validate.arguments(self.facts, inputs, kwargs)
        new = self.pinned(offset, scale)
        if new.acting is not None:
            ids = kwargs.get("input_ids") if inputs is None else inputs
            ids = None if kwargs.get("inputs_embeds") is not None else ids
            new.acting = new.acting.for_prompt(ids, kwargs.get(past_name()), offset)
        return new.generated(inputs, generation_config, kwargs, again)

    def generated(
        self, inputs: Tensor | None, generation_config: Any, kwargs: dict[str, Any], again: bool = False
    ) -> Any:
        """Return what transformers' ``generate`` gives, for a pinned generator.

        ``again`` says that the cache holds the whole prompt. Its last token is then computed again for its logits,
        which overwrites that position.
        """
        past = kwargs.get(past_name())
        with contextlib.nullcontext() if past is None else CacheChange(past, generating=True):
            if again and past is not None:
                past.crop(-1)
            try:
                with torch.no_grad():
                    return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
            except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, OSError) as error:
                if self.begun or isinstance(error, AdaptcError):
                    raise
                raise ConfigError(str(error)) from error  # transformers refused an argument

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, **given: Any) -> StepCache:
        """Return the cache of a prompt (batch, tokens), from which :meth:`generate` continues.

        Copies of it can be continued any number of times. ``given`` has the inputs that an adapter added, such as
        ``task_ids``.
        """
        made = self.new_cache(**{n: given.pop(n) for n in taken(self._runs) if n in given})
        validate.tokens(self.facts, input_ids)
        with torch.no_grad():
            positions = None
            if attention_mask is not None:
                validate.check_mask(attention_mask, input_ids.shape, 0)
                attention_mask = made.behind(attention_mask)
                positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
                positions = made.positions(positions[:, made.begun :])
            self.forward(input_ids, attention_mask, positions, made, logits_to_keep=1, **given)
        return made

    def new_cache(self, **given: Any) -> StepCache:
        """Return a cache that holds nothing but the virtual tokens of the current adapter.

        ``given`` has the inputs that these depend on, such as ``task_ids`` (batch,). Raises AdaptcError for inputs that
        the adapter does not take, or lacks.
        """
        front = prefix_for(self._runs, self.step, self.facts, self.device, given)
        return cache_for(self.facts, self.device, front)

    def pinned(self, offset: int = 0, scale: Any = None) -> Self:
        """Return a generator that keeps the adapter that is current now, for one generation.

        ``offset`` is the number of cache positions whose tokens are not part of its ``input_ids``. ``scale`` is the
        ``adapter_scale``.
        """
        new, runs = self.twin(), self._runs
        if self.step is None:
            new.step = runs.pinned(scale)
            if self.facts.acts and not begins(runs):
                new.acting = TokenGates.of(self.facts.acts, runs, new.step.binding)  # type: ignore[union-attr]
        new.offset, new.begun = offset, False
        return new

    def __copy__(self) -> Self:
        """Return a generator on the same weights whose adapter is swapped independently."""
        return self.with_runs(copy.copy(self._runs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self)(copy.deepcopy(self._runs, memo), copy.deepcopy(self.facts, memo))
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
        bare = use_cache is False and self.facts.keeps == NOTHING
        past = past_key_values if cache is None else cache
        given = {} if past is not None else {n: others.pop(n) for n in taken(self._runs) if n in others}
        asked = inputs_embeds if input_ids is None else input_ids
        extra = taken_from(self._runs, others, asked.shape[0]) if isinstance(asked, Tensor) and asked.ndim else {}
        validate.forward(input_ids, inputs_embeds, None if bare else use_cache, others)
        if inputs_embeds is not None:
            validate.embeddings(self.facts, inputs_embeds)
        elif self.step is None:  # a generation checks its tokens when it begins
            validate.tokens(self.facts, input_ids)
        rows, tokens = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
        if past is None:
            past = self.new_cache(**given)
            if isinstance(attention_mask, Tensor) and attention_mask.shape == (rows, tokens):
                attention_mask = past.behind(attention_mask)
        else:
            past = validate.own_cache(self.facts, past, rows)
            past.check_finished(inside=self.step is not None)
        before, total = past.length, past.length + tokens
        validate.fits(self.facts, rows, total, begun=past.begun)
        validate.check_mask(attention_mask, (rows, tokens), before)
        validate.step(self.facts, rows, tokens, position_ids, logits_to_keep)
        now = self.pinned() if self.facts.acts and self.acting is None else self
        step, acting = now.step or self._runs, now.acting
        with CacheChange(past):
            past.reserve(rows, total)
            if attention_mask is None:
                past.mask[:, before:total] = 1
            else:
                past.mask[:, :total] = past.shown(attention_mask)
            inputs = token_inputs(self.facts, self.device, input_ids, inputs_embeds, rows, tokens) | extra
            if self.facts.positions:
                places = past.places(rows, tokens) if position_ids is None else position_ids
                inputs["position_ids"] = places.to(past.device).expand(rows, -1).contiguous()
            if acting is not None:
                inputs |= acting.inputs(input_ids, past, rows, tokens)
            self.begun = True
            logits = run_as(self.facts, step, past, inputs, tokens, logits_to_keep)
            past.fit(1)
            return as_asked(step_output(logits, None if bare else past), return_dict)

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
        name, new = ("inputs_embeds", inputs_embeds) if embedded else ("input_ids", input_ids)
        assert new is not None
        past = kwargs.get(past_name())
        if next_sequence_length is None and is_first_iteration and getattr(past, "begun", 0):
            # transformers takes a text whose mask is longer than its tokens for a new one. Part of it may be in the
            # cache.
            next_sequence_length = new.shape[1] + self.offset - past.length  # type: ignore[union-attr]
        if next_sequence_length is not None:
            new = new[:, -next_sequence_length:]
        cut_positions(kwargs, "position_ids", new.shape[1])
        if getattr(past, "in_places", False):  # transformers counts by the attention_mask
            kwargs["position_ids"] = past.positions(kwargs.get("position_ids"))  # type: ignore[union-attr]
        # Arguments of generation modes, such as a tokenizer, are handed on to steps; their names were checked before.
        return {name: new, **{n: v for n, v in kwargs.items() if n not in validate.MODE}}

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        name, offset = past_name(), self.offset
        past = model_kwargs.get(name)
        validate.generation(self.facts, generation_config, generation_mode, batch_size, max_cache_length, past, offset)
        if past is None and generation_config.use_cache is False:
            return  # a program without a cache gets the whole text for each token
        if past is None:
            past = model_kwargs[name] = self.new_cache()
        past.expected = max_cache_length + offset

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)  # type: ignore[misc]
        past = model_kwargs.get(past_name())
        return mask if past is None else past.whole(mask)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        own = given_names(self._runs).values()
        super()._validate_model_kwargs({n: v for n, v in model_kwargs.items() if n not in own})  # type: ignore[misc]

    def _get_stopping_criteria(self, generation_config: Any, stopping_criteria: Any, tokenizer: Any = None) -> Any:
        if tokenizer is None and generation_config.stop_strings is not None:
            tokenizer = self.tokenizer
        return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)  # type: ignore[misc]

    def __repr__(self) -> str:
        f = self.facts
        what = "keeping" if isinstance(self._runs, Keeping) else "of"
        return f"generates with up to {f.max_batch} rows of {f.max_length} positions, {what}\n{self._runs!r}"


def cut_positions(kwargs: dict[str, Any], name: str, count: int) -> None:
    """Cut the position_ids ``kwargs[name]``, if given, to those of the last ``count`` tokens."""
    positions = kwargs.get(name)
    if positions is not None and positions.shape[-1] != count:
        kwargs[name] = positions[:, -count:]


@cache
def generator_class() -> type[Generator]:
    """Return :class:`Generator` as a subclass of ``transformers.GenerationMixin``."""
    from transformers import GenerationMixin

    return type("Generator", (Generator, GenerationMixin), {"__module__": __name__})
