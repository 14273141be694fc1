"""Generate with an encoder-decoder: encode and project to cross-attention keys and values once, then run steps.

The program has three parts (see ``seq2seq_step``), and transformers' own ``generate`` runs over them. A call takes the
current adapter when it begins, for all parts together. It keeps the adapter to the end, whatever is swapped meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from adaptc.bank.selection import RowSelection
from adaptc.errors import AdaptcError
from adaptc.generation.arguments import validate
from adaptc.generation.arguments.adapter_inputs import pop_step_inputs
from adaptc.generation.arguments.step_tokens import StepTokens, step_arguments
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.description import files_for_package
from adaptc.generation.generator import Generator
from adaptc.generation.modes.chunked_prefill import last_token_indices
from adaptc.generation.prefix.prefix_for import count_virtual_tokens, pop_prefix_inputs
from adaptc.generation.seq2seq import validate_seq2seq as checks
from adaptc.generation.seq2seq.seq2seq_cache import CrossCache, check_equal_rows
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.seq2seq.seq2seq_step import STATES, STATES_MASK, decoder_inputs
from adaptc.generation.seq2seq.validate_seq2seq import DECODER_OPENINGS, ENCODER_OPENINGS
from adaptc.generation.spec import PartsRunner, cache_argument_name
from adaptc.runtime.calls.output_form import apply_return_dict
from adaptc.state.bound import BoundProgram
from adaptc.state.core import ProgramCore
from adaptc.state.program_parts import ProgramPart, pin_parts


@dataclass(frozen=True)
class EncoderSource:
    """The source of an answer: the encoder's ``inputs`` and ``attention_mask``, or its ``outputs`` where it has run."""

    inputs: Any
    attention_mask: Tensor | None
    outputs: Any = None


