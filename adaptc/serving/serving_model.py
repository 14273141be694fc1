"""Answer requests with adapters of their own, driven by transformers' continuous batching.

A :class:`ServingModel` is what transformers' ``ContinuousBatchingManager`` takes for a model. It computes each step by
the paged step program, and each request's tokens by the adapters that the request has.
"""

from __future__ import annotations

import collections.abc
import contextlib
import copy
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from adaptc.bank.bank import Bank
from adaptc.bank.row_adapters import adapter_names_in, parse_row_adapters
from adaptc.bank.stack_placement import make_bank
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, short_repr
from adaptc.locks import reset_after_fork
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import ProgramWrapper
from adaptc.serving.batching_manager import AdapterPrompt, batching_manager_class, pool_positions
from adaptc.serving.paged_step import captured_as_paged_step, probe_paged_step, token_inputs_of
from adaptc.serving.request_adapter import RequestAdapter
from adaptc.serving.serving_spec import ServingSpec, files_for_package, spec_to_json
from adaptc.serving.step_adapters import step_adapters_of


class ServingModel(ProgramWrapper):
    """A model that answers requests with adapters of their own, made by ``adaptc.compile_for_serving``.

    ``generate_batch``, ``init_continuous_batching`` and ``continuous_batching_context_manager`` are transformers' own.
    Requests name adapters of :attr:`bank`. Adapters are added to it, replaced and removed while requests run.

    Example:
        >>> serving = adaptc.compile_for_serving(lm, LoraConfig(r=2, target_modules=["q_proj"]), num_blocks=8)
        >>> out = serving.generate_batch([[5, 9, 11], [3, 7]], adapters=[None, None], max_new_tokens=2)
        >>> [len(one.generated_tokens) for one in out.values()]
        [2, 2]
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _is_stateful = False
    _supports_flash_attn = False

    def __init__(self, program: AdaptedProgram | PackagedProgram, spec: ServingSpec, bank: Bank) -> None:
        self._program, self.spec, self.bank = program, spec, bank
        self.config, self.generation_config = spec.config, spec.generation_config
        #: what requests keep, of all threads
        self._requests: WeakSet[RequestAdapter] = WeakSet()
        self._lock = reset_after_fork(threading.Lock())
        self._steps = step_adapters_of(bank.placement, self._is_in_use)
        #: paged cache -> the list of logits processors that knows the requests of its next step
        self.recorders: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    # -- requests ------------------------------------------------------------------------------------------------------

    def request_adapter(self, adapter: Any = ...) -> RequestAdapter:
        """Return what a request keeps that asks for ``adapter``, as ``add_request`` takes it.

        Raises AdaptcError for a name that the bank does not have, and for a package where ``adapter`` is left out.
        """
        if adapter is ...:
            if isinstance(self._program, PackagedProgram):
                raise AdaptcError(
                    "adapter= is missing: a package has the adapters of its bank and no other. Give a name, None for "
                    "the base, or a mix"
                )
            binding = self._program.binding
            mix, bindings = {binding.name: 1.0} if binding.methods else {}, {binding.name: binding}
        else:
            (mix,) = parse_row_adapters([adapter])
            bindings = self.bank.adapters_for_call(adapter_names_in((mix,)))
        made = self._steps.request_adapter(" + ".join(mix), mix, bindings)
        with self._lock:
            self._requests.add(made)
        return made

    def check_request(self, tokens: Sequence[int], max_new_tokens: int | None, room: int | None) -> int | None:
        """Return the most new tokens of a request: ``max_new_tokens``, or for None as many as there is room for.

        Raises AdaptcError for a request that would end all others.

        Its prompt has no tokens or others than the model's, or its text exceeds the positions of the model or those of
        the cache, ``room``; None where they are not known.
        """
        spec, prompt_length = self.spec, len(tokens)
        if not prompt_length:
            raise AdaptcError("the prompt has no tokens")
        given: Sequence[Any] = tokens  # callers may give anything
        for token in given:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < spec.vocab_size:
                raise AdaptcError(
                    f"the prompt has the token {short_repr(token)}: the model has the whole numbers below "
                    f"{spec.vocab_size}"
                )
        wanted: Any = max_new_tokens
        if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1):
            raise AdaptcError(f"max_new_tokens is {short_repr(wanted)}: give a whole number from 1, or None")
        limits = [n for n in (room, spec.position_count) if n is not None]
        new, limit = 1 if max_new_tokens is None else max_new_tokens, min(limits, default=None)
        if limit is not None and prompt_length + new > limit:
            what = f"the cache has room for {room}" if limit == room else f"the model has positions for {limit}"
            raise AdaptcError(
                f"the prompt has {prompt_length} tokens, and {new} new ones are asked for: {what}. "
                "Shorten the prompt, ask for fewer" + (", or compile with more num_blocks" if limit == room else "")
            )

        return limit - prompt_length if max_new_tokens is None and limit is not None else max_new_tokens

    def _is_in_use(self, binding: Binding) -> bool:
        with self._lock:
            return any(binding in one.adapters.values() for one in self._requests)

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        """Return a manager of requests, whose ``add_request`` takes ``adapter``.

        Args:
            generation_config: transformers' options of generation, for all requests; None for the model's.
            continuous_batching_config: transformers' options of continuous batching; None for the sizes that the model
                was compiled for.
            workload_hints: transformers' hints.

        Returns:
            an :class:`AdapterBatchingManager`.
        """
        known = vars(self).get("_cached_continuous_batching_manager")
        if known is not None:
            return known
        options = copy.copy(self.generation_config if generation_config is None else generation_config)
        if options.eos_token_id is None:
            options.eos_token_id = -1
        batching = self._sized(continuous_batching_config)
        return batching_manager_class()(self, options, batching, workload_hints)

    def _sized(self, batching: Any) -> Any:
        """Return transformers' options with a size of the pool, where they leave it to the memory of the machine."""
        if batching is None:
            return self.batching_config()
        if batching.num_blocks is None and batching.max_memory_percent is None:
            batching = copy.copy(batching)
            batching.num_blocks = -(-self.spec.num_blocks * self.spec.page_size // batching.page_size)
        return batching

    def batching_config(self, **options: Any) -> Any:
        """Return transformers' options of continuous batching, with the sizes that the model was compiled for."""
        from transformers import ContinuousBatchingConfig

        spec = self.spec
        sizes = {"page_size": spec.page_size, "num_blocks": spec.num_blocks, "max_batch_tokens": spec.max_batch_tokens}
        return ContinuousBatchingConfig(**{**sizes, **options})

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        *,
        adapters: Any = ...,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Generate for many prompts, as transformers' ``generate_batch`` does.

        Args:
            inputs: the token ids of each prompt.
            generation_config: transformers' options of generation; None for the model's.
            continuous_batching_config: transformers' options of continuous batching; None for the sizes that the model
                was compiled for.
            adapters: an entry for each prompt: a name of the bank, None for the base, or a dict of names and weights.
                Where it is left out, the adapter that the program has now.
            **kwargs: further arguments of transformers' ``generate_batch``.

        Returns:
            the id of each request -> its output.

        Raises:
            AdaptcError: there are not as many entries as prompts, or the bank does not have a name. Also what
                :meth:`check_request` raises. No token was computed.
        """
        prompts = [[*one] for one in inputs]
        if adapters is ...:
            chosen = [self.request_adapter()] * len(prompts)
        else:
            if len(parse_row_adapters(adapters)) != len(prompts):
                raise AdaptcError(
                    f"adapters has {len(adapters)} entries, and there are {len(prompts)} prompts: give one for each, "
                    "None for the base"
                )
            chosen = [self.request_adapter(one) for one in adapters]
        limit, room = kwargs.get("max_new_tokens"), pool_positions(self._sized(continuous_batching_config))
        if limit is None:
            limit = (generation_config or self.generation_config).max_new_tokens
        for prompt in prompts:
            self.check_request(prompt, limit, room)
        wrapped = [AdapterPrompt(prompt, one) for prompt, one in zip(prompts, chosen, strict=True)]
        return super().generate_batch(wrapped, generation_config, continuous_batching_config, **kwargs)  # type: ignore[misc]

    # -- steps ---------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Any,
        read_index: list[Tensor],
        write_index: list[Tensor],
        cu_seq_lens_q: Tensor,
        cu_seq_lens_k: Any,
        cache: Any,
        logits_indices: Tensor,
        **others: Any,
    ) -> Any:
        """Compute a step, as transformers' ``ModelRunner`` calls a model.

        Returns:
            an output object with ``logits`` (1, kept, vocabulary), of the tokens ``logits_indices``.
        """
        from transformers.modeling_outputs import CausalLMOutput

        layout, kept = self.spec.layout, logits_indices.shape[0]
        inputs = {
            "input_ids": input_ids.long(),
            "position_ids": position_ids.long(),
            "keep": logits_indices.long() if kept else logits_indices.new_zeros(1, dtype=torch.int64),
            **layout.indices(read_index, write_index, cu_seq_lens_q, cu_seq_lens_k),
            **layout.masks(attention_mask),
            **layout.views(cache),
        }
        logits = self._steps.run(self.recorders[cache].texts, inputs)
        return CausalLMOutput(logits=logits[:, :kept])

    # -- what transformers asks of a model -----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Return the device of the program."""
        return self._program.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the cache."""
        return self.spec.layout.dtype

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that came with the package; None where there is none."""
        return None if self.spec.tokenizer is None else self.spec.tokenizer()

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return self.spec.vocab_size

    def eval(self) -> Self:
        return self

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Do nothing: the attention of the program was captured."""

    def _supports_logits_to_keep(self) -> bool:
        return True

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Raise AdaptcError: a paged step generates for requests, under continuous batching."""
        raise AdaptcError(
            "this program answers requests: call generate_batch, or add_request of init_continuous_batching(). "
            "adaptc.compile_for_generation gives one with generate"
        )

    # -- the program inside --------------------------------------------------------------------------------------------

    @property
    def program(self) -> AdaptedProgram | PackagedProgram:
        """Return the step program, or the package of one; the functions of adaptc work on it."""
        return self._program

    @property
    def runner(self) -> AdaptedProgram | PackagedProgram:
        return self._program

    def with_program(self, program: AdaptedProgram) -> Self:
        """Return the same for another version of the program, with an empty bank. Raises ConfigError for a program
        without adapters."""
        return type(self)(program, self.spec, make_serving_bank(program, self.spec))

    def sidecar_texts(self) -> dict[str, str]:
        return spec_to_json(self.spec)

    def package_files(self, tokenizer: Any) -> dict[str, bytes]:
        return files_for_package(self.spec, tokenizer)

    def example_inputs(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return dict(options)

    def part_outputs(self) -> None:
        return None

    def notes(self) -> list[str]:
        return self.spec.notes()

    @contextlib.contextmanager
    def as_program(self, model: Any) -> collections.abc.Generator[Any]:
        if not isinstance(model, nn.Module):
            yield model.program if isinstance(model, ServingModel) else model
            return
        with captured_as_paged_step(model, self.spec.layout):
            yield model

    def __copy__(self) -> Self:
        """Return a model on the same weights whose adapters are changed independently; its bank is empty."""
        return self.with_program(copy.copy(self._require_program("copy")))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.with_program(copy.deepcopy(self._require_program("copy"), memo))

    def __repr__(self) -> str:
        return f"{self.notes()[0]}, of\n{self._program!r}"


def make_serving_bank(program: AdaptedProgram, spec: ServingSpec, **limits: Any) -> Bank:
    """Return a bank of the step ``program``, whose rows are tokens. ``limits``: as for ``AdaptedProgram.bank``."""
    return make_bank(
        program,
        probes=probe_paged_step(spec.layout, spec.vocab_size, program.device),
        row_inputs=token_inputs_of(spec.layout),
        **limits,
    )


@cache
def as_transformers_model() -> Any:
    """Return :class:`ServingModel` as a subclass of ``transformers.GenerationMixin``."""
    from transformers import GenerationMixin

    return type("ServingModel", (ServingModel, GenerationMixin), {"__module__": ServingModel.__module__})
