"""Compile a transformers model and an adapter to an object that generates.

One step program is captured and adapted as ``adaptc.compile`` does it. Where that fails, an error is raised and the
model is as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptc.binding.combine_bindings import adapters_by_name
from adaptc.capture.check_size_one import run_without_effects
from adaptc.capture.inputs.example_inputs import is_pretrained_model
from adaptc.capture.quantised import check_not_quantised
from adaptc.capture.where_made import match_inference_mode
from adaptc.errors import CaptureError, ConfigError, short_repr
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.cache.token_gates import gate_names_of_adapters, refuse_token_gates
from adaptc.generation.capture_step import capture_step
from adaptc.generation.causal_generator import CausalGenerator
from adaptc.generation.compare_with_model import check_step_matches_model
from adaptc.generation.encoder_decoder import EncoderDecoder, Whisper
from adaptc.generation.generator import Generator
from adaptc.generation.multimodal.multimodal_spec import MultimodalSpec
from adaptc.generation.multimodal.prompt_part import describe_prompts
from adaptc.generation.multimodal_generator import MultimodalGenerator
from adaptc.generation.prefix.prefix_for import check_step_takes_prefix
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec, decoder_length, encoder_length, refuse_composite_model
from adaptc.generation.seq2seq.seq2seq_step import STATES, EncoderDescription, captured_as_seq2seq_step
from adaptc.generation.spec import GenerationSpec, base_pass_method_name
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import user_inputs
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import build_program, plan_adapters
from adaptc.progress import stage
from adaptc.quantized_layers.replace_layers import plain_layers
from adaptc.runtime.options import RunOptions
from adaptc.value_types import validates_options


@validates_options("adapter_name", "form", "autocast_adapter_dtype", "key_mapping", "component", "generator")
def compile_for_generation(
    model: nn.Module,
    adapter: Any = None,
    *,
    config: Any = None,
    example_inputs: Any = None,
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
    cuda_graphs: bool = False,
) -> Generator:
    """Capture a transformers model as a step with its cache, adapt it, and return a generator.

    The generator has transformers' own ``generate``: greedy, sampling, beams, streamers, stop strings, logits
    processors. One program takes prompts and single tokens. The cache belongs to the caller and is made for each call.

    ``swap``, ``merge``, ``unload``, ``save``, ``save_adapter``, ``report`` and the other functions take a generator as
    they take programs. A model with an encoder (T5, BART, whisper) is one program, too, whose parts are called
    separately. The encoder's states and the cross-attention's keys and values are computed once per generation. A model
    that cannot be captured with a cache computes the whole text for each token. A warning and ``report`` say so.

    Args:
        model: a transformers model that generates.
        adapter: the adapter, as for :func:`adaptc.compile`.
        config: the config of an adapter with weights, as for :func:`adaptc.compile`.
        example_inputs: a prompt with images or audio, as the model's processor returns it, for a model that reads them.
            Prompts may then have any number of such images, of any size that the model takes. None for text alone.
        max_batch: the most rows of a cache, beams counted.
        max_length: the most positions of a cache; None for as many as the model has.
        adapter_name: the name of a single adapter.
        backend: "eager" or "inductor".
        form: "apply", "weight" or "auto", as for :func:`adaptc.compile`.
        autocast_adapter_dtype: whether adapters of half-precision bases are float32.
        key_mapping: regular expression -> replacement, applied to the keys of adapter files.
        component: the part to take of a file that has several.
        generator: the source of first values; None for torch's global generator.
        hoist_limit: the number of bytes that hoisted values may take.
        fuse: whether layers that read one tensor are computed by one matmul.
        pack: the dtype of base weights that may have packed copies on a CPU.
        cuda_graphs: whether calls on a GPU are recorded and replayed.

    Returns:
        the generator. Its ``program`` is the program inside.

    Raises:
        CaptureError: the model can be captured neither with a cache nor without one.
        AdaptcError: what :func:`adaptc.compile` raises.

    Example:
        >>> generator = adaptc.compile_for_generation(lm, LoraConfig(r=2, target_modules=["q_proj"]), max_length=16)
        >>> generator.generate(ids, max_new_tokens=3).shape
        torch.Size([2, 10])
    """
    if adapter is None:
        adapter, config = config, None
    return _compile(
        model,
        adapter,
        RunOptions(backend, hoist_limit, fuse, pack=pack, cuda_graphs=cuda_graphs),
        example_inputs=example_inputs,
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


@with_graph_lock
@match_inference_mode
def _compile(model: Any, adapter: Any, options: RunOptions, **further: Any) -> Generator:
    """Return the generator of :func:`compile_for_generation`; ``further`` are those of :func:`_compile_plain`."""
    if not isinstance(model, nn.Module) or not is_pretrained_model(model):
        raise CaptureError(f"compile_for_generation takes a transformers model, not a {type(model).__name__}")
    with plain_layers(model):
        check_not_quantised(model)
        return _compile_plain(model, adapter, options, **further)


def _compile_plain(
    model: Any,
    adapter: Any,
    options: RunOptions,
    *,
    example_inputs: Any,
    max_batch: int,
    max_length: int | None,
    **plan_options: Any,
) -> Generator:
    """Return the generator of a transformers model without quantised layers of others.

    ``plan_options`` has the further arguments of :func:`plan_adapters`.
    """
    by_name = adapters_by_name(adapter)
    adapters: list[Any] = [adapter]
    if by_name is not None:
        adapters = list(by_name.values())
    elif isinstance(adapter, list):
        adapters = cast("list[Any]", adapter)
    token_gate_inputs, base_pass_method = gate_names_of_adapters(adapters), base_pass_method_name(adapters)
    name, config = type(model).__name__, model.config
    if not getattr(model, "can_generate", bool)():
        raise CaptureError(f"{name} does not generate: give a model for language modelling")
    if config.is_encoder_decoder:
        refuse_token_gates(token_gate_inputs, f"{name} has an encoder, and would generate")
        if base_pass_method:
            raise ConfigError(
                f"{name} has an encoder, and its answers have no first pass of their own, which {base_pass_method} "
                "reads"
            )
        if example_inputs is not None:
            raise ConfigError(f"example_inputs is not taken: {name} has an encoder, whose input is known")
        return _compile_seq2seq(model, adapter, options, max_batch, max_length, **plan_options)
    _check_positive(max_batch, "max_batch")
    numbering = _position_numbering(model)
    position_count = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    position_count = None if position_count == -1 else position_count  # XLNet's word for any number
    values, prompts = plan_options.pop("generator"), None
    if example_inputs is not None:
        prompts = describe_prompts(model, example_inputs)
    program, spec = capture_step(
        model,
        lambda step: plan_adapters(model, adapter, options, **vars(step), **plan_options),
        lambda step: build_program(AdaptedProgram, step, options, values),
        lambda layout, length: _spec_fields(model, layout, max_batch, length) | numbering,
        _resolve_max_length(max_length, position_count),
        position_count if isinstance(position_count, int) else None,
        token_gate_inputs,
        bool(base_pass_method) and not token_gate_inputs,  # token coefficients need a cache
        prompts,
    )
    check_step_takes_prefix(program, spec, name)
    return make_generator(program, spec)


def _compile_seq2seq(
    model: Any, adapter: Any, options: RunOptions, max_batch: int, max_length: int | None, **plan_options: Any
) -> Generator:
    """Return the generator of a model with an encoder; the arguments are those of :func:`_compile`."""
    config = model.config
    refuse_composite_model(config, type(model).__name__)
    length = _resolve_max_length(max_length, decoder_length(config))
    _check_positive(max_batch, "max_batch")
    description = EncoderDescription.from_model(model)
    name, generator = type(model).__name__, plan_options.pop("generator")
    with stage(f"capturing {name} as an encoder and a step"), captured_as_seq2seq_step(model, description) as step:
        try:
            planned_step = plan_adapters(model, adapter, options, **vars(step), **plan_options)
        except CaptureError as error:
            raise CaptureError(f"{name} cannot be captured as an encoder and a step: {error}") from error
    spec = Seq2SeqSpec(
        **_spec_fields(model, description.layout, max_batch, length) | vars(description),
        takes_position_ids="decoder_position_ids" in step.example_inputs,
        takes_inputs_embeds=False,
        max_source_length=None if description.feature_shape else encoder_length(config),
        encoder_hidden_size=step.example_inputs[STATES].shape[-1],
    )
    with stage(f"checking the encoder and the step against {name}"):
        check_step_matches_model(model, planned_step.captured.program, spec)
    return make_generator(build_program(AdaptedProgram, planned_step, options, generator), spec)


def make_generator(runner: AdaptedProgram | PackagedProgram, spec: GenerationSpec) -> Generator:
    """Return the generator that runs ``runner``: a program, or a package of one."""
    if not isinstance(spec, Seq2SeqSpec):
        if isinstance(runner, AdaptedProgram):
            runner = runner.with_options(single_sizes=_sizes_of_one_token(runner))
        if isinstance(spec, MultimodalSpec):
            return _as_transformers_model(MultimodalGenerator)(runner, spec)
        return _as_transformers_model(CausalGenerator)(runner, spec)
    return _as_transformers_model(EncoderDecoder if spec.feature_shape is None else Whisper)(runner, spec)


def _sizes_of_one_token(program: AdaptedProgram) -> frozenset[str]:
    """Return the free sizes of a step that are 1 in a call for one more token of one text."""
    inputs = user_inputs(program)
    shapes = [inputs[name].shape for name in ("input_ids", "keep") if name in inputs]
    return frozenset(str(size) for shape in shapes for size in shape if not isinstance(size, int))


@cache
def _as_transformers_model(cls: type[Generator]) -> Any:
    """Return a class of generators as a subclass of ``transformers.GenerationMixin``, or of whisper's."""
    from transformers import GenerationMixin
    from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

    mixin = WhisperGenerationMixin if issubclass(cls, Whisper) else GenerationMixin
    return type(cls.__name__, (cls, mixin), {"__module__": cls.__module__})


