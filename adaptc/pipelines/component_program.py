"""Capture a component of a pipeline, a denoiser or a text encoder, as a program that any adapter can be swapped into.

A pipeline's user loads adapters that nobody knew at the capture. So the program has sites for LoRA at all linear and
convolutional layers. Sites that an adapter leaves out cost a call nothing. Another method has sites in
a program of its own, which is made of the captured one. One capture serves every batch, size and length of text.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adaptc.capture.inputs.diffusion_inputs import is_diffusion_model, pipeline_example
from adaptc.capture.inputs.example_inputs import ExampleInputs, is_pretrained_model, text_encoder_example
from adaptc.errors import CaptureError, ConfigError, listing
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.pipelines.tensor_calls import FIRST_ROWS, POSITION_MODULES, FirstRowCalls, PositionCalls, TensorCalls
from adaptc.pipelines.token_times import TOKEN_AXES, TokenTimeCalls
from adaptc.pipelines.z_image_calls import ZImageCalls
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model
from adaptc.runtime.options import RunOptions
from adaptc.state.merge_program import unload_program

#: more upsamplings than any UNet has
_MANY_UPSAMPLINGS = 20


@dataclass(frozen=True)
class ComponentOptions:
    """The options of programs of one pipeline.

    Attributes:
        run: how they run.
        autocast: whether adapters of half-precision bases are float32.
        generator: the source of first values.
        packages: component -> the package that it runs, which takes the place of a capture.
        with_residuals: whether a ControlNet's outputs are inputs of the denoiser.
        token_times: whether the denoiser of a video takes a time for each token.
    """

    run: RunOptions
    autocast: bool = True
    generator: torch.Generator | None = None
    packages: Mapping[str, PackagedProgram] = field(default_factory=dict[str, PackagedProgram])
    with_residuals: bool = False
    token_times: bool = False


def component_example(module: nn.Module, options: ComponentOptions) -> ExampleInputs:
    """Return the inputs of a call, as a pipeline gives them. Raises CaptureError for classes that adaptc does not
    know."""
    if is_diffusion_model(module):
        return pipeline_example(module, with_residuals=options.with_residuals, token_times=options.token_times)
    if is_pretrained_model(module):
        return text_encoder_example(module)
    raise CaptureError(f"a {type(module).__name__} is neither a denoiser of diffusers nor a model of transformers")


def capture_component(module: nn.Module, example: ExampleInputs, options: ComponentOptions) -> AdaptedProgram:
    """Return a program of ``module`` with sites for LoRA at all layers."""
    with _any_size(module, example), tensor_calls(module).traced():
        return compile_model(
            AdaptedProgram,
            module,
            # One expression, which need not match every layer: those that no output depends on are in no program.
            LoraConfig(r=1, target_modules="|".join(map(re.escape, _layer_names(module)))),
            options.run,
            example_inputs=example,
            autocast=options.autocast,
        )


def check_package(component: str, package: PackagedProgram, example: ExampleInputs) -> None:
    """Raise ConfigError for a package that was not made of such a component of a pipeline."""
    tensors = [n for n, v in example.tensors().items() if isinstance(v, torch.Tensor)]
    found = [i.name for i in package.manifest.inputs]
    if len(found) != len(tensors) or package.current is None:
        raise ConfigError(
            f"{package.path} takes {listing(found)}, and the {component} of this pipeline is called with "
            f'{listing(tensors)}: package its program, adaptc.package(pipe.programs["{component}"], path, max_rank=...)'
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
    lora = LoraConfig(r=1, target_modules=_site_layers(program))
    return compile_model(AdaptedProgram, unload_program(base), [lora], options.run, autocast=options.autocast)


def unread_layers(module: nn.Module, program: AdaptedProgram | PackagedProgram) -> set[str]:
    """Return the paths of layers of ``module`` that its program does not have, since no output depends on them."""
    return set(_layer_names(module)) - set(_site_layers(program))


def _site_layers(program: AdaptedProgram | PackagedProgram) -> list[str]:
    return list(dict.fromkeys(a.module for a in program.adaptation.attachments if a.param == "weight"))


def tensor_calls(module: nn.Module) -> TensorCalls:
    """Return how calls of ``module`` become calls of its program, told by the names of its classes."""
    calls = _calls_by_row(module)
    axes = next((TOKEN_AXES[c.__name__] for c in type(module).__mro__ if c.__name__ in TOKEN_AXES), None)
    return calls if axes is None else TokenTimeCalls(module, calls, axes)


def _calls_by_row(module: nn.Module) -> TensorCalls:
    for kind in type(module).__mro__:
        if kind.__name__ in POSITION_MODULES:
            return PositionCalls(module, POSITION_MODULES[kind.__name__])
        if kind.__name__ in FIRST_ROWS:
            return FirstRowCalls(module, FIRST_ROWS[kind.__name__])
        if kind.__name__ == "ZImageTransformer2DModel":
            return ZImageCalls(module)
    return TensorCalls(module)


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
