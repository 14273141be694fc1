"""Generate with an encoder-decoder: encode and project to cross-attention keys and values once, then run steps.

The program has three parts (see ``cross_step``), and transformers' own ``generate`` runs over them. A call takes the
current adapter when it begins, for all parts together. It keeps the adapter to the end, whatever is swapped meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType, SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptc.bank.selection import Assignment
from adaptc.errors import AdaptcError
from adaptc.generation import validate
from adaptc.generation.adapter_inputs import taken_from, with_given
from adaptc.generation.cache.cache_change import CacheChange
from adaptc.generation.description import carried
from adaptc.generation.example_steps import drawn, pair, step_across
from adaptc.generation.generate_options import check_options
from adaptc.generation.generator import Generator, cut_positions
from adaptc.generation.prefix.prefix_for import count_in_front, prefix_for
from adaptc.generation.seq2seq import validate_seq2seq as cross_checks
from adaptc.generation.seq2seq.seq2seq_cache import CrossCache, cross_cache_class
from adaptc.generation.seq2seq.seq2seq_prefix import DECODED, ENCODED, for_encoder, mask_of_states, pop_adapter_inputs
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.seq2seq.seq2seq_step import MASK, STATES, stepping_across
from adaptc.generation.spec import past_name
from adaptc.packages.packaged_program import BoundPackage, PackagedProgram
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.runtime.calls.output_form import as_asked
from adaptc.state.bound import Bound
from adaptc.state.core import ProgramCore
from adaptc.state.overrides import SCALE
from adaptc.state.program_parts import ProgramPart, pinned_parts

_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class EncoderDecoder(Generator):
    """A generator over a model with an encoder, made by ``adaptc.compile_for_generation``: T5, BART, mBART, whisper and
    others.

    ``.program`` is one program for both sides, so a swap, for example, changes both. Its ``hoist_limit`` applies to
    each of the three parts. ``.program(...)`` computes all parts at once.
    """

    facts: Seq2SeqSpec

    def __init__(
        self, runs: AdaptedProgram | Bound | Assignment | PackagedProgram | BoundPackage, facts: Seq2SeqSpec
    ) -> None:
        super().__init__(runs, facts)
        self.main_input_name = facts.main
        #: the program's parts with the pinned adapter, while a generation is running
        self.parts: Mapping[str, ProgramPart] | None = None
        #: the caller's inputs, such as ``task_ids``, that the encoder's virtual tokens depend on
        self.given: Mapping[str, Any] = {}

    def divided(self) -> Mapping[str, Sequence[str]]:
        return self.facts.parts

    def carried(self, tokenizer: Any) -> dict[str, bytes]:
        """Return the files that a package carries beside its code, by path.

        The encoder's maximum of tokens is reduced by the virtual tokens. Compiled code does not check the table of
        positions, and would read past its end.
        """
        facts, now = self._known(), getattr(self._runs, "current", None)
        if facts.source is not None and now is not None:
            facts = replace(facts, source=facts.source - count_in_front(self._runs, now, ENCODED))
        return carried(facts, tokenizer)

    def drawn(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return with_given(self._runs, drawn(self.facts, self.device, options, step_across))

    def probes(self) -> list[dict[str, Tensor]]:
        return pair(self.facts, self.device, step_across)

    @contextlib.contextmanager
    def as_program(self, model: Any) -> Iterator[Any]:
        if not isinstance(model, nn.Module):
            yield model.program if isinstance(model, Generator) else model
            return
        with stepping_across(model, self.facts.encoded):
            yield model

    # -- calls ---------------------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers' ``generate`` does, with the adapter that is current at the call.

        The encoder reads ``input_ids`` (batch, tokens), or ``input_features`` (batch, mels, frames) for whisper. An
        ``attention_mask`` marks padding on the left or the right. ``encoder_outputs`` takes the place of the encoder's
        input, together with the mask. ``decoder_input_ids`` are the first tokens of the answer. ``past_key_values`` (or
        ``cache``) is a cache of :meth:`prefill` or of an earlier call, to continue from. ``decoder_input_ids`` then
        holds the tokens that are in it. ``adapter_scale`` is as for calls of programs, for this generation alone.

        Raises AdaptcError for what the program cannot do, before anything is decoded or a cache is written to.
        """
        check_options(kwargs, generation_config, self.facts.vocabulary)
        scale, given = kwargs.pop(SCALE, None), pop_adapter_inputs(self._runs, kwargs)
        if (states := cross_checks.given_states(kwargs.get("encoder_outputs"))) is not None:
            kwargs["attention_mask"] = mask_of_states(self._runs, states, kwargs.get("attention_mask"))
        inputs, kwargs = cross_checks.arguments(self.facts, inputs, kwargs)
        new = self.pinned(scale=scale)
        new.given = given
        return new.generated(inputs, generation_config, kwargs)

    def prefill(  # type: ignore[override]
        self, inputs: Tensor, attention_mask: Tensor | None = None, **given: Any
    ) -> CrossCache:
        """Return a cache of what the encoder makes of ``inputs``, from which :meth:`generate` decodes.

        Copies of it can be decoded any number of times. ``given`` has the inputs that an adapter added, such as
        ``task_ids``.
        """
        pinned = self.pinned()
        made = pinned.new_cache()
        pinned.given = pop_adapter_inputs(self._runs, given)
        extra = taken_from(self._runs, given, inputs.shape[0])
        validate.refuse_strange(given)
        with torch.no_grad():
            pinned.begin(made, pinned.encode(inputs, attention_mask, extra), attention_mask, extra)
        return made

    def new_cache(self) -> CrossCache:  # type: ignore[override]
        """Return a cache that holds nothing but the current adapter's KV prefix for the decoder."""
        made = cross_cache_class()(self.facts.layout, self.facts, self.facts.max_length, self.device)
        step = self.kept_parts()["step"]
        if (front := prefix_for(self._runs, step, self.facts, self.device, {}, DECODED)) is not None:
            cross_checks.places(self.facts, front)
            made.begin(front)
        return made

    def pinned(self, offset: int = 0, scale: Any = None) -> Self:
        """Return a generator that keeps the adapter that is current now, in all parts."""
        new = self.twin()
        new.parts, new.begun = self.kept_parts(scale), False
        return new

    def kept_parts(self, scale: Any = None) -> Mapping[str, ProgramPart]:
        """Return the program's parts by name, all with one adapter: the generation's, or else the one that is current
        now."""
        if self.parts is not None:
            return self.parts
        runs = self._runs
        itself = isinstance(runs, (ProgramCore, Bound))
        return pinned_parts(runs, self.facts.parts, scale) if itself else runs.parts(scale)  # type: ignore[union-attr]

    def encode(
        self, inputs: Tensor, attention_mask: Tensor | None = None, extra: Mapping[str, Tensor] = _NOTHING
    ) -> Tensor:
        """Return the encoder's last hidden states (batch, positions, hidden).

        ``extra`` has the inputs that adapters added, by name.
        """
        cross_checks.source(self.facts, inputs, attention_mask)
        if attention_mask is None:
            attention_mask = inputs.new_ones(inputs.shape[:2], dtype=torch.int64)
        if isinstance(self._runs, Assignment):
            self._runs.check_encoded(inputs.shape[0])
        given = {self.facts.main: inputs.contiguous(), "attention_mask": attention_mask.long().contiguous(), **extra}
        part = self.kept_parts()["encode"]
        return _run(part, given | for_encoder(part.inputs, self._runs, self.given))[STATES]

    def begin(
        self, cache: CrossCache, states: Tensor, mask: Tensor | None, extra: Mapping[str, Tensor] = _NOTHING
    ) -> None:
        """Compute the cross-attention's keys and values of ``states`` and store them in ``cache``.

        ``mask`` (batch, positions) is the attention mask of what the encoder read; None where nothing is padding.
        """
        mask = mask_of_states(self._runs, states, mask)
        cross_checks.states(self.facts, states, mask)
        if mask is None or self.facts.features is not None:
            mask = states.new_ones(states.shape[:2], dtype=torch.int64)
        made = _run(self.kept_parts()["cross"], {STATES: states.contiguous(), **extra})
        cross = [made[name].contiguous() for name in self.facts.cross.names]
        cache.see(states, mask.long().contiguous(), cross)

    def forward(  # type: ignore[override]
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
        keeps = past is not None or use_cache is not False
        given = pop_adapter_inputs(self._runs, others) if self.parts is None else self.given
        rows = decoder_input_ids.shape[0] if isinstance(decoder_input_ids, Tensor) else 0
        extra = taken_from(self._runs, others, rows) if rows else {}
        validate.forward(decoder_input_ids, None, use_cache if keeps else None, others)
        assert decoder_input_ids is not None
        pinned = self if self.parts is not None else self.pinned()
        pinned.given = given
        if past is None:
            past = pinned.new_cache()
        else:
            past = cross_checks.own(self.facts, past)
            past.check_finished(inside=self.parts is not None)
        rows, tokens = decoder_input_ids.shape
        before, total = past.length, past.length + tokens
        validate.fits(self.facts, rows, total, begun=past.begun)
        validate.tokens(self.facts, decoder_input_ids)
        validate.check_mask(decoder_attention_mask, (rows, tokens), past.decoded)
        validate.step(self.facts, rows, tokens, decoder_position_ids, logits_to_keep)
        with CacheChange(past):
            if past.states is None:
                states = cross_checks.given_states(encoder_outputs)
                if states is None:
                    source = input_features if self.facts.features else input_ids
                    states = pinned.encode(cross_checks.needed(self.facts, source), attention_mask, extra)
                cross_checks.same_rows(states.shape[0], rows)
                pinned.begin(past, states, attention_mask, extra)
            cross_checks.same_rows(past.rows, rows)
            past.reserve(rows, total)
            if decoder_attention_mask is None:
                past.mask[:, before:total] = 1
            else:
                past.mask[:, past.begun : total] = decoder_attention_mask
            slots = torch.arange(before, total, device=past.device)
            if isinstance(logits_to_keep, int):
                first = max(tokens - logits_to_keep, 0) if logits_to_keep else 0
                logits_to_keep = torch.arange(first, tokens, device=past.device)
            positions = past.places(rows, tokens) if decoder_position_ids is None else decoder_position_ids
            inputs = {
                "decoder_input_ids": decoder_input_ids.long().contiguous(),
                "decoder_attention_mask": past.mask,
                "decoder_position_ids": positions.expand(rows, -1).contiguous(),
                "slots": slots,
                "keep": logits_to_keep,
                **extra,
                MASK: past.states_mask,
                **dict(zip(self.facts.layout.names, past.tensors, strict=True)),
                **dict(zip(self.facts.cross.names, past.cross, strict=True)),
            }
            logits = _run(pinned.kept_parts()["step"], inputs)["logits"]
            past.wrote(total)
            self.begun = True
            return as_asked(_output(logits, past, keeps), return_dict)

    # -- what transformers asks of a model -----------------------------------------------------------------------------

    def get_encoder(self, modality: str | None = None) -> Any:
        return Encoder(self)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of the next step: the new tokens and their position_ids."""
        kwargs.pop("is_first_iteration", None)
        mask, past = kwargs.get("decoder_attention_mask"), kwargs.get(past_name())
        if self.facts.positions and mask is not None and "decoder_position_ids" not in kwargs:
            # As transformers' whisper does: position_ids count the tokens that the mask lets through.
            seen = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
            kwargs["decoder_position_ids"] = seen + getattr(past, "begun", 0)
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        cut_positions(kwargs, "decoder_position_ids", input_ids.shape[1])
        return {"decoder_input_ids": input_ids, **{n: v for n, v in kwargs.items() if n not in validate.MODE}}

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        name = past_name()
        past = model_kwargs.get(name)
        each = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if past is not None and each > 1:
            cross_checks.nothing_decoded(past)
        validate.generation(self.facts, generation_config, generation_mode, batch_size, max_cache_length, None, 0)
        made = self.new_cache() if past is None else past
        validate.fits(self.facts, batch_size * each, max_cache_length + made.begun, begun=made.begun)
        if past is None:
            model_kwargs[name] = made
        elif each > 1:
            past.batch_repeat_interleave(each)
        made.expected = max_cache_length + made.begun

    def __repr__(self) -> str:
        return f"encodes, and {super().__repr__()}"


class Encoder:
    """The encoder of a generator, with the interface of a transformers encoder."""

    def __init__(self, owner: EncoderDecoder) -> None:
        self.owner, self.main_input_name = owner, owner.facts.main
        self.conv1, self.conv2 = (SimpleNamespace(stride=(n,)) for n in owner.facts.strides)

    def __call__(self, **given: Any) -> Any:
        return self.forward(**given)

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

        validate.refuse({"output_attentions": output_attentions, "output_hidden_states": output_hidden_states})
        facts = self.owner.facts
        source = cross_checks.needed(facts, input_features if facts.features else input_ids)
        # All further arguments are the decoder's, which checks them.
        extra = taken_from(self.owner.runs, kwargs, source.shape[0])
        states: Any = self.owner.encode(source, attention_mask, extra)
        return as_asked(BaseModelOutput(last_hidden_state=states), return_dict)


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


def _run(part: ProgramPart, given: Mapping[str, Any]) -> dict[str, Tensor]:
    return part.run(**{name: given[name] for name in part.inputs})


def _output(logits: Tensor, past: CrossCache, keeps: bool) -> Any:
    from transformers.modeling_outputs import Seq2SeqLMOutput

    if past.states is None:
        raise AdaptcError("a cache lost its encoder's states while a step ran: it was reset")
    fields: dict[str, Any] = {past_name(): past if keeps else None, "encoder_last_hidden_state": past.states}
    return Seq2SeqLMOutput(logits=logits, **fields)  # type: ignore[arg-type]