def _spec_fields(model: Any, layout: CacheLayout, max_batch: int, max_length: int) -> dict[str, Any]:
    """Return the fields of the spec that hold for the step of any model, by name."""
    embedding = model.get_input_embeddings().weight
    return {
        "config": copy.deepcopy(model.config),
        "generation_config": copy.deepcopy(model.generation_config),
        "layout": layout,
        "max_batch": max_batch,
        "max_length": max_length,
        "vocab_size": embedding.shape[0],
        "hidden_size": embedding.shape[1],
        "embeds_dtype": embedding.dtype,
    }


def _position_numbering(model: Any) -> dict[str, Any]:
    """Return the fields of the spec that say how the model's own generation numbers positions.

    It may leave position_ids out, so that padding counts as tokens do, or begin with another number than 0.
    Raises CaptureError for a model that adds tokens to a prompt in each step, such as XLM and XLNet.
    """
    prompt = torch.full((1, 3), 1, device=model.device)
    given = {"attention_mask": torch.ones_like(prompt), "position_ids": prompt.cumsum(1) - 1}
    try:
        with run_without_effects(model):
            made = model.prepare_inputs_for_generation(prompt, **given, use_cache=False)
    except Exception:  # a model may ask for more than a prompt, which says nothing about its tokens
        return {}
    ids = made.get("input_ids")
    if isinstance(ids, Tensor) and not (ids.shape == prompt.shape and torch.equal(ids, prompt)):
        raise CaptureError(
            f"{type(model).__name__} adds tokens of its own to a prompt when it generates, which no step here does: "
            "adapt it with adaptc.compile, and call the program on the tokens that you want"
        )
    if "position_ids" not in made:
        return {}
    positions = made["position_ids"]
    if positions is None:
        return {"counts_padding": True}
    shift = positions - given["position_ids"] if positions.shape == prompt.shape else torch.zeros(1)
    return {"first_position": int(shift[0, 0])} if bool((shift == shift.flatten()[0]).all() and shift.any()) else {}


def _resolve_max_length(max_length: Any, position_count: Any) -> int:
    """Return ``max_length``, or ``position_count`` where that is None.

    ``position_count`` is the model's number of positions. Raises ConfigError for a larger number, and where neither is
    known.
    """
    if max_length is None:
        if not isinstance(position_count, int):
            raise ConfigError("max_length=None takes what the model has positions for, which its config does not say")
        return position_count
    _check_positive(max_length, "max_length")
    if isinstance(position_count, int) and max_length > position_count:
        raise ConfigError(f"max_length={max_length} is more than the {position_count} positions that the model is for")
    return max_length


def _check_positive(value: Any, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={short_repr(value)} is not a number of one or more")
