"""Hold what all generators share: the program inside, the pinned adapter of a call, and transformers' ``generate``.

``causal_generator`` and ``encoder_decoder`` derive the two kinds, which say how a prompt becomes a cache and
how a step is computed.
"""

from __future__ import annotations

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptc.bank.bank import Bank
from adaptc.bank.row_adapters import parse_row_adapters
from adaptc.bank.stack_placement import make_bank
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.generation.arguments import validate
from adaptc.generation.arguments.adapter_inputs import used_input_names, with_zero_inputs
from adaptc.generation.cache.cache_change import CacheChange
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.cache.token_gates import gate_names_of_method, refuse_token_gates
from adaptc.generation.description import files_for_package, spec_to_json
from adaptc.generation.modes.step_draw import draw_examples, draw_probe_steps
from adaptc.generation.spec import GenerationSpec, cache_argument_name, spec_for_passes
from adaptc.generation.step_runner import StepRunner
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import ProgramWrapper
from adaptc.state.core import ProgramCore
from adaptc.state.overrides import SCALE_KEYWORD, scaling_of_call
from adaptc.state.runner import Runner


class Generator(ProgramWrapper):
    """A generator over a program, made by ``adaptc.compile_for_generation``.

    ``config`` and ``generation_config`` are copies of the model's.

    Example:
        >>> gen = adaptc.compile_for_generation(lm, LoraConfig(r=2, target_modules=["q_proj"]), max_length=16)
        >>> gen.generate(ids, max_new_tokens=3).shape
        torch.Size([2, 10])
    """

    # What transformers asks of a model's class.
    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    _is_stateful = False

    def __init__(self, runner: StepRunner, spec: GenerationSpec) -> None:
        #: a program, a package of one, or an adapter bound to either
        self._runner: StepRunner = runner
        self.spec = spec_for_passes(spec, runner)
        self.config, self.generation_config = spec.config, spec.generation_config
        #: whether this generation has computed a step
        self.has_run_step = False

    # -- the program inside --------------------------------------------------------------------------------------------

    @property
    def program(self) -> Any:
        """Return the step program, an :class:`AdaptedProgram` or a :class:`PackagedProgram`.

        ``swap``, ``merge``, ``save`` and the other functions of adaptc work on it. Raises AdaptcError for a generator
        that keeps one adapter.
        """
        if isinstance(self._runner, Runner):
            raise AdaptcError(
                f"this generator keeps {self._runner.binding.source!r}: swap, merge and save the one that it was bound "
                "to"
            )
        return self._runner.program if isinstance(self._runner, Bank) else self._runner

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
    def as_program(self, model: Any) -> Iterator[Any]:
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
        mixes = parse_row_adapters(adapters)
        if isinstance(prompts, Tensor) and prompts.ndim and prompts.shape[0] != len(mixes):
            raise AdaptcError(
                f"adapters has {len(mixes)} entries, and there are {prompts.shape[0]} prompts: give one for each, None "
                "for the base"
            )
        return self.with_runner(self._runner.select_rows(mixes))

    def _is_of_bank(self, kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call of ``generate`` or ``prefill`` has adapters for each prompt, or must have them."""
        return "adapters" in kwargs or isinstance(self._runner, Bank)

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

    @abstractmethod
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers' ``generate`` does, with the adapter that is current at the call.

        Args:
            inputs: the prompts, token ids (batch, tokens). Whisper's encoder reads features (batch, mels, frames).
            generation_config: transformers' options.
            **kwargs: transformers' further options. ``past_key_values`` (or ``cache``) is a cache of :meth:`prefill` or
                of an earlier call, to continue from. The ids of a decoder then begin with the tokens that the cache
                holds. The call writes to the cache; ``cache.copy()`` keeps it as it was. Inputs that an adapter asks
                for, such as ``task_ids``, have a value for each prompt.

        Returns:
            what transformers returns: token ids (batch, tokens), or an output object.

        Raises:
            AdaptcError: the program cannot do it. Nothing was decoded, and no cache was written to.
        """

    @abstractmethod
    def prefill(self, inputs: Tensor, attention_mask: Tensor | None = None, **adapter_inputs: Any) -> StepCache:
        """Return the cache of a prompt, from which :meth:`generate` continues.

        Copies of the cache can be continued any number of times.

        Args:
            inputs: the prompts, token ids (batch, tokens). Whisper's encoder reads features (batch, mels, frames).
            attention_mask: (batch, tokens), zero at padding; None for prompts without padding.
            **adapter_inputs: inputs that an adapter asks for, such as ``task_ids`` (batch,).

        Returns:
            the cache.

        Raises:
            AdaptcError: the prompts do not fit the program, or the adapter's inputs are wrong.
        """

    @abstractmethod
    def new_cache(self, **adapter_inputs: Any) -> StepCache:
        """Return a cache that holds nothing but the virtual tokens of the current adapter.

        Args:
            **adapter_inputs: the inputs that these depend on, such as ``task_ids`` (batch,).

        Returns:
            the cache.

        Raises:
            AdaptcError: the adapter lacks an input, or does not take one.
        """

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

    @property
    @abstractmethod
    def is_pinned(self) -> bool:
        """Return whether this object is of one generation, whose adapter it keeps."""

    @abstractmethod
    def pin(self) -> None:
        """Keep the adapter that is current now, on this object."""

    def snapshot_call(self) -> Self:
        """Return a generator that keeps the adapter that is current now, for one generation."""
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

    def own_cache(self, past: Any, rows: int | None = None) -> StepCache:
        """Return ``past`` as a cache with ``rows`` rows that this generator may write to; None for any number.

        Raises AdaptcError for a cache of another program, and for one that another call writes to.
        """
        found = validate.as_own_cache(self.spec, past, rows)
        found.check_finished(is_own_generation=self.is_pinned)
        return found

    # -- what transformers asks of a model -----------------------------------------------------------------------------

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

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        own = used_input_names(self._runner).values()
        super()._validate_model_kwargs({n: v for n, v in model_kwargs.items() if n not in own})  # type: ignore[misc]

    def _get_stopping_criteria(self, generation_config: Any, stopping_criteria: Any, tokenizer: Any = None) -> Any:
        if tokenizer is None and generation_config.stop_strings is not None:
            tokenizer = self.tokenizer
        return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)  # type: ignore[misc]


def step_arguments(name: str, new_tokens: Tensor, positions_name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the next step: ``new_tokens`` as ``name``, their position_ids, and all others.

    Arguments of generation modes, such as a tokenizer, are left out; transformers hands them on to steps.
    """
    others = {n: v for n, v in kwargs.items() if n not in validate.MODE_ARGUMENTS}
    positions, count = others.get(positions_name), new_tokens.shape[1]
    if positions is not None and positions.shape[-1] != count:
        others[positions_name] = positions[:, -count:]
    return {name: new_tokens, **others}
