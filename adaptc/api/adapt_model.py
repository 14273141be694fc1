"""Adapt a model: capture it, and insert an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from adaptc.adapters.arrow_adapter import arrow_adapter
from adaptc.errors import ConfigError, short_repr
from adaptc.generation.of_module import generate_with_module
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model
from adaptc.program.packing import find_bounds_read, make_packed_module
from adaptc.runtime.options import RunOptions
from adaptc.training.packed_calls import PackedCalls
from adaptc.training.pretrained_module import PretrainedModule
from adaptc.value_types import validates_options


@validates_options(
    "adapter_name", "training", "form", "autocast_adapter_dtype", "key_mapping", "component", "generator"
)
def compile(
    model: nn.Module | ExportedProgram | Any,
    adapter: Any = None,
    *,
    config: Any = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    adapter_name: str = "default",
    training: bool = False,
    backend: str = "eager",
    form: str = "auto",
    autocast_adapter_dtype: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    generator: torch.Generator | None = None,
    hoist_limit: int | None = None,
    fuse: bool = True,
    checkpoint: int | Literal["auto"] | None = None,
    pack: str | None = None,
) -> AdaptedProgram:
    """Capture ``model``, adapt it, and return the adapted program.

    ``model``: an nn.Module, a transformers model, a UNet or Flux denoiser of diffusers, an ExportedProgram, or the
    result of ``transformers.exporters``. ``example_inputs``: a tensor, a tuple, or a dict of keywords. An nn.Module
    needs them; for models of transformers and diffusers they are made from the config where none are given.

    ``adapter``: a config, a ``peft`` config, or an adapter with its weights: a PEFT directory, a file of diffusers,
    kohya, LyCORIS or torchtune, or a state dict with such keys. It may be a list of these: the program then gets the
    union of their sites and is bound to the first. A dict of these by name makes adapters that act together, each on
    the weights as changed by the ones before it. ``config``: the config of one adapter with weights, in place of the
    one in its file. Without ``target_modules`` it targets the modules that the keys name. Given without ``adapter``, it
    is the adapter. ``component``: the part to take of a file that has several (a UNet's and a text encoder's), where
    the names of modules do not tell. ``key_mapping``: regular expression -> replacement, applied to the keys of adapter
    files (PEFT's rule); refused where ``adapter`` is none.

    ``training=True`` captures the training behaviour: dropout, and the loss of a transformers model. ``backend``:
    "eager" or "inductor". ``form``: "apply" puts adapters around the layers, "weight" in front of their weights, and
    "auto" chooses the cheaper form per site (``report`` says why). ``autocast_adapter_dtype``: adapters of
    half-precision bases are float32. ``generator`` draws first values; by default torch's global generator.

    ``hoist_limit`` is the number of bytes that hoisted values may take. ``fuse`` computes layers that read one tensor
    by one matmul. ``checkpoint``: how many blocks the backward computes again at a time. ``pack`` allows packed copies
    of base weights on a CPU. The properties of :class:`AdaptedProgram` with these names document them.

    The model's values are not modified, and its parameters are shared. The first call of a program
    that fuses moves sibling weights into one buffer; let no other thread run the model then.
    Raises CaptureError, ConfigError, TargetError, CheckpointError or BackendError.
    """
    options = RunOptions(backend, hoist_limit, fuse, checkpoint=checkpoint, pack=pack)
    if options.checkpoint is not None and not training:
        raise ConfigError(
            f"checkpoint={short_repr(checkpoint)} is for training, and the program is captured for inference: "
            "compile(model, config, training=True)"
        )
    if adapter is None:
        adapter, config = config, None
    return compile_model(
        model,
        adapter,
        options,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        adapter_name=adapter_name,
        training=training,
        form=form,
        autocast=autocast_adapter_dtype,
        key_mapping=key_mapping,
        component=component,
        override=config,
        generator=generator,
    )


def create_arrow_model(
    base_model: nn.Module | ExportedProgram | Any,
    task_specific_adapter_paths: Sequence[Any],
    arrow_config: Any,
    general_adapter_paths: Sequence[Any] | None = None,
    **options: Any,
) -> AdaptedProgram:
    """Return ``base_model`` with an adapter that routes each token between LoRA adapters, as PEFT's function does.

    It is ``compile(base_model, arrow_adapter(...), **options)``. :func:`adaptc.methods.arrow_adapter` makes further
    ones to swap to; :func:`compile` documents the ``options``. As in PEFT, nothing is trained, and
    the adapter cannot be merged. Raises the errors of both.
    """
    adapter = arrow_adapter(task_specific_adapter_paths, arrow_config, general_adapter_paths)
    return compile(base_model, adapter, **options)


# Modules capture their models again for these; set here, since importing them there would be a circle.
PretrainedModule.generate_function = generate_with_module
PackedCalls.make_packed_module, PackedCalls.find_bounds_read = make_packed_module, find_bounds_read
