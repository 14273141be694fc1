"""Capture a model as a ``torch.export`` program in the training dialect, with the facts that adapters need of the
model.

The model is an ``nn.Module``, a transformers ``PreTrainedModel``, an ``ExportedProgram``, or what
``transformers.exporters`` returns. The program's outputs equal the model's for every size of the dimensions that were
kept free. The model's parameters, flags, training mode and config are unchanged, whether or not the capture succeeded.
This file never imports transformers.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.capture.check_outputs import COMPARISON, check_same_outputs, name_value_checks
from adaptc.capture.check_size_one import guard_sizes_of_one, has_same_outputs
from adaptc.capture.dynamic_shapes import FreeDims, export, export_with_free_dims, export_with_shapes
from adaptc.capture.explain_failure import explain_inputs
from adaptc.capture.fixed_sizes import describe_fixed_sizes, flat_input_names
from adaptc.capture.given_inputs import (
    all_dims_free,
    bind_arguments,
    enlarge_sizes_of_one,
    is_causal_lm_loss,
    loss_type,
)
from adaptc.capture.inputs.diffusion_inputs import make_example_inputs
from adaptc.capture.inputs.example_inputs import ExampleInputs, is_pretrained_model
from adaptc.capture.model_state import ModelSkeleton, keyword_only_parameter, patch_forward, preserve_state
from adaptc.capture.quantised import check_not_quantised
from adaptc.capture.replacements.broadcast_masks import broadcast_masks
from adaptc.capture.replacements.fixed_values import export_or_fix_values
from adaptc.capture.vision.tower_facts import has_free_images, with_free_images
from adaptc.errors import AdaptcWarning, CaptureError
from adaptc.passes.adapt.embedding_max_norm import RemoveMaxNormWrites
from adaptc.passes.adapt.linear_products import MatmulsToLinear
from adaptc.passes.analysis.program_facts import (
    all_module_types,
    input_fills,
    is_training,
    keyword_inputs,
    qualified_name,
    use_first_module_names,
)
from adaptc.passes.analysis.sites import mark_linear
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.optimize.settle_strides import SettleStrides
from adaptc.progress import stage
from adaptc.quantized_layers.replace_layers import plain_layers

#: the classes that PEFT takes for linear layers, by name, since transformers is not imported
_LINEAR_CLASSES = ("torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")


@dataclass(frozen=True, eq=False)
class PretrainedFacts:
    """The facts of a transformers model that its captured program keeps, for code that asks the program's module for
    them.

    ``config`` is a copy. ``forward_parameters`` are the names of ``forward``'s parameters, in order.
    ``input_embedding`` and ``output_embedding`` are module paths, None when unknown. ``loss_type`` and
    ``is_causal_lm_loss`` are told in ``model_loss``. ``weight_conversions`` are the renamings of keys that transformers
    applied to the model's weight files, None for a model that was loaded from no file. ``skeleton`` serves to capture
    the model again, for other inputs. It is set only for a model that can generate and was captured for training.
    """

    model_class: type
    config: Any
    generation_config: Any
    forward_parameters: tuple[str, ...]
    input_embedding: str | None
    output_embedding: str | None
    loss_type: str | None
    is_causal_lm_loss: bool
    weight_conversions: Any = None
    skeleton: ModelSkeleton | None = None


@dataclass(frozen=True)
class BaseModel:
    """The base model as adapter files name it: its ``name_or_path``, None where it has none, its class and that class's
    module."""

    name_or_path: str | None
    class_name: str
    module_name: str

    @classmethod
    def from_model(cls, model: nn.Module) -> BaseModel:
        name = vars(model).get("name_or_path")
        return cls(name if isinstance(name, str) and name else None, type(model).__name__, type(model).__module__)


@dataclass(frozen=True)
class CapturedProgram:
    """A captured program, and facts of the model that its graph does not hold.

    ``training`` says that the graph holds the behaviour of train mode. For an ``ExportedProgram`` its nodes tell, and
    the mode that was asked for counts where no node depends on the mode. ``output_embedding`` and ``input_embedding``
    are module paths, None when unknown. ``module_types`` maps a module path to a qualified class name such as
    ``torch.nn.modules.linear.Linear``; the root has path "". ``base`` names the model, and is set for modules only.

    ``fills`` maps each keyword input that a caller may leave out to (how, the input that gives the shape). "ones_like"
    fills with ones. "ignore_like" is int64 of the same shape, filled with -100. "ignore_rows" is int64 of the first
    dimension only, filled with -100. "nan_rows:", followed by a dtype and the sizes of a row, is filled with nan.
    Without labels the loss is nan, and every other output is what the model gives without labels.
    """

    program: ExportedProgram
    training: bool
    model_type: str | None = None
    output_embedding: str | None = None
    input_embedding: str | None = None
    module_types: dict[str, str] = field(default_factory=dict)
    fills: dict[str, tuple[str, str]] = field(default_factory=dict)
    #: the names of ``forward``'s parameters, in order; empty where they are not known
    forward_parameters: tuple[str, ...] = ()
    source: PretrainedFacts | None = None
    base: BaseModel | None = None
    #: paths of modules whose class derives from ``nn.Linear`` or transformers' ``Conv1D``; set for captured modules
    #: only
    linear_modules: frozenset[str] = frozenset()


def capture(
    model: object, example_inputs: Any = None, *, dynamic_shapes: Any = "auto", training: bool = False
) -> CapturedProgram:
    """Capture ``model`` as an exported program.

    ``example_inputs`` is a tensor, a tuple of positional inputs, or a dict of keyword inputs. An
    :class:`ExampleInputs` also names the free dimensions. A transformers model or a denoiser of diffusers needs none,
    since its config tells what it takes. With ``dynamic_shapes`` "auto", dimension 0 of every tensor is free, and every
    other dimension that the model allows. An :class:`AdaptcWarning` names the dimensions that had to be fixed. Any
    other ``dynamic_shapes`` goes to ``torch.export.export`` unchanged.
    ``training`` captures train mode, and with it the loss of a transformers model that has no ``example_inputs``.
    Otherwise eval mode is captured, whatever mode the model is in.

    An ``ExportedProgram`` is used itself, not copied, and keeps the mode that it was exported in. Embeddings with
    ``max_norm`` no longer write to their weight (see ``RemoveMaxNormWrites``). Where that weight has rows that are too
    long, the program gets a weight of its own.

    Quantised layers of other libraries that ``plain_layers`` reads are captured as linear layers with their weights as
    they are stored.

    Raises :class:`CaptureError` with torch's reason in one line, and with the original error as its cause. Also raises
    it for quantised models that cannot be read.
    """
    program = _program_in(model)
    if program is not None:
        check_not_quantised(program)
        if example_inputs is not None or not (isinstance(dynamic_shapes, str) and dynamic_shapes == "auto"):
            raise CaptureError(
                "an exported program already has its inputs and shapes: leave out example_inputs and dynamic_shapes, "
                "or give the module it was exported from"
            )
        return _describe_program(program, getattr(model, "config", None), training)
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: give an nn.Module, a transformers model, an ExportedProgram, or "
            "what transformers.exporters returns"
        )
    # A module from torch.compile would prefix every name with `_orig_mod.`.
    if type(model).__name__ == "OptimizedModule" and isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model.get_submodule("_orig_mod")
    with plain_layers(model) as plain:
        check_not_quantised(plain)
        return _capture_module(plain, example_inputs, dynamic_shapes, training)


def _capture_module(model: nn.Module, example_inputs: Any, dynamic_shapes: Any, training: bool) -> CapturedProgram:
    with stage(f"capturing {type(model).__name__}"), _prepare_model(model, training):
        program = _canonicalize(_export_module(model, example_inputs, dynamic_shapes, training))
    name_value_checks(program)
    use_first_module_names(program, model)
    linear = _linear_modules(model)
    mark_linear(program, linear)
    config = getattr(model, "config", None)
    pretrained = is_pretrained_model(model)
    return CapturedProgram(
        program=program,
        training=training,
        model_type=getattr(config, "model_type", None),
        output_embedding=_module_path(model, "get_output_embeddings"),
        input_embedding=_module_path(model, "get_input_embeddings"),
        module_types={
            name: qualified_name(type(module)) for name, module in model.named_modules(remove_duplicate=False)
        },
        fills=input_fills(program, bool(getattr(config, "is_encoder_decoder", False))) if pretrained else {},
        forward_parameters=_forward_parameters(model),
        source=_pretrained_facts(model, program, training) if pretrained else None,
        base=BaseModel.from_model(model),
        linear_modules=linear,
    )


def _linear_modules(model: nn.Module) -> frozenset[str]:
    """Return the paths of modules whose class derives from a class that PEFT takes for a linear layer."""
    kinds = {type(m): any(qualified_name(c) in _LINEAR_CLASSES for c in type(m).__mro__[1:]) for m in model.modules()}
    return frozenset(n for n, m in model.named_modules(remove_duplicate=False) if kinds[type(m)])


def _forward_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of ``forward``'s parameters that come before ``*args``, without ``**kwargs``."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = itertools.takewhile(lambda p: p.kind is not p.VAR_POSITIONAL, parameters)
    return tuple(p.name for p in named if p.kind is not p.VAR_KEYWORD)


def _pretrained_facts(model: nn.Module, program: ExportedProgram, training: bool) -> PretrainedFacts:
    can_recapture = training and getattr(model, "can_generate", bool)()
    tensor_names = {
        n for held in (program.state_dict, program.constants) for n, t in held.items() if isinstance(t, Tensor)
    }
    return PretrainedFacts(
        type(model),
        copy.deepcopy(getattr(model, "config", None)),
        copy.deepcopy(getattr(model, "generation_config", None)),
        tuple(inspect.signature(model.forward).parameters),
        _module_path(model, "get_input_embeddings"),
        _module_path(model, "get_output_embeddings"),
        loss_type(model),
        is_causal_lm_loss(model),
        vars(model).get("_weight_conversions"),
        ModelSkeleton.from_model(model, tensor_names) if can_recapture else None,
    )


def _program_in(model: object) -> ExportedProgram | None:
    """Return the one program in ``model``, or None when it is no export.

    Raises CaptureError for an export of several programs, or of anything but ``torch.export`` programs.
    """
    if isinstance(model, ExportedProgram):
        return model
    components = model if isinstance(model, Mapping) else getattr(model, "components", None)
    if isinstance(model, nn.Module) or not isinstance(components, Mapping) or not components:
        return None
    programs = {name: getattr(c, "program", c) for name, c in components.items()}
    wrong = next((p for p in programs.values() if not isinstance(p, ExportedProgram)), None)
    if wrong is not None:
        raise CaptureError(
            f"this export holds a {type(wrong).__name__}, not a torch.export program: export it with "
            "transformers.exporters' DynamoExporter"
        )
    if len(programs) != 1:
        raise CaptureError(
            f"this export holds the programs {', '.join(map(repr, programs))}, and one is captured at a time: "
            "pass the program of one of them"
        )
    return next(iter(programs.values()))


def _canonicalize(program: ExportedProgram) -> ExportedProgram:
    """Return a program that computes what ``program`` does, in the form whose layers adapters recognise."""
    for simplify in (RemoveMaxNormWrites(), MatmulsToLinear(), SettleStrides()):
        program = simplify(program).output
    return program


def _describe_program(program: ExportedProgram, config: Any, training: bool) -> CapturedProgram:
    return CapturedProgram(
        program=_canonicalize(program),
        training=is_training(program, default=training),
        model_type=getattr(config, "model_type", None),
        module_types=all_module_types(program),
        fills=input_fills(program, encoder_decoder="decoder_input_ids" in keyword_inputs(program)),
    )


@contextlib.contextmanager
def _prepare_model(model: nn.Module, training: bool) -> Iterator[None]:
    """Run the block with ``model`` in train or eval mode, without a KV cache in its outputs, and with gradients on.

    The model is restored afterwards.
    """
    configs = {
        id(config): config
        for module in model.modules()
        if type(config := getattr(module, "config", None)).__module__.startswith("transformers.")
    }
    if training and any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        warnings.warn(
            "gradient checkpointing is not part of a captured graph: the program keeps every activation",
            AdaptcWarning,
            stacklevel=4,
        )
    with preserve_state(model, training, only_traced=True):
        for config in configs.values():
            if getattr(config, "use_cache", False):
                vars(config)["use_cache"] = False
        # The caller's own grad mode would be traced into the graph. With gradients on, only the model's own no_grad
        # blocks are.
        with torch.enable_grad():
            yield


@contextlib.contextmanager
def _name_forward_kwargs(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Run the block with ``model.forward`` naming every key of ``kwargs``.

    ``torch.export`` takes no dynamic shapes for an input that ends up in ``forward``'s ``**kwargs``.
    """
    parameters = inspect.signature(model.forward).parameters
    if all(name in parameters for name in kwargs):
        yield
        return
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    keep = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [keyword_only_parameter(n) for n in kwargs if n not in parameters]
    with patch_forward(model, forward, [*keep, *extra]):
        yield