class EncoderDecoder(Generator):
    """A generator over a model with an encoder, made by ``adaptc.compile_for_generation``: T5, BART, mBART, whisper and
    others.

    ``.program`` is one program for both sides, so a swap, for example, changes both. Its ``hoist_limit`` applies to
    each of the three parts. ``.program(...)`` computes all parts at once.
    """

    spec: Seq2SeqSpec
    _runner: ProgramCore | BoundProgram | PartsRunner
    cache_openings = DECODER_OPENINGS

    def __init__(self, runner: ProgramCore | BoundProgram | PartsRunner, spec: Seq2SeqSpec) -> None:
        super().__init__(runner, spec)
        #: the program's parts with the pinned adapter, while it is pinned
        self.parts: Mapping[str, ProgramPart] = {}
        #: the caller's inputs, such as ``task_ids``, that the encoder's virtual tokens depend on
        self.encoder_inputs: Mapping[str, Any] = {}

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

    def pin(self, scale: Any) -> None:
        runner = self._runner
        if isinstance(runner, (ProgramCore, BoundProgram)):
            self.parts = pin_parts(runner, self.spec.part_outputs, scale)
        else:
            self.parts = runner.parts(scale)
        self.step = self.parts["step"]

    def prepare_generation(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        self.encoder_inputs = pop_prefix_inputs(self._runner, kwargs, ENCODER_OPENINGS)
        if (states := checks.states_from_outputs(kwargs.get("encoder_outputs"))) is not None:
            kwargs["attention_mask"] = checks.encoder_states_mask(self._runner, states, kwargs.get("attention_mask"))
        return checks.check_generate_arguments(self.spec, inputs, kwargs)

    def read_prompt(
        self, past: StepCache, inputs: Tensor | None, attention_mask: Tensor | None, adapter_inputs: dict[str, Any]
    ) -> None:
        self.encoder_inputs = pop_prefix_inputs(self._runner, adapter_inputs, ENCODER_OPENINGS)
        source = EncoderSource(checks.require_encoder_input(self.spec, inputs), attention_mask)
        step_inputs = pop_step_inputs(self._runner, adapter_inputs, source.inputs.shape[0])
        validate.refuse_unknown(adapter_inputs)
        self.read_source(past, source, source.inputs.shape[0], step_inputs)

    def encode(self, inputs: Tensor, attention_mask: Tensor | None, adapter_inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the encoder's last hidden states (batch, positions, hidden), for a pinned generator.

        ``adapter_inputs`` has the inputs that adapters added, by name.
        """
        checks.check_encoder_input(self.spec, inputs, attention_mask)
        if attention_mask is None:
            attention_mask = inputs.new_ones(inputs.shape[:2], dtype=torch.int64)
        if isinstance(self._runner, RowSelection):
            self._runner.check_encoder_rows(inputs.shape[0])
        part = self.parts["encode"]
        given = {
            self.spec.main_input_name: inputs.contiguous(),
            "attention_mask": attention_mask.long().contiguous(),
            **adapter_inputs,
            **checks.select_encoder_inputs(part.inputs, self._runner, self.encoder_inputs),
        }
        return _run_part(part, given)[STATES]

    def read_source(
        self, past: StepCache, source: EncoderSource, rows: int, adapter_inputs: Mapping[str, Tensor]
    ) -> None:
        assert isinstance(past, CrossCache)
        if past.states is not None:
            return
        states = checks.states_from_outputs(source.outputs)
        if states is None:
            inputs = checks.require_encoder_input(self.spec, source.inputs)
            states = self.encode(inputs, source.attention_mask, adapter_inputs)
        check_equal_rows(states.shape[0], rows)
        mask = checks.encoder_states_mask(self._runner, states, source.attention_mask)
        checks.check_encoder_states(self.spec, states, mask)
        if mask is None or self.spec.feature_shape is not None:
            mask = states.new_ones(states.shape[:2], dtype=torch.int64)
        made = _run_part(self.parts["cross"], {STATES: states.contiguous(), **adapter_inputs})
        cross = [made[name].contiguous() for name in self.spec.cross_layout.names]
        past.attach_encoder_states(states, mask.long().contiguous(), cross)

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
        past, pinned = past_key_values if cache is None else cache, self.as_pinned()
        if pinned is not self:
            pinned.encoder_inputs = pop_prefix_inputs(self._runner, others, ENCODER_OPENINGS)
        new = StepTokens(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            logits_to_keep=logits_to_keep,
            name_prefix="decoder_",
        )
        source = input_features if self.spec.feature_shape else input_ids
        return pinned.run_step(
            new,
            past,
            use_cache=use_cache,
            # Whisper detects the language in a step of its own with use_cache=False, whose new cache is not returned.
            returns_cache=past is not None or use_cache is not False,
            return_dict=return_dict,
            others=others,
            source=EncoderSource(source, attention_mask, encoder_outputs),
        )

    def compute_logits(self, past: StepCache, new: StepTokens, inputs: dict[str, Tensor]) -> Tensor:
        assert isinstance(past, CrossCache)
        part, tokens = self.parts["step"], new.shape[1]
        source = {
            STATES_MASK: past.states_mask,
            **dict(zip(self.spec.cross_layout.names, past.cross_tensors, strict=True)),
        }

        def step(**inputs: Tensor) -> Tensor:
            return _run_part(part, decoder_inputs(inputs) | source)["logits"]

        # As a tensor, so that the tokens are taken in one call.
        keep = last_token_indices(new.logits_to_keep, tokens, past.device)
        return self.spec.cache_mode.run(step, past, inputs, tokens, keep)

    def step_output(self, logits: Tensor, past: StepCache, returns_cache: bool) -> Any:
        from transformers.modeling_outputs import Seq2SeqLMOutput

        assert isinstance(past, CrossCache)
        if past.states is None:
            raise AdaptcError("a cache lost its encoder's states while a step ran: it was reset")
        fields: dict[str, Any] = {
            cache_argument_name(): past if returns_cache else None,
            "encoder_last_hidden_state": past.states,
        }
        return Seq2SeqLMOutput(logits=logits, **fields)  # type: ignore[arg-type]

    def fit_cache(self, past: StepCache, generation_config: Any, rows: int, sequences: int) -> None:
        assert isinstance(past, CrossCache)
        if sequences > 1:
            checks.check_nothing_decoded(past)
            past.batch_repeat_interleave(sequences)

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
        states: Any = self.owner.as_pinned().encode(source, attention_mask, extra)
        return apply_return_dict(BaseModelOutput(last_hidden_state=states), return_dict)


class Whisper(EncoderDecoder):
    """A generator for whisper, with transformers' own handling of languages, tasks, timestamps and long recordings."""

    @property
    def model(self) -> Any:
        """Return the encoder and the config, which whisper's generation reads off the inner model."""
        return SimpleNamespace(encoder=self.get_encoder(), config=self.config)


def _run_part(part: ProgramPart, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return part.run(**{name: inputs[name] for name in part.inputs})
