"""Adapt a model: capture it, and insert an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar, overload

import torch
from torch import nn
from torch.export import ExportedProgram

from adaptc.adapters.arrow_adapter import arrow_adapter
from adaptc.errors import ConfigError, short_repr
from adaptc.generation.of_module import generate_with_module
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.pipelines.adapt_pipeline import adapt_pipeline, is_pipeline
from adaptc.pipelines.component_program import ComponentOptions
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model
from adaptc.runtime.options import RunOptions
from adaptc.serving.compile_for_serving import generate_batch_with_module
from adaptc.state.adaptation import ModuleGenerate
from adaptc.value_types import validates_options


class Pipeline(Protocol):
    """A pipeline of diffusers, as type checkers tell it from a module, whether diffusers is installed or not."""

    @property
    def components(self) -> dict[str, Any]: ...

    def register_modules(self, **kwargs: Any) -> None: ...


P = TypeVar("P", bound=Pipeline)


@overload
def compile(
    model: P,
    adapter: Any = None,
    *,
    adapter_name: str = "default",
    backend: str = "eager",
    autocast_adapter_dtype: bool = True,
    generator: torch.Generator | None = None,
    hoist_limit: int | None = None,
    fuse: bool = True,
    pack: str | None = None,
    cuda_graphs: bool = False,
    packages: Mapping[str, Any] | None = None,
) -> P: ...


@overload
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
    cuda_graphs: bool = False,
) -> AdaptedProgram: ...


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
    cuda_graphs: bool = False,
    packages: Mapping[str, Any] | None = None,
) -> AdaptedProgram | Any:
    """Capture ``model``, adapt it, and return the adapted program.

    The model's values are not modified, and its parameters are shared. The first call of a program that fuses moves
    sibling weights into one buffer; let no other thread run the model then.

    Args:
        model: an nn.Module, a transformers model, a denoiser or a whole pipeline of diffusers, an ExportedProgram, or
            the result of ``transformers.exporters``.
        adapter: a config, a ``peft`` config, or an adapter with its weights. Those are a PEFT directory, a file of
            diffusers, kohya, LyCORIS, ComfyUI, loralib or torchtune, or a state dict with such keys. A list of these
            gives the program the union of their sites, and binds it to the first. A dict of these by name makes
            adapters that act together, each on the weights as changed by the ones before it.
        config: the config of one adapter with weights, in place of the one in its file. Without ``target_modules`` it
            targets the modules that the keys name. Given without ``adapter``, it is the adapter.
        example_inputs: a tensor, a tuple, or a dict of keywords. An nn.Module needs them. For models of transformers
            and diffusers they are made from the config where none are given.
        dynamic_shapes: the axes whose size may change, as torch.export takes them. "auto" finds them.
        adapter_name: the name of a single adapter.
        training: True captures the training behaviour: dropout, and the loss of a transformers model.
        backend: "eager" or "inductor".
        form: "apply" puts adapters around the layers, and "weight" in front of their weights. "auto" chooses the
            cheaper form per site (``report`` says why).
        autocast_adapter_dtype: whether adapters of half-precision bases are float32.
        key_mapping: regular expression -> replacement, applied to the keys of adapter files (PEFT's rule). It is
            refused where ``adapter`` is none.
        component: the part to take of a file that has several (a UNet's and a text encoder's), where the names of
            modules do not tell.
        generator: the source of first values; None for torch's global generator.
        hoist_limit: the number of bytes that hoisted values may take; see :attr:`AdaptedProgram.hoist_limit`.
        fuse: whether layers that read one tensor are computed by one matmul; see :attr:`AdaptedProgram.fuse`.
        checkpoint: how many blocks the backward computes again at a time; see :attr:`AdaptedProgram.checkpoint`.
        pack: the dtype of base weights that may have packed copies on a CPU; see :attr:`AdaptedProgram.pack`.
        cuda_graphs: whether calls on a GPU are recorded and replayed; see :attr:`AdaptedProgram.cuda_graphs`.
        packages: of a pipeline, component -> the file that :func:`package` made of its program, or that file loaded.
            The component runs its code, and is captured from no module.

    Returns:
        the program. A call takes the model's inputs and gives its output, with the model's shapes and dtypes. Of a
        pipeline, a pipeline that runs programs and has diffusers' verbs for adapters; see examples/diffusion.md.

    Raises:
        CaptureError: the model cannot be captured.
        ConfigError: the config, or an option, has a value that cannot be honoured.
        TargetError: an entry of the config names no layer, or a layer that the method cannot adapt.
        CheckpointError: the adapter's file is damaged or does not fit.
        BackendError: the backend is unknown or not available.

    Example:
        >>> prog = adaptc.compile(model, LoraConfig(r=2, target_modules=["0", "1"]), example_inputs=x)
        >>> prog(x).shape
        torch.Size([2, 3])
    """
    options = RunOptions(backend, hoist_limit, fuse, checkpoint=checkpoint, pack=pack, cuda_graphs=cuda_graphs)
    if options.checkpoint is not None and not training:
        raise ConfigError(
            f"checkpoint={short_repr(checkpoint)} is for training, and the program is captured for inference: "
            "compile(model, config, training=True)"
        )
    if adapter is None:
        adapter, config = config, None
    if is_pipeline(model):
        other: dict[str, Any] = {"example_inputs": example_inputs, "key_mapping": key_mapping, "component": component}
        other |= {"config": config, "training": training or None, "form": None if form == "auto" else form}
        other |= {"dynamic_shapes": None if isinstance(dynamic_shapes, str) else dynamic_shapes}
        if said := [name for name, value in other.items() if value is not None]:
            raise ConfigError(f"{said[0]} is not for whole pipelines: leave it out, or adapt the pipeline's module")
        loaded = {n: f if isinstance(f, PackagedProgram) else PackagedProgram(f) for n, f in (packages or {}).items()}
        return adapt_pipeline(
            model, adapter, ComponentOptions(options, autocast_adapter_dtype, generator, loaded), adapter_name
        )
    if packages is not None:
        raise ConfigError("packages= is for pipelines: adaptc.load_package loads the package of a model")
    return compile_model(
        AdaptedProgram,
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
        generate=ModuleGenerate(generate_with_module, generate_batch_with_module),
    )


def create_arrow_model(
    base_model: nn.Module | ExportedProgram | Any,
    task_specific_adapter_paths: Sequence[Any],
    arrow_config: Any,
    general_adapter_paths: Sequence[Any] | None = None,
    **options: Any,
) -> AdaptedProgram:
    """Return ``base_model`` with an adapter that routes each token between LoRA adapters, as PEFT's function does.

    It is ``compile(base_model, arrow_adapter(...), **options)``. As in PEFT, nothing is trained, and the adapter cannot
    be merged. :func:`adaptc.methods.arrow_adapter` makes further adapters to swap to, and raises the same errors.

    Args:
        base_model: a model that :func:`adaptc.compile` takes.
        task_specific_adapter_paths: PEFT directories of plain LoRA adapters, or :class:`adaptc.Adapter` objects.
        arrow_config: an :class:`adaptc.ArrowConfig`, or peft's.
        general_adapter_paths: adapters whose mean is subtracted from the others, where ``use_gks`` is set.
        **options: the other options of :func:`adaptc.compile`.

    Returns:
        the adapted program.

    Example:
        >>> tasks = [adaptc.Adapter(*lora_weights(seed)) for seed in (0, 1)]
        >>> routed = adaptc.methods.create_arrow_model(model, tasks, adaptc.ArrowConfig(top_k=1), example_inputs=x)
        >>> routed(x).shape
        torch.Size([2, 3])
    """
    adapter = arrow_adapter(task_specific_adapter_paths, arrow_config, general_adapter_paths)
    return compile(base_model, adapter, **options)
