"""Generate by transformers' ``generate``, with the adapter that is current when a call begins.

A call of ``generate`` keeps that adapter to its end, whatever is swapped meanwhile. The cache belongs to the call, or
to its caller. ``causal_generator`` and ``encoder_decoder`` derive the two kinds of generators, which say how a prompt
becomes a cache and how a step is computed.
"""

from __future__ import annotations

import collections.abc
import contextlib
import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from adaptc.bank.bank import Bank
from adaptc.bank.row_adapters import parse_prompt_adapters
from adaptc.bank.stack_placement import make_bank
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.generation.arguments import validate
from adaptc.generation.arguments.adapter_inputs import pop_step_inputs, with_zero_inputs
from adaptc.generation.arguments.generate_options import check_options
from adaptc.generation.arguments.step_tokens import StepTokens
from adaptc.generation.cache.cache_interface import CacheChange
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.cache.token_gates import gate_names_of_method, refuse_token_gates
from adaptc.generation.description import files_for_package, spec_to_json
from adaptc.generation.modes.step_draw import draw_examples, draw_probe_steps
from adaptc.generation.prefix.prefix_for import pop_prefix_inputs, prefix_for
from adaptc.generation.spec import GenerationSpec, StepRunner, cache_argument_name, spec_for_passes
from adaptc.generation.transformers_model import TransformersModel
from adaptc.passes.protocol.program_method import PREFIX_FUNCTIONS
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import ProgramWrapper
from adaptc.runtime.calls.output_form import apply_return_dict
from adaptc.state.core import ProgramCore
from adaptc.state.overrides import SCALE_KEYWORD, scaling_of_call
from adaptc.state.runner import ProgramPart, Runner


