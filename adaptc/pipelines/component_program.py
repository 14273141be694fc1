"""Capture a component of a pipeline, a denoiser or a text encoder, as a program that any adapter can be swapped into.

A pipeline's user loads adapters that nobody knew at the capture. So the program has sites for LoRA at all linear and
convolutional layers. Sites that an adapter leaves out cost a call nothing. Another method has sites in a program of its
own, which is made of the captured one. One capture serves every batch, size and length of text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptc.capture.inputs.diffusion_inputs import is_diffusion_model, pipeline_example
from adaptc.capture.inputs.example_inputs import ExampleInputs, is_pretrained_model, text_encoder_example
from adaptc.errors import CaptureError
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model
from adaptc.runtime.options import RunOptions
from adaptc.state.merge_program import unload_program

#: more upsamplings than any UNet has
_MANY_UPSAMPLINGS = 20


@dataclass(frozen=True)
class ComponentOptions:
    """The options of programs of one pipeline: how they run, the dtype of adapters, the source of first values, and
    whether a ControlNet's outputs are inputs of the denoiser."""

    run: RunOptions
    autocast: bool = True
    generator: torch.Generator | None = None
    with_residuals: bool = False


def component_example(module: nn.Module, options: ComponentOptions) -> ExampleInputs:
    """Return the inputs of a call, as a pipeline gives them. Raises CaptureError for classes that adaptc does not
    know."""
    if is_diffusion_model(module):
        return pipeline_example(module, with_residuals=options.with_residuals)
    if is_pretrained_model(module):
        return text_encoder_example(module)
    raise CaptureError(f"a {type(module).__name__} is neither a denoiser of diffusers nor a model of transformers")


def capture_component(module: nn.Module, example: ExampleInputs, options: ComponentOptions) -> AdaptedProgram:
    """Return a program of ``module`` with sites for LoRA at all layers."""
    with _any_size(module, example):
        return compile_model(
            AdaptedProgram,
            module,
            _lora_at(_layer_names(module)),
            options.run,
            example_inputs=example,
            autocast=options.autocast,
        )


def with_sites_of(program: AdaptedProgram, adapter: Any, options: ComponentOptions) -> AdaptedProgram:
    """Return a program on the same base with sites for ``adapter``, which it is bound to. Nothing is captured again."""
    return compile_model(
        AdaptedProgram,
        unload_program(program),
        adapter,
        options.run,
        autocast=options.autocast,
        generator=options.generator,
    )


def with_new_base(program: AdaptedProgram, base: Any, options: ComponentOptions) -> AdaptedProgram:
    """Return a program with the LoRA sites of ``program``, on ``base``: the same graph with other weights."""
    layers = dict.fromkeys(a.module for a in program.adaptation.attachments if a.param == "weight")
    return compile_model(
        AdaptedProgram, unload_program(base), [_lora_at(layers)], options.run, autocast=options.autocast
    )


def _lora_at(layers: Iterable[str]) -> LoraConfig:
    return LoraConfig(r=1, target_modules=list(layers))


def _layer_names(module: nn.Module) -> list[str]:
    """Return the paths of all layers that LoRA adapts whatever its rank, which leaves out grouped convolutions."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [n for n, m in module.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1]


@contextlib.contextmanager
def _any_size(module: Any, example: ExampleInputs) -> Iterator[None]:
    """Run the block with a UNet that upsamples to the sizes of its skip connections, whatever the sizes are.

    It does so where a size is no multiple of its total downsampling, which it tells from ``num_upsamplers``. Where a
    size is a multiple, both ways give equal values, so that one program serves all sizes.
    """
    upsamplings = vars(module).get("num_upsamplers")
    if upsamplings is None or example.free_dims["sample"].get(2) is not None:
        yield
        return
    module.num_upsamplers = _MANY_UPSAMPLINGS
    try:
        yield
    finally:
        module.num_upsamplers = upsamplings