def _export_module(model: nn.Module, example_inputs: Any, dynamic_shapes: Any, training: bool) -> ExportedProgram:
    inputs_made = example_inputs is None or isinstance(example_inputs, ExampleInputs)
    if inputs_made:
        example = example_inputs or make_example_inputs(model, training=training)
        args, kwargs = (), example.kwargs
        free_dims: FreeDims = example.dims_of
    else:
        args, kwargs = bind_arguments(model, example_inputs)
        free_dims = with_free_images(model, kwargs, all_dims_free((args, kwargs)))

    def export_once(values_are_fixed: bool) -> ExportedProgram:
        with broadcast_masks() as masks:
            if not (isinstance(dynamic_shapes, str) and dynamic_shapes == "auto"):
                program = export_with_shapes(model, args, kwargs, dynamic_shapes)
                export_guarded = partial(export, model, args, kwargs, dynamic_shapes, guarded=True)
                program = guard_sizes_of_one(model, program, args, kwargs, export_guarded, training)
            else:
                program = _export_with_free_sizes(model, args, kwargs, free_dims, training, not inputs_made)
        if masks.any or values_are_fixed or has_free_images(model):
            check_same_outputs(model, program, args, kwargs, training)
        return program

    with _name_forward_kwargs(model, kwargs), explain_inputs(model, args, kwargs, inputs_made=inputs_made):
        return export_or_fix_values(model, args, kwargs, export_once, COMPARISON)


