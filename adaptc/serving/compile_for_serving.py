"""Compile a transformers model and adapters to an object that answers requests under continuous batching.

:func:`generate_batch_with_module` does so for a module that is being trained, once, on the module's own tensors.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc.binding.combine_bindings import adapters_by_name
from adaptc.binding.sources.configs import as_config
from adaptc.capture.inputs.example_inputs import is_pretrained_model
from adaptc.capture.quantised import check_not_quantised
from adaptc.capture.where_made import match_inference_mode
from adaptc.errors import AdaptcError, CaptureError, ConfigError, short_repr
from adaptc.generation.cache.token_gates import gate_names_of_method, refuse_token_gates
from adaptc.generation.of_module import captured_for_module
from adaptc.methods import ProgramConfig
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import build_program, plan_adapters
from adaptc.program.recapture import adapter_in_memory, rebuild_model
from adaptc.progress import stage
from adaptc.quantized_layers.replace_layers import plain_layers
from adaptc.runtime.options import RunOptions
from adaptc.serving.check_step import check_step_matches_model
from adaptc.serving.paged_layout import PagedLayout
from adaptc.serving.paged_step import captured_as_paged_step
from adaptc.serving.serving_model import ServingModel, as_transformers_model, make_serving_bank
from adaptc.serving.serving_spec import ServingSpec
from adaptc.training.pretrained_module import PretrainedModule


def compile_for_serving(
    model: nn.Module,
    adapter: Any = None,
    *,
    config: Any = None,
    adapters: Mapping[str, Any] | None = None,
    max_batch_tokens: int = 256,
    num_blocks: int = 256,
    page_size: int = 32,
    capacity: int | None = None,
    max_rank: int | None = None,
    evict: bool = False,
    loader: Callable[[str], Any] | None = None,
    backend: str = "eager",
    autocast_adapter_dtype: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    generator: torch.Generator | None = None,
    hoist_limit: int | None = None,
    pack: str | None = None,
) -> ServingModel:
    """Capture a transformers model as a step with a paged cache, adapt it, and return an object that serves requests.

    One step computes the new tokens of many requests, each with adapters of its own, or none. transformers' continuous
    batching drives it: ``generate_batch``, ``init_continuous_batching``, and all that its manager has (chunked prefill,
    shared prefixes, sampling per request, cancellation).

    Args:
        model: a transformers model that generates.
        adapter: the adapter, as for :func:`adaptc.compile`. It says which layers adapters may change. It is also the
            adapter of requests that name none.
        config: the config of an adapter with weights, as for :func:`adaptc.compile`.
        adapters: name -> adapter, for requests to name; more are added with ``serving.bank.add``.
        max_batch_tokens: the most tokens of a step.
        num_blocks: the number of blocks of the pool. A block holds ``page_size`` positions of one request.
        page_size: the number of positions of a block.
        capacity: the most adapters of the bank; None for any number.
        max_rank: the largest rank of an adapter of the bank; None for any.
        evict: whether the bank's least recently used adapters make room for others.
        loader: name -> adapter, or None for no adapter of that name. It is called for a name that the bank does not
            have.
        backend: "eager" or "inductor".
        autocast_adapter_dtype: whether adapters of half-precision bases are float32.
        key_mapping: regular expression -> replacement, applied to the keys of adapter files.
        component: the part to take of a file that has several.
        generator: the source of first values; None for torch's global generator.
        hoist_limit: the number of bytes that hoisted values may take.
        pack: the dtype of base weights that may have packed copies on a CPU.

    Returns:
        the serving model. Its ``bank`` has the adapters that requests name.

    Raises:
        CaptureError: the model cannot be captured with a paged cache.
        ConfigError: the adapter cannot act on some tokens of a batch alone.
        AdaptcError: what :func:`adaptc.compile` raises.

    Example:
        >>> serving = adaptc.compile_for_serving(lm, LoraConfig(r=2, target_modules=["q_proj"]), num_blocks=8)
        >>> out = serving.generate_batch([[5, 9, 11]], max_new_tokens=2)
        >>> [len(one.generated_tokens) for one in out.values()]
        [2]
    """
    if adapter is None:
        adapter, config = config, None
    for value, name in ((max_batch_tokens, "max_batch_tokens"), (num_blocks, "num_blocks"), (page_size, "page_size")):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={short_repr(value)} is not a number of one or more")
    if page_size < 4:
        raise ConfigError(
            f"page_size={page_size}: transformers' continuous batching takes pages of 4 positions or more"
        )
    options = RunOptions(backend, hoist_limit, pack=pack)
    plan_options = {
        "autocast": autocast_adapter_dtype,
        "key_mapping": key_mapping,
        "component": component,
        "override": config,
    }
    program, fields = _capture(model, adapter, options, generator, plan_options)
    spec = ServingSpec(**fields, max_batch_tokens=max_batch_tokens, num_blocks=num_blocks, page_size=page_size)
    limits: dict[str, Any] = {"capacity": capacity, "max_rank": max_rank, "evict": evict, "loader": loader}
    bank = make_serving_bank(program, spec, adapters=adapters, **limits)
    return as_transformers_model()(program, spec, bank)


@with_graph_lock
@match_inference_mode
def _capture(
    model: Any, adapter: Any, options: RunOptions, generator: torch.Generator | None, plan_options: dict[str, Any]
) -> tuple[AdaptedProgram, dict[str, Any]]:
    """Return the adapted step program of ``model``, and the fields of its spec that the model gives."""
    if not isinstance(model, nn.Module) or not is_pretrained_model(model):
        raise CaptureError(f"compile_for_serving takes a transformers model, not a {type(model).__name__}")
    untyped: Any = model
    name, config = type(model).__name__, untyped.config
    _check_configs(adapter, name)
    if not getattr(model, "can_generate", bool)() or config.is_encoder_decoder:
        raise CaptureError(f"{name} does not generate token by token from one text: give a causal model")
    with plain_layers(model):
        check_not_quantised(model)
        layout = PagedLayout.from_model(model)
        with stage(f"capturing {name} as a paged step"), captured_as_paged_step(model, layout) as step:
            try:
                planned = plan_adapters(model, adapter, options, **vars(step), **plan_options)
            except CaptureError as error:
                raise CaptureError(f"{name} cannot be captured as a paged step: {error}") from error
        vocab_size = untyped.get_input_embeddings().weight.shape[0]
        with stage(f"checking the paged step against {name}"):
            check_step_matches_model(model, planned.captured.program, layout, vocab_size)
        program = build_program(AdaptedProgram, planned, options, generator)
    refuse_token_gates(
        sorted({n for a in program.adaptation.attachments for n in gate_names_of_method(a.method)}),
        "a program that serves would be made",
    )
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    configs = copy.deepcopy((config, untyped.generation_config))
    # With it transformers makes the masks that the step takes.
    configs[0]._attn_implementation = "sdpa"  # noqa: SLF001
    return program, {
        "layout": layout,
        "config": configs[0],
        "generation_config": configs[1],
        "vocab_size": vocab_size,
        "position_count": positions if isinstance(positions, int) else None,
    }


def _check_configs(adapter: Any, name: str) -> None:
    """Raise ConfigError for adapters of virtual tokens, as far as their configs can be read here."""
    by_name = adapters_by_name(adapter)
    adapters: list[Any] = [adapter] if by_name is None else [*by_name.values()]
    for one in adapters[0] if isinstance(adapters[0], list) else adapters:
        with contextlib.suppress(AdaptcError):  # the compilation raises this error
            config = as_config(one)
            if isinstance(config, ProgramConfig):
                break
    else:
        return
    raise ConfigError(
        f"{type(config).__name__} puts virtual tokens in front of a text, for which a paged cache has no rows: serve "
        f"{name} with adapters of its layers, or generate with adaptc.compile_for_generation"
    )


def generate_batch_with_module(
    module: PretrainedModule,
    inputs: Sequence[Sequence[int]],
    generation_config: Any = None,
    continuous_batching_config: Any = None,
    **kwargs: Any,
) -> Any:
    """Generate with the parameters that ``module`` has now, in eval mode and its own dtype.

    The pool has room for all prompts, unless ``continuous_batching_config`` says how large it is. Raises as
    :meth:`ServingModel.generate_batch` does.
    """
    with torch.autocast(module.device.type, enabled=False):
        serving = _serving_for(module)
        options = generation_config or serving.generation_config
        batching = copy.copy(continuous_batching_config or serving.batching_config(num_blocks=None))
        if batching.num_blocks is None and batching.max_memory_percent is None:
            new = kwargs.get("max_new_tokens") or options.max_new_tokens or 0
            answers = options.num_return_sequences or 1
            pages = sum(-(-(len(prompt) + new) // batching.page_size) for prompt in inputs)
            batching.num_blocks = 2 * answers * pages + 1
        return serving.generate_batch(inputs, generation_config, batching, **kwargs)


@with_graph_lock
def _serving_for(module: PretrainedModule) -> ServingModel:
    return captured_for_module(module, "serving", _capture_serving)


def _capture_serving(module: PretrainedModule) -> ServingModel:
    program = module.program
    return compile_for_serving(
        rebuild_model(module),
        adapter_in_memory(module),
        autocast_adapter_dtype=program.adaptation.autocast,
        hoist_limit=program.options.hoist_limit,
    )
