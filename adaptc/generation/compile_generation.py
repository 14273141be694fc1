"""Compile a transformers model and an adapter to an object that generates.

One step program is captured and adapted as ``adaptc.compile`` does it. Where that fails, an error is raised and the
model is as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from adaptc.binding.combine_bindings import named
from adaptc.capture.inputs.example_inputs import is_pretrained_model
from adaptc.capture.quantised import check_not_quantised
from adaptc.capture.where_made import where_made
from adaptc.errors import CaptureError, ConfigError, shown
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.cache.token_gates import coefficients_of, refuse_acting
from adaptc.generation.generator import Generator
from adaptc.generation.kinds import generator_of
from adaptc.generation.modes.capture_step import captured_step
from adaptc.generation.modes.static_step import Step
from adaptc.generation.prefix.prefix_for import refuse_without_cache
from adaptc.generation.seq2seq.check_seq2seq import check_seq2seq_matches_model
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec, check_side_by_side, decoder_positions, encoder_positions
from adaptc.generation.seq2seq.seq2seq_step import STATES, Encoded, stepping_across
from adaptc.generation.spec import first_pass_of
from adaptc.passes.graph.graph_lock import exclusive
from adaptc.program.compile_program import Planned, adapted, planned
from adaptc.progress import stage
from adaptc.runtime.options import RunOptions
from adaptc.value_types import checked


@checked("adapter_name", "form", "autocast_adapter_dtype", "key_mapping", "component", "generator")
def compile_for_generation(
    model: nn.Module,
    adapter: Any = None,
    *,
    config: Any = None,
    max_batch: int = 8,
    max_length: int | None = None,
    adapter_name: str = "default",
    backend: str = "eager",
    form: str = "auto",
    autocast_adapter_dtype: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    generator: torch.Generator | None = None,
    hoist_limit: int | None = None,
    fuse: bool = True,
    pack: str | None = None,
) -> Generator:
    """Capture a transformers model as a step with its cache, adapt it, and return a generator.

    The generator has transformers' own ``generate``: greedy, sampling, beams, streamers, stop strings, logits
    processors. One program takes prompts and single tokens. The cache belongs to the caller and is made for each call.
    ``max_batch`` is the most rows of a cache, beams counted. ``max_length`` is the most positions; None for as many as
    the model has. All other arguments are those of :func:`adaptc.compile`.

    ``swap``, ``merge``, ``unload``, ``save``, ``save_adapter``, ``report`` and the other functions take a generator as
    they take programs. Its ``.program`` is the program inside, and ``.bind(adapter)`` returns a generator that keeps
    one adapter. A model with an encoder (T5, BART, whisper) is one program, too, whose parts are called separately. The
    encoder's states and the cross-attention's keys and values are computed once per generation.

    A model that cannot be captured with a cache computes the whole text for each token. A warning and ``report`` say
    so. Raises CaptureError for a model that can be captured in neither way, and the errors of :func:`adaptc.compile`.
    """
    if adapter is None:
        adapter, config = config, None
    return _compiled(
        model,
        adapter,
        RunOptions(backend, hoist_limit, fuse, pack=pack),
        max_batch=max_batch,
        max_length=max_length,
        adapter_name=adapter_name,
        form=form,
        autocast=autocast_adapter_dtype,
        key_mapping=key_mapping,
        component=component,
        override=config,
        generator=generator,
    )


@exclusive
@where_made
def _compiled(
    model: Any, adapter: Any, options: RunOptions, *, max_batch: int, max_length: int | None, **how: Any
) -> Generator:
    """Return the generator of :func:`compile_for_generation`; ``how`` has the further arguments of :func:`planned`."""
    if not isinstance(model, nn.Module) or not is_pretrained_model(model):
        raise CaptureError(f"compile_for_generation takes a transformers model, not a {type(model).__name__}")
    check_not_quantised(model)
    by_name = named(adapter)
    adapters = list(by_name.values()) if by_name is not None else adapter if isinstance(adapter, list) else [adapter]
    acts, first = coefficients_of(adapters), first_pass_of(adapters)
    name, config = type(model).__name__, cast(Any, model.config)
    if not getattr(model, "can_generate", bool)():
        raise CaptureError(f"{name} does not generate: give a model for language modelling")
    if config.is_encoder_decoder:
        refuse_acting(acts, f"{name} has an encoder, and would generate")
        if first:
            raise ConfigError(
                f"{name} has an encoder, and its answers have no first pass of their own, which {first} reads"
            )
        return _across(model, adapter, options, max_batch, max_length, **how)
    _at_least_one(max_batch, "max_batch")
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    values = how.pop("generator")
    program, facts = captured_step(
        model,
        lambda step: _planned(model, adapter, options, step, how),
        lambda step: adapted(step, options, values),
        lambda layout, length: _common(model, layout, max_batch, length),
        _at_most(max_length, positions),
        positions if isinstance(positions, int) else None,
        acts,
        bool(first) and not acts,  # token coefficients need a cache
    )
    refuse_without_cache(program, facts, name)
    return generator_of(program, facts)


def _across(
    model: Any, adapter: Any, options: RunOptions, max_batch: int, max_length: int | None, **how: Any
) -> Generator:
    """Return the generator of a model with an encoder; the arguments are those of :func:`_compiled`."""
    config = model.config
    check_side_by_side(config, type(model).__name__)
    length = _at_most(max_length, decoder_positions(config))
    _at_least_one(max_batch, "max_batch")
    encoded = Encoded.of(model)
    name, values = type(model).__name__, how.pop("generator")
    with stage(f"capturing {name} as an encoder and a step"), stepping_across(model, encoded) as step:
        try:
            planned_step = _planned(model, adapter, options, step, how)
        except CaptureError as error:
            raise CaptureError(f"{name} cannot be captured as an encoder and a step: {error}") from error
    facts = Seq2SeqSpec(
        **_common(model, encoded.own, max_batch, length),
        positions="decoder_position_ids" in step.example_inputs,
        embeds=False,
        main=encoded.main,
        features=encoded.features,
        source=None if encoded.features else encoder_positions(config),
        cross=encoded.cross,
        hidden=step.example_inputs[STATES].shape[-1],
        strides=encoded.strides,
    )
    with stage(f"checking the encoder and the step against {name}"):
        check_seq2seq_matches_model(model, planned_step.captured.program, facts)
    return generator_of(adapted(planned_step, options, values), facts)


def _planned(model: nn.Module, adapter: Any, options: RunOptions, step: Step, how: Mapping[str, Any]) -> Planned:
    return planned(
        model, adapter, options, example_inputs=step.example_inputs, dynamic_shapes=step.dynamic_shapes, **how
    )


def _common(model: Any, layout: CacheLayout, max_batch: int, max_length: int) -> dict[str, Any]:
    """Return the facts that hold for the step of any model, by name."""
    embedding = model.get_input_embeddings().weight
    return {
        "config": copy.deepcopy(model.config),
        "generation_config": copy.deepcopy(model.generation_config),
        "layout": layout,
        "max_batch": max_batch,
        "max_length": max_length,
        "vocabulary": embedding.shape[0],
        "width": embedding.shape[1],
        "embeds_dtype": embedding.dtype,
    }


def _at_most(asked: Any, most: Any) -> int:
    """Return ``asked``, or ``most`` where that is None.

    ``most`` is the model's number of positions. Raises ConfigError for a larger number, and where neither is known.
    """
    if asked is None:
        if not isinstance(most, int):
            raise ConfigError("max_length=None takes what the model has positions for, which its config does not say")
        return most
    _at_least_one(asked, "max_length")
    if isinstance(most, int) and asked > most:
        raise ConfigError(f"max_length={asked} is more than the {most} positions that the model is for")
    return asked


def _at_least_one(value: Any, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={shown(value)} is not a number of one or more")