def _export_with_free_sizes(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    free_dims: FreeDims,
    training: bool,
    has_given_inputs: bool,
) -> ExportedProgram:
    name = type(model).__name__
    for args2, kwargs2 in enlarge_sizes_of_one(args, kwargs) if has_given_inputs else ():
        larger_dims = with_free_images(model, kwargs2, all_dims_free((args2, kwargs2)))
        with contextlib.suppress(CaptureError), stage(f"exporting {name} with larger example inputs"):
            program, fixed = export_with_free_dims(model, args2, kwargs2, larger_dims)
            if not fixed and _is_right(model, program, args, kwargs, training):
                export_guarded = partial(_export_with_guards, model, args2, kwargs2, larger_dims)
                program = guard_sizes_of_one(model, program, args2, kwargs2, export_guarded, training)
                _warn_fixed_sizes(model, program, args2, kwargs2, larger_dims, fixed)
                return program
    with stage(f"exporting {name} with free sizes"):
        program, fixed = export_with_free_dims(model, args, kwargs, free_dims)
    export_guarded = partial(_export_with_guards, model, args, kwargs, free_dims)
    program = guard_sizes_of_one(model, program, args, kwargs, export_guarded, training)
    _warn_fixed_sizes(model, program, args, kwargs, free_dims, fixed)
    return program