class Generator(TransformersModel, ProgramWrapper):
    """A generator over a program, made by ``adaptc.compile_for_generation``.

    ``config`` and ``generation_config`` are copies of the model's.

    Example:
        >>> gen = adaptc.compile_for_generation(lm, LoraConfig(r=2, target_modules=["q_proj"]), max_length=16)
        >>> gen.generate(ids, max_new_tokens=3).shape
        torch.Size([2, 10])
    """

    #: the kinds of virtual tokens that a cache begins with (see ``prefix_for``)
    cache_openings: ClassVar[Sequence[str]] = PREFIX_FUNCTIONS

    def __init__(self, runner: StepRunner, spec: GenerationSpec) -> None:
        #: a program, a package of one, or an adapter bound to either
        self._runner: StepRunner = runner
        self.spec = spec_for_passes(spec, runner)
        self.config, self.generation_config = spec.config, spec.generation_config
        self.main_input_name = spec.main_input_name
        #: what computes a step with the pinned adapter; None outside of a call
        self.step: Callable[..., Any] | ProgramPart | None = None
        #: whether this object is of one generation, which has checked its tokens and owns its cache
        self.is_generating = False
        #: whether this generation has computed a step
        self.has_run_step = False
        #: the number of cache positions whose tokens are not part of the ids
        self.offset = 0
        #: whether the cache holds the whole prompt, whose last token is computed again for its logits, in its place
        self.recomputes_last = False

    # -- the program inside --------------------------------------------------------------------------------------------

    @property
    def program(self) -> Any:
        """Return the step program, an :class:`AdaptedProgram` or a :class:`PackagedProgram`.

        ``swap``, ``merge``, ``save`` and the other functions of adaptc work on it. Raises AdaptcError for a generator
        that keeps one adapter, and for that of a bank.
        """
        if isinstance(self._runner, Bank):
            raise AdaptcError(
                "each prompt has adapters of the bank: bank.replace changes one, adapters=[{name: 0.5}, ...] scales it"
            )
        if isinstance(self._runner, Runner):
            raise AdaptcError(
                f"this generator keeps {self._runner.binding.source!r}: swap, merge and save the one that it was bound "
                "to"
            )
        return self._runner

    @property
    def runner(self) -> StepRunner:
        return self._runner

    def with_program(self, program: AdaptedProgram) -> Self:
        """Return a generator for another version of the program.

        Raises ConfigError where its adapters read token coefficients that this step does not take.
        """
        reads = {n for a in program.adaptation.attachments for n in gate_names_of_method(a.method)}
        refuse_token_gates(sorted(reads - set(self.spec.token_gate_inputs)), "a program that generates would be made")
        return self.with_runner(program)

    def with_runner(self, runner: StepRunner) -> Self:
        """Return a generator with these configs for another program or a bound adapter."""
        new = type(self)(runner, self.spec)
        new.config, new.generation_config = self.config, self.generation_config
        return new

    def current_spec(self) -> GenerationSpec:
        """Return the spec with the current configs, as files hold it."""
        return replace(self.spec, config=self.config, generation_config=self.generation_config)

    def sidecar_texts(self) -> dict[str, str]:
        return spec_to_json(self.current_spec())

    def part_outputs(self) -> Mapping[str, Sequence[str]] | None:
        return self.spec.part_outputs

    def notes(self) -> list[str]:
        return self.spec.notes()

    def package_files(self, tokenizer: Any) -> dict[str, bytes]:
        return files_for_package(self.current_spec(), tokenizer)

    def example_inputs(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return with_zero_inputs(self._runner, draw_examples(self.spec.draw_inputs, self.device, options))

    def probes(self) -> list[dict[str, Tensor]]:
        """Return the inputs of two steps whose rows differ, which show where the rows lie in each tensor."""
        return draw_probe_steps(self.spec.draw_inputs, self.device)

    @contextlib.contextmanager
    def as_program(self, model: Any) -> collections.abc.Generator[Any]:
        if not isinstance(model, nn.Module):
            yield model.program if isinstance(model, Generator) else model
            return
        with self.spec.capture(model):
            yield model

    def bind(self, adapter: Any, **options: Any) -> Self:
        """Return a generator that keeps ``adapter``, whatever this one is swapped to.

        Args:
            adapter: an adapter; None gives the base.
            **options: the options of :meth:`AdaptedProgram.bind`, which also lists the errors.

        Returns:
            the generator.
        """
        return self.with_runner(self.program.bind(adapter, **options))

    def bank(self, adapters: Mapping[str, Any] | None = None, **limits: Any) -> Bank:
        """Return a bank of adapters by name, of which each prompt of a batch takes its own.

        ``gen.bank({...}).generate(ids, adapters=["fr", None, {"de": 0.7, "style": 0.3}])`` generates with it.

        Args:
            adapters: name -> adapter.
            **limits: the limits of :meth:`AdaptedProgram.bank`, which also lists the errors.

        Returns:
            the bank.

        Raises:
            ConfigError: the generator is a package, whose code was compiled for one adapter at a time.
        """
        program = self.program
        if not isinstance(program, ProgramCore):
            raise ConfigError(
                "this package has room for one adapter at a time: package a bank instead, with "
                "adaptc.package(gen.bank({...}), path)"
            )
        made = make_bank(program, adapters, probes=self.probes(), part_outputs=self.part_outputs(), **limits)
        return made.attach_generator(self)

    def for_rows(self, adapters: Any, prompts: Any) -> Self:
        """Return a generator that keeps the selection ``adapters`` for ``prompts`` (batch, ...).

        Raises AdaptcError where there are not as many entries as prompts, before any adapter is loaded, and where the
        generator has no bank.
        """
        if not isinstance(self._runner, Bank):
            raise AdaptcError(
                "adapters= names adapters of a bank: make one with bank = gen.bank({...}), and call bank.generate"
            )
        return self.with_runner(self._runner.select_rows(parse_prompt_adapters(adapters, prompts)))

    @property
    def base(self) -> Self:
        """Return a generator for the model without adapters; it shares the weights and needs no memory for them."""
        return self.with_runner(self.program.base)

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that came with the package; None where there is none."""
        return None if self.spec.tokenizer is None else self.spec.tokenizer()

    @property
    def device(self) -> torch.device:
        """Return the device of the program."""
        return self._runner.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the cache."""
        return self.spec.layout.dtype

    def __copy__(self) -> Self:
        """Return a generator on the same weights whose adapter is swapped independently."""
        return self.with_runner(copy.copy(self._runner))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self)(copy.deepcopy(self._runner, memo), copy.deepcopy(self.spec, memo))
        new.config, new.generation_config = copy.deepcopy((self.config, self.generation_config), memo)
        return new

    def __repr__(self) -> str:
        f = self.spec
        what = "keeping" if isinstance(self._runner, Runner) else "of"
        return f"generates with up to {f.max_batch} rows of {f.max_length} positions, {what}\n{self._runner!r}"

    # -- calls ---------------------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers' ``generate`` does, with the adapter that is current at the call.

        Args:
            inputs: the prompts, token ids (batch, tokens). Whisper's encoder reads features (batch, mels, frames).
            generation_config: transformers' options.
            **kwargs: transformers' further options. ``past_key_values`` (or ``cache``) is a cache of :meth:`prefill` or
                of an earlier call, to continue from. The ids of a decoder then begin with the tokens that the cache
                holds. A model without an encoder also takes the new tokens alone, with an ``attention_mask`` for all.
                The call writes to the cache; ``cache.copy()`` keeps it as it was. Inputs that an adapter asks for,
                such as ``task_ids``, have a value for each prompt. ``encoder_outputs`` takes the place of an encoder's
                input, together with the mask. ``adapters`` has an entry for each prompt, for a generator of a bank.

        Returns:
            what transformers returns: token ids (batch, tokens), or an output object.

        Raises:
            AdaptcError: the program cannot do it. Nothing was decoded, and no cache was written to.
        """
        if "adapters" in kwargs or isinstance(self._runner, Bank):
            rows = self.for_rows(kwargs.pop("adapters", ...), validate.find_prompts(self.spec, inputs, kwargs))
            return rows.generate(inputs, generation_config, **kwargs)
        check_options(kwargs, generation_config, self.spec.vocab_size)
        with self.pop_scale(kwargs):
            pinned = self.snapshot_call()
        pinned.is_generating = True
        inputs, kwargs = pinned.prepare_generation(inputs, kwargs)
        past = kwargs.get(cache_argument_name())
        with contextlib.nullcontext() if past is None else CacheChange(past, generating=True):
            if past is not None and pinned.recomputes_last:
                past.crop(-1)
            try:
                with torch.no_grad():
                    return super(Generator, pinned).generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
            except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, OSError) as error:
                if pinned.has_run_step or isinstance(error, AdaptcError):
                    raise
                raise ConfigError(str(error)) from error  # transformers refused an argument

    def prefill(
        self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, **adapter_inputs: Any
    ) -> StepCache:
        """Return the cache of a prompt, from which :meth:`generate` continues.

        Copies of the cache can be continued any number of times.

        Args:
            inputs: the prompts as for :meth:`generate`, or by the name of the model's main input.
            attention_mask: (batch, tokens), zero at padding; None for prompts without padding.
            **adapter_inputs: inputs that an adapter asks for, such as ``task_ids`` (batch,).

        Returns:
            the cache.

        Raises:
            AdaptcError: the prompts do not fit the program, or the adapter's inputs are wrong.
        """
        inputs = validate.pop_main_input(self.spec, inputs, adapter_inputs)
        if "adapters" in adapter_inputs or isinstance(self._runner, Bank):
            rows = self.for_rows(adapter_inputs.pop("adapters", ...), inputs)
            return rows.prefill(inputs, attention_mask, **adapter_inputs)
        pinned = self.snapshot_call()
        past = pinned.new_cache(**pop_prefix_inputs(self._runner, adapter_inputs, self.cache_openings))
        with torch.no_grad():
            pinned.read_prompt(past, inputs, attention_mask, adapter_inputs)
        return past

    def new_cache(self, **adapter_inputs: Any) -> StepCache:
        """Return a cache that holds nothing but the virtual tokens of the current adapter.

        Args:
            **adapter_inputs: the inputs that these depend on, such as ``task_ids`` (batch,).

        Returns:
            the cache.

        Raises:
            AdaptcError: the adapter lacks an input, or does not take one.
        """
        step = self.as_pinned().step
        assert step is not None
        prefix = prefix_for(self._runner, step, self.spec, self.device, adapter_inputs, self.cache_openings)
        return self.spec.new_cache(self.device, prefix)

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute one step: the logits of new tokens, whose keys and values go into the cache.

        Args:
            *args: the inputs of the model's ``forward``, first the token ids (batch, tokens).
            **kwargs: further inputs by name. ``past_key_values`` (or ``cache``) is the cache.

        Returns:
            transformers' output object with ``logits`` (batch, tokens, vocabulary) and ``past_key_values``. With
            ``return_dict=False`` it is a tuple.

        Raises:
            AdaptcError: the program cannot take these inputs. The cache is as it was.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def run_step(
        self,
        new: StepTokens,
        past: Any,
        *,
        use_cache: bool | None,
        returns_cache: bool,
        return_dict: bool | None,
        others: dict[str, Any],
        source: Any = None,
    ) -> Any:
        """Compute the step of the tokens ``new`` for :meth:`forward`, and write it to ``past``, or to a new cache.

        ``others`` are the further arguments of ``forward``, of which adapters take some.
        """
        rows = new.row_count
        prefix_inputs = {} if past is not None else pop_prefix_inputs(self._runner, others, self.cache_openings)
        adapter_inputs = pop_step_inputs(self._runner, others, rows) if rows else {}
        validate.check_forward_arguments(use_cache if returns_cache else None, others)
        new.check_tokens(self.spec)
        if past is None:
            past = self.new_cache(**prefix_inputs)
            new = new.after_prefix_of(past)
        else:
            past = validate.as_own_cache(self.spec, past)
            past.check_finished(is_own_generation=self.is_generating)
            past.check_rows(rows)
        new.check(self.spec, past)
        with CacheChange(past):
            self.read_source(past, source, rows, adapter_inputs)
            inputs = new.write_to(past, self.spec, self.device) | adapter_inputs
            self.has_run_step = True
            logits = self.compute_logits(past, new, inputs)
            past.resize_rings(1)
            return apply_return_dict(self.step_output(logits, past, returns_cache), return_dict)

    @property
    def is_pinned(self) -> bool:
        """Return whether this object is of one call, whose adapter it keeps."""
        return self.step is not None

    def as_pinned(self) -> Self:
        """Return this generator where it is pinned already; else one that keeps the adapter that is current now."""
        return self if self.is_pinned else self.snapshot_call()

    def snapshot_call(self) -> Self:
        """Return a generator for one call, which keeps the adapter that is current now; see :meth:`pin`."""
        new = self.shallow_copy()
        new.has_run_step = False
        if not self.is_pinned:
            new.pin()
        return new

    def pop_scale(self, kwargs: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Take the deprecated ``adapter_scale`` out of ``kwargs``; return the block in which it holds.

        Raises ConfigError for one that is not taken.
        """
        scale = kwargs.pop(SCALE_KEYWORD, ...)
        if scale is ...:
            return contextlib.nullcontext()
        if isinstance(self._runner, Runner) and scale is not None:
            raise ConfigError(
                f"{SCALE_KEYWORD}={short_repr(scale)}: what is bound keeps its adapter as it is; bind another, with "
                "program.bind(adapter, scale=...). Where each row has adapters of its own, give a row a weight, as in "
                "adapters=[{'fr': 0.5}, ...]"
            )
        return scaling_of_call(self._runner, scale, "generator.generate")

    # -- what the two kinds do, on a pinned generator ------------------------------------------------------------------

    @abstractmethod
    def pin(self) -> None:
        """Keep the adapter that is current now, in :attr:`step`."""

    @abstractmethod
    def prepare_generation(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the arguments of :meth:`generate`. Raises AdaptcError for what the program cannot do."""

    @abstractmethod
    def read_prompt(
        self, past: StepCache, inputs: Tensor | None, attention_mask: Tensor | None, adapter_inputs: dict[str, Any]
    ) -> None:
        """Read a prompt into ``past``, a new cache, for :meth:`prefill`."""

    def read_source(self, past: StepCache, source: Any, rows: int, adapter_inputs: Mapping[str, Tensor]) -> None:
        """Let ``past`` hold what an encoder makes of ``source``, before a step of ``rows`` rows."""

    @abstractmethod
    def compute_logits(self, past: StepCache, new: StepTokens, inputs: dict[str, Tensor]) -> Tensor:
        """Run the step of the tokens ``new``, which are in ``inputs``; returns the logits (batch, kept, vocabulary)."""

    @abstractmethod
    def step_output(self, logits: Tensor, past: StepCache, returns_cache: bool) -> Any:
        """Return the result of a step as transformers' output object."""
