"""Generate with an encoder-decoder: encode and project to cross-attention keys and values once, then run steps.

The program has three parts (see ``seq2seq_step``), and transformers' own ``generate`` runs over them. A call takes the
current adapter when it begins, for all parts together. It keeps the adapter to the end, whatever is swapped meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.arguments import validate
from adaptc.generation.arguments.adapter_inputs import pop_step_inputs
from adaptc.generation.arguments.generate_options import check_options
from adaptc.generation.arguments.step_tokens import StepTokens
from adaptc.generation.cache.cache_change import CacheChange
from adaptc.generation.description import files_for_package
from adaptc.generation.generator import Generator, step_arguments
from adaptc.generation.modes.chunked_prefill import last_token_indices
from adaptc.generation.prefix.prefix_for import count_virtual_tokens, prefix_for
from adaptc.generation.seq2seq import validate_seq2seq as checks
from adaptc.generation.seq2seq.seq2seq_cache import CrossCache
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.seq2seq.seq2seq_step import STATES, STATES_MASK, decoder_inputs
from adaptc.generation.seq2seq.validate_seq2seq import (
    DECODER_OPENINGS,
    ENCODER_OPENINGS,
    encoder_states_mask,
    pop_adapter_inputs,
    select_encoder_inputs,
)
from adaptc.generation.spec import cache_argument_name
from adaptc.generation.step_runner import StepRunner
from adaptc.runtime.calls.output_form import apply_return_dict
from adaptc.state.runner import ProgramPart, Runner

_NO_INPUTS: Mapping[str, Tensor] = MappingProxyType({})


class EncoderDecoder(Generator):
    """A generator over a model with an encoder, made by ``adaptc.compile_for_generation``: T5, BART, mBART, whisper and
    others.

    ``.program`` is one program for both sides, so a swap, for example, changes both. Its ``hoist_limit`` applies to
    each of the three parts. ``.program(...)`` computes all parts at once.
    """

    spec: Seq2SeqSpec

    def __init__(self, runner: StepRunner, spec: Seq2SeqSpec) -> None:
        super().__init__(runner, spec)
        self.main_input_name = spec.main_input_name
        #: the program's parts with the pinned adapter, while a generation is running
        self.pinned_parts: Mapping[str, ProgramPart] | None = None
        #: the caller's inputs, such as ``task_ids``, that the encoder's virtual tokens depend on
        self.prefix_inputs: Mapping[str, Any] = {}

    def package_files(self, tokenizer: Any) -> dict[str, bytes]:
        """Return the files that a package carries beside its code, by path.

        The encoder's maximum of tokens is reduced by the virtual tokens. Compiled code does not check the table of
        positions, and would read past its end.
        """
        spec, now = self.current_spec(), getattr(self._runner, "current", None)
        assert isinstance(spec, Seq2SeqSpec)
        if spec.max_source_length is not None and now is not None:
            spec = replace(
                spec,
                max_source_length=spec.max_source_length - count_virtual_tokens(self._runner, now, ENCODER_OPENINGS),
            )
        return files_for_package(spec, tokenizer)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers' ``generate`` does, with the adapter that is current at the call.

        The encoder reads ``input_ids`` (batch, tokens), or ``input_features`` (batch, mels, frames) for whisper. An
        ``attention_mask`` marks padding on the left or the right. ``encoder_outputs`` takes the place of the encoder's
        input, together with the mask. ``decoder_input_ids`` are the first tokens of the answer. ``past_key_values`` (or
        ``cache``) is a cache of :meth:`prefill` or of an earlier call, to continue from. ``decoder_input_ids`` then
        holds the tokens that are in it.

        Raises AdaptcError for what the program cannot do, before anything is decoded or a cache is written to.
        """
        if self._is_of_bank(kwargs):
            prompts = next(
                (
                    t
                    for t in (inputs, *(kwargs.get(n) for n in (self.main_input_name, "inputs_embeds")))
                    if t is not None
                ),
                None,
            )
            return self.for_rows(kwargs.pop("adapters", ...), prompts).generate(inputs, generation_config, **kwargs)
        check_options(kwargs, generation_config, self.spec.vocab_size)
        scaled, given = self.pop_scale(kwargs), pop_adapter_inputs(self._runner, kwargs)
        if (states := checks.states_from_outputs(kwargs.get("encoder_outputs"))) is not None:
            kwargs["attention_mask"] = encoder_states_mask(self._runner, states, kwargs.get("attention_mask"))
        inputs, kwargs = checks.check_generate_arguments(self.spec, inputs, kwargs)
        with scaled:
            new = self.snapshot_call()
        new.prefix_inputs = given
        return new.run_generate(inputs, generation_config, kwargs)

    def prefill(self, inputs: Tensor, attention_mask: Tensor | None = None, **adapter_inputs: Any) -> CrossCache:
        """Return a cache of what the encoder makes of ``inputs``, from which :meth:`generate` decodes.

        Copies of it can be decoded any number of times. ``adapter_inputs`` has the inputs that an adapter added, such
        as ``task_ids``.
        """
        if self._is_of_bank(adapter_inputs):
            rows = self.for_rows(adapter_inputs.pop("adapters", ...), inputs)
            return rows.prefill(inputs, attention_mask, **adapter_inputs)
        pinned = self.snapshot_call()
        made = pinned.new_cache()
        pinned.prefix_inputs = pop_adapter_inputs(self._runner, adapter_inputs)
        extra = pop_step_inputs(self._runner, adapter_inputs, inputs.shape[0])
        validate.refuse_unknown(adapter_inputs)
        with torch.no_grad():
            pinned.attach_states(made, pinned.encode(inputs, attention_mask, extra), attention_mask, extra)
        return made

    def new_cache(self, **adapter_inputs: Any) -> CrossCache:
        """Return a cache that holds nothing but the current adapter's KV prefix for the decoder.

        ``adapter_inputs`` has the inputs that it depends on. Raises AdaptcError for inputs that it does not take.
        """
        step = self.parts_to_run()["step"]
        prefix = prefix_for(self._runner, step, self.spec, self.device, adapter_inputs, DECODER_OPENINGS)
        if prefix is not None:
            checks.check_prefix_positions(self.spec, prefix)
        return self.spec.new_cache(self.device, prefix)

    @property
    def is_pinned(self) -> bool:
        return self.pinned_parts is not None

    def pin(self) -> None:
        self.pinned_parts = self.parts_to_run()

    def parts_to_run(self) -> Mapping[str, ProgramPart]:
        """Return the program's parts by name, all with one adapter: the generation's, or else the one that is current
        now."""
        if self.pinned_parts is not None:
            return self.pinned_parts
        return self._runner.snapshot_call().parts(self.spec.part_outputs)

    def encode(
        self, inputs: Tensor, attention_mask: Tensor | None = None, adapter_inputs: Mapping[str, Tensor] = _NO_INPUTS
    ) -> Tensor:
        """Return the encoder's last hidden states (batch, positions, hidden).

        ``adapter_inputs`` has the inputs that adapters added, by name.
        """
        checks.check_encoder_input(self.spec, inputs, attention_mask)
        if attention_mask is None:
            attention_mask = inputs.new_ones(inputs.shape[:2], dtype=torch.int64)
        if isinstance(self._runner, Runner):
            self._runner.selection.check_encoder_rows(inputs.shape[0])
        given = {
            self.spec.main_input_name: inputs.contiguous(),
            "attention_mask": attention_mask.long().contiguous(),
            **adapter_inputs,
        }
        part = self.parts_to_run()["encode"]
        return _run_part(part, given | select_encoder_inputs(part.inputs, self._runner, self.prefix_inputs))[STATES]

    def attach_states(
        self, cache: CrossCache, states: Tensor, mask: Tensor | None, adapter_inputs: Mapping[str, Tensor] = _NO_INPUTS
    ) -> None:
        """Compute the cross-attention's keys and values of ``states`` and store them in ``cache``.

        ``mask`` (batch, positions) is the attention mask of what the encoder read; None where nothing is padding.
        """
        mask = encoder_states_mask(self._runner, states, mask)
        checks.check_encoder_states(self.spec, states, mask)
        if mask is None or self.spec.feature_shape is not None:
            mask = states.new_ones(states.shape[:2], dtype=torch.int64)
        made = _run_part(self.parts_to_run()["cross"], {STATES: states.contiguous(), **adapter_inputs})
        cross = [made[name].contiguous() for name in self.spec.cross_layout.names]
        cache.attach_encoder_states(states, mask.long().contiguous(), cross)

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Compute one step: the logits of the decoder's new tokens (batch, tokens), whose keys and values go into the
        cache.

        The encoder runs where there is neither a cache with its states nor ``encoder_outputs``. Without a cache, a new
        one is made. It is returned in the output, unless ``use_cache`` is False.
        """
        past = past_key_values if cache is None else cache
        # Whisper detects the language in a step of its own with use_cache=False, whose new cache is not returned.
        returns_cache = past is not None or use_cache is not False
        prefix_inputs = self.prefix_inputs if self.is_pinned else pop_adapter_inputs(self._runner, others)
        rows = decoder_input_ids.shape[0] if isinstance(decoder_input_ids, Tensor) and decoder_input_ids.ndim else 0
        adapter_inputs = pop_step_inputs(self._runner, others, rows) if rows else {}
        validate.check_forward_arguments(use_cache if returns_cache else None, others)
        decoder_input_ids = checks.require_decoder_input(self.spec, decoder_input_ids)
        pinned = self if self.is_pinned else self.snapshot_call()
        pinned.prefix_inputs = prefix_inputs
        past = pinned.new_cache() if past is None else self.own_cache(past)
        assert isinstance(past, CrossCache)
        new = StepTokens(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            logits_to_keep=logits_to_keep,
            name_prefix="decoder_",
        )
        new.check(self.spec, past, past.decoded_length)
        with CacheChange(past):
            if past.states is None:
                states = checks.states_from_outputs(encoder_outputs)
                if states is None:
                    source = input_features if self.spec.feature_shape else input_ids
                    states = pinned.encode(
                        checks.require_encoder_input(self.spec, source), attention_mask, adapter_inputs
                    )
                checks.check_equal_rows(states.shape[0], rows)
                pinned.attach_states(past, states, attention_mask, adapter_inputs)
            checks.check_equal_rows(past.rows, rows)
            inputs, tokens = new.write_to(past, self.spec, self.device) | adapter_inputs, new.shape[1]
            # As a tensor, so that the tokens are taken in one call.
            keep = last_token_indices(logits_to_keep, tokens, past.device)
            logits = self.spec.cache_mode.run(pinned.decoder_step(past), past, inputs, tokens, keep)
            self.has_run_step = True
            return apply_return_dict(_output(logits, past, returns_cache), return_dict)

    def decoder_step(self, past: CrossCache) -> Callable[..., Tensor]:
        """Return a callable that computes the decoder's logits for the encoder's states in ``past``."""
        part = self.parts_to_run()["step"]
        cross = dict(zip(self.spec.cross_layout.names, past.cross_tensors, strict=True))

        def step(**inputs: Tensor) -> Tensor:
            return _run_part(part, {**decoder_inputs(inputs), STATES_MASK: past.states_mask, **cross})["logits"]

        return step

    # -- what transformers asks of a model -----------------------------------------------------------------------------

    def get_encoder(self, modality: str | None = None) -> Any:
        return Encoder(self)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of the next step: the new tokens and their position_ids."""
        kwargs.pop("is_first_iteration", None)
        mask, past = kwargs.get("decoder_attention_mask"), kwargs.get(cache_argument_name())
        if self.spec.takes_position_ids and mask is not None and "decoder_position_ids" not in kwargs:
            # As transformers' whisper does: position_ids count the tokens that the mask lets through.
            seen = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
            kwargs["decoder_position_ids"] = seen + getattr(past, "prefix_length", 0)
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return step_arguments("decoder_input_ids", input_ids, "decoder_position_ids", kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        name = cache_argument_name()
        past = model_kwargs.get(name)
        sequences = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if past is not None and sequences > 1:
            checks.check_nothing_decoded(past)
        validate.check_generation(self.spec, generation_config, generation_mode, batch_size, max_cache_length, None, 0)
        made = self.new_cache() if past is None else past
        validate.check_cache_size(
            self.spec, batch_size * sequences, max_cache_length + made.prefix_length, prefix_length=made.prefix_length
        )
        if past is None:
            model_kwargs[name] = made
        elif sequences > 1:
            past.batch_repeat_interleave(sequences)
        made.expected_length = max_cache_length + made.prefix_length

    def __repr__(self) -> str:
        return f"encodes, and {super().__repr__()}"


class Encoder:
    """The encoder of a generator, with the interface of a transformers encoder."""

    def __init__(self, owner: EncoderDecoder) -> None:
        self.owner, self.main_input_name = owner, owner.spec.main_input_name
        self.conv1, self.conv2 = (SimpleNamespace(stride=(n,)) for n in owner.spec.conv_strides)

    def __call__(self, **kwargs: Any) -> Any:
        return self.forward(**kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        validate.refuse_unsupported(
            {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        )
        spec = self.owner.spec
        source = checks.require_encoder_input(spec, input_features if spec.feature_shape else input_ids)
        # All further arguments are the decoder's, which checks them.
        extra = pop_step_inputs(self.owner.runner, kwargs, source.shape[0])
        states: Any = self.owner.encode(source, attention_mask, extra)
        return apply_return_dict(BaseModelOutput(last_hidden_state=states), return_dict)


class Whisper(EncoderDecoder):
    """A generator for whisper, with transformers' own handling of languages, tasks, timestamps and long recordings."""

    @property
    def model(self) -> Any:
        """Return the encoder and the config, which whisper's generation reads off the inner model."""
        return SimpleNamespace(encoder=self.get_encoder(), config=self.config)


@cache
def encoder_decoder_class(audio: bool) -> type[EncoderDecoder]:
    """Return the generator's class as a subclass of ``transformers.GenerationMixin``, or of whisper's for ``audio``."""
    from transformers import GenerationMixin
    from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

    bases = (Whisper, WhisperGenerationMixin) if audio else (EncoderDecoder, GenerationMixin)
    return type(bases[0].__name__, bases, {"__module__": __name__})


def _run_part(part: ProgramPart, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return part.run(**{name: inputs[name] for name in part.inputs})


def _output(logits: Tensor, past: CrossCache, returns_cache: bool) -> Any:
    from transformers.modeling_outputs import Seq2SeqLMOutput

    if past.states is None:
        raise AdaptcError("a cache lost its encoder's states while a step ran: it was reset")
    fields: dict[str, Any] = {
        cache_argument_name(): past if returns_cache else None,
        "encoder_last_hidden_state": past.states,
    }
    return Seq2SeqLMOutput(logits=logits, **fields)  # type: ignore[arg-type]