def _is_right(
    model: nn.Module, program: ExportedProgram, args: tuple, kwargs: Mapping[str, Any], training: bool
) -> bool:
    """Return whether ``program`` computes what ``model`` does."""
    if not has_free_images(model):
        return has_same_outputs(model, program, args, kwargs, training)
    with contextlib.suppress(CaptureError):
        check_same_outputs(model, program, args, kwargs, training)
        return True
    return False


def _warn_fixed_sizes(
    model: nn.Module,
    program: ExportedProgram,
    args: tuple,
    kwargs: Mapping[str, Any],
    free_dims: FreeDims,
    fixed: list[str],
) -> None:
    """Warn of the fixed sizes: those in ``fixed``, which should have been free, and others that might have been
    free."""
    flat = pytree.tree_leaves((args, dict(kwargs)))
    names = flat_input_names(args, kwargs, list(inspect.signature(model.forward).parameters))
    told = [*fixed, *describe_fixed_sizes(program, names, lambda i: free_dims(flat[i]))]
    if told:
        warnings.warn(
            f"{type(model).__name__} was captured for some sizes alone: {'; '.join(told)}. Calls with other sizes "
            "fail. Capture it with example_inputs of the sizes that are wanted; other example_inputs (no dimension of "
            "size 1) or explicit dynamic_shapes may keep them free, where the model's code takes any",
            AdaptcWarning,
            stacklevel=4,
        )


def _export_with_guards(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any], free_dims: FreeDims
) -> ExportedProgram:
    return export_with_free_dims(model, args, kwargs, free_dims, guarded=True)[0]


def _module_path(model: nn.Module, getter: str) -> str | None:
    """Return the path of the module that ``model.getter()`` returns, or None where the model has no such method or
    module."""
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return (
        next((name for name, module in model.named_modules() if module is found), None) if found is not None else None
    )
