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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.capture.check_size_one import differing_sizes, left_alone, results
from adaptc.capture.dynamic_shapes import Free, export, export_free, export_stated
from adaptc.capture.explain_failure import in_terms_of
from adaptc.capture.fixed_sizes import fixed_sizes, names_of
from adaptc.capture.given_inputs import arguments, free_of, grown, tensors_in
from adaptc.capture.inputs.example_inputs import is_pretrained_model
from adaptc.capture.inputs.made_inputs import example_of
from adaptc.capture.model_loss import loss_type, means_over_next_labels
from adaptc.capture.model_state import keyword, preserve_state, replaced_forward
from adaptc.capture.quantised import check_not_quantised
from adaptc.capture.run_graph import guarded_module
from adaptc.capture.shell import Shell
from adaptc.errors import AdaptcWarning, CaptureError
from adaptc.passes.adapt.embedding_max_norm import BoundRows
from adaptc.passes.adapt.linear_products import LinearProducts
from adaptc.passes.analysis.program_facts import (
    all_module_types,
    call_by_first_name,
    fills_of,
    is_training,
    keyword_inputs,
    qualified,
)
from adaptc.passes.analysis.sites import mark_linear
from adaptc.passes.graph.pytree import pytree
from adaptc.progress import stage

#: the classes that PEFT takes for linear layers, by name, since transformers is not imported
_LINEAR_CLASSES = ("torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")


@dataclass(frozen=True, eq=False)
class Source:
    """The facts of a transformers model that its captured program keeps, for code that asks the program's module for
    them.

    ``config`` is a copy. ``inputs`` are the names of ``forward``'s parameters, in order. ``input_embedding`` and
    ``output_embedding`` are module paths, None when unknown. ``loss_type`` and ``means_over_next_labels`` are told in
    ``model_loss``. ``conversions`` are the renamings of keys that transformers applied to the model's weight files,
    None for a model that was loaded from no file. ``shell`` serves to capture the model again, for other inputs. It is
    set only for a model that can generate and was captured for training.
    """

    kind: type
    config: Any
    generation_config: Any
    inputs: tuple[str, ...]
    input_embedding: str | None
    output_embedding: str | None
    loss_type: str | None
    means_over_next_labels: bool
    conversions: Any = None
    shell: Shell | None = None


@dataclass(frozen=True)
class Base:
    """The base model as adapter files name it: its ``name_or_path``, None where it has none, its class and that class's
    module."""

    name: str | None
    class_name: str
    library: str

    @classmethod
    def of(cls, model: nn.Module) -> Base:
        name = vars(model).get("name_or_path")
        return cls(name if isinstance(name, str) and name else None, type(model).__name__, type(model).__module__)


@dataclass(frozen=True)
class Captured:
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
    takes: tuple[str, ...] = ()
    source: Source | None = None
    base: Base | None = None
    #: paths of modules whose class derives from ``nn.Linear`` or transformers' ``Conv1D``; set for captured modules
    #: only
    linear: frozenset[str] = frozenset()


def capture(
    model: object, example_inputs: Any = None, *, dynamic_shapes: Any = "auto", training: bool = False
) -> Captured:
    """Capture ``model`` as an exported program.

    ``example_inputs`` is a tensor, a tuple of positional inputs, or a dict of keyword inputs. A transformers model or a
    denoiser of diffusers needs none, since its config tells what it takes. With ``dynamic_shapes`` "auto", dimension 0
    of every tensor is free, and every other dimension that the model allows. An :class:`AdaptcWarning` names the
    dimensions that had to be fixed. Any other ``dynamic_shapes`` goes to ``torch.export.export`` unchanged.
    ``training`` captures train mode, and with it the loss of a transformers model that has no ``example_inputs``.
    Otherwise eval mode is captured, whatever mode the model is in.

    An ``ExportedProgram`` is used itself, not copied, and keeps the mode that it was exported in. Embeddings with
    ``max_norm`` no longer write to their weight (see ``BoundRows``). Where that weight has rows that are too long, the
    program gets a weight of its own.

    Raises :class:`CaptureError` with torch's reason in one line, and with the original error as its cause. Also raises
    it for quantised models.
    """
    program = _as_program(model)
    if program is not None:
        check_not_quantised(program)
        if example_inputs is not None or not (isinstance(dynamic_shapes, str) and dynamic_shapes == "auto"):
            raise CaptureError(
                "an exported program already has its inputs and shapes: leave out example_inputs and dynamic_shapes, "
                "or give the module it was exported from"
            )
        return _captured_program(program, getattr(model, "config", None), training)
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: give an nn.Module, a transformers model, an ExportedProgram, or "
            "what transformers.exporters returns"
        )
    # A module from torch.compile would prefix every name with `_orig_mod.`.
    if type(model).__name__ == "OptimizedModule" and isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model.get_submodule("_orig_mod")
    check_not_quantised(model)
    with stage(f"capturing {type(model).__name__}"), _prepared(model, training):
        program = _canonical(_export_module(model, example_inputs, dynamic_shapes, training))
    call_by_first_name(program, model)
    linear = _linear_modules(model)
    mark_linear(program, linear)
    config = getattr(model, "config", None)
    pretrained = is_pretrained_model(model)
    return Captured(
        program=program,
        training=training,
        model_type=getattr(config, "model_type", None),
        output_embedding=_path_of(model, "get_output_embeddings"),
        input_embedding=_path_of(model, "get_input_embeddings"),
        module_types={name: qualified(type(module)) for name, module in model.named_modules(remove_duplicate=False)},
        fills=fills_of(program, bool(getattr(config, "is_encoder_decoder", False))) if pretrained else {},
        takes=_takes(model),
        source=_source(model, program, training) if pretrained else None,
        base=Base.of(model),
        linear=linear,
    )


def _linear_modules(model: nn.Module) -> frozenset[str]:
    """Return the paths of modules whose class derives from a class that PEFT takes for a linear layer."""
    kinds = {type(m): any(qualified(c) in _LINEAR_CLASSES for c in type(m).__mro__[1:]) for m in model.modules()}
    return frozenset(n for n, m in model.named_modules(remove_duplicate=False) if kinds[type(m)])


def _takes(model: nn.Module) -> tuple[str, ...]:
    """Return the names of ``forward``'s parameters that come before ``*args``, without ``**kwargs``."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = itertools.takewhile(lambda p: p.kind is not p.VAR_POSITIONAL, parameters)
    return tuple(p.name for p in named if p.kind is not p.VAR_KEYWORD)


def _source(model: nn.Module, program: ExportedProgram, training: bool) -> Source:
    again = training and getattr(model, "can_generate", bool)()
    kept = {n for held in (program.state_dict, program.constants) for n, t in held.items() if isinstance(t, Tensor)}
    return Source(
        type(model),
        copy.deepcopy(getattr(model, "config", None)),
        copy.deepcopy(getattr(model, "generation_config", None)),
        tuple(inspect.signature(model.forward).parameters),
        _path_of(model, "get_input_embeddings"),
        _path_of(model, "get_output_embeddings"),
        loss_type(model),
        means_over_next_labels(model),
        vars(model).get("_weight_conversions"),
        Shell.of(model, kept) if again else None,
    )


def _as_program(model: object) -> ExportedProgram | None:
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


def _canonical(program: ExportedProgram) -> ExportedProgram:
    """Return a program that computes what ``program`` does, in the form whose layers adapters recognise."""
    return LinearProducts()(BoundRows()(program).output).output


def _captured_program(program: ExportedProgram, config: Any, training: bool) -> Captured:
    return Captured(
        program=_canonical(program),
        training=is_training(program, default=training),
        model_type=getattr(config, "model_type", None),
        module_types=all_module_types(program),
        fills=fills_of(program, encoder_decoder="decoder_input_ids" in keyword_inputs(program)),
    )


@contextlib.contextmanager
def _prepared(model: nn.Module, training: bool) -> Iterator[None]:
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
    with preserve_state(model, training, traced=True):
        for config in configs.values():
            if getattr(config, "use_cache", False):
                vars(config)["use_cache"] = False
        # The caller's own grad mode would be traced into the graph. With gradients on, only the model's own no_grad
        # blocks are.
        with torch.enable_grad():
            yield


@contextlib.contextmanager
def _flat_forward(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
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
    extra = [keyword(n) for n in kwargs if n not in parameters]
    with replaced_forward(model, forward, [*keep, *extra]):
        yield


def _export_module(model: nn.Module, example_inputs: Any, dynamic_shapes: Any, training: bool) -> ExportedProgram:
    if example_inputs is None:
        example = example_of(model, training=training)
        args, kwargs = (), example.kwargs
        free: Free = example.free
    else:
        args, kwargs = arguments(model, example_inputs)
        free = free_of((args, kwargs))
    name = type(model).__name__

    with _flat_forward(model, kwargs), in_terms_of(model, args, kwargs, made=example_inputs is None):
        if not (isinstance(dynamic_shapes, str) and dynamic_shapes == "auto"):
            program = export_stated(model, args, kwargs, dynamic_shapes)
            again = partial(export, model, args, kwargs, dynamic_shapes, guarded=True)
            return _guarded(model, program, args, kwargs, again, training)
        for args2, kwargs2 in grown(args, kwargs) if example_inputs is not None else ():
            with contextlib.suppress(CaptureError), stage(f"exporting {name} with larger example inputs"):
                program, fixed = export_free(model, args2, kwargs2, free_of((args2, kwargs2)))
                if not fixed and _same_outputs(model, program, args, kwargs, training):
                    again = partial(_export_guarded, model, args2, kwargs2, free_of((args2, kwargs2)))
                    program = _guarded(model, program, args2, kwargs2, again, training)
                    _tell_fixed(model, program, args2, kwargs2, free_of((args2, kwargs2)), fixed)
                    return program
        with stage(f"exporting {name} with free sizes"):
            program, fixed = export_free(model, args, kwargs, free)
        again = partial(_export_guarded, model, args, kwargs, free)
        program = _guarded(model, program, args, kwargs, again, training)
    _tell_fixed(model, program, args, kwargs, free, fixed)
    return program


def _tell_fixed(
    model: nn.Module, program: ExportedProgram, args: tuple, kwargs: Mapping[str, Any], free: Free, fixed: list[str]
) -> None:
    """Warn of the fixed sizes: those in ``fixed``, which should have been free, and others that might have been
    free."""
    flat = pytree.tree_leaves((args, dict(kwargs)))
    names = names_of(args, kwargs, list(inspect.signature(model.forward).parameters))
    told = [*fixed, *fixed_sizes(program, names, lambda i: free(flat[i]))]
    if told:
        warnings.warn(
            f"{type(model).__name__} was captured for some sizes alone: {'; '.join(told)}. Calls with other sizes "
            "fail. Capture it with example_inputs of the sizes that are wanted; other example_inputs (no dimension of "
            "size 1) or explicit dynamic_shapes may keep them free, where the model's code takes any",
            AdaptcWarning,
            stacklevel=4,
        )


def _export_guarded(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], free: Free) -> ExportedProgram:
    return export_free(model, args, kwargs, free, guarded=True)[0]


def _guarded(
    model: nn.Module,
    program: ExportedProgram,
    args: tuple,
    kwargs: Mapping[str, Any],
    again: Callable[[], ExportedProgram],
    training: bool,
) -> ExportedProgram:
    """Return ``program``, or one with guards where ``program`` computes something else than ``model`` at sizes of 1.

    ``again`` exports the model with such guards. Warns where the guards do not tell the two apart.
    """
    where = [] if training else differing_sizes(model, program, args, kwargs)
    if not where:
        return program
    guarded = None
    with contextlib.suppress(CaptureError), stage(f"exporting {type(model).__name__} with guards on sizes of one"):
        guarded = again()
    if guarded is not None and not differing_sizes(model, guarded, args, kwargs):
        return guarded
    warnings.warn(
        f"{type(model).__name__} computes something else for {', '.join(where)} than for larger sizes, and torch could "
        "not tell why: calls of this size compute what those of larger ones do. Capture it for such sizes alone, with "
        "example_inputs of this size and dynamic_shapes=None",
        AdaptcWarning,
        stacklevel=4,
    )
    return program


def _same_outputs(
    model: nn.Module, program: ExportedProgram, args: tuple, kwargs: Mapping[str, Any], training: bool
) -> bool:
    """Return whether a program traced on two rows gives the model's outputs on the user's example of one row.

    A model that branches on a size of 1 is traced on its other branch, without a guard that says so.
    """
    tensors = tensors_in((args, kwargs, list(model.parameters())))
    if training or any(t.device.type == "meta" for t in tensors):
        return True
    with left_alone(model):
        expected, expected_tree = results(model(*args, **kwargs))
        try:
            found, found_tree = results(guarded_module(program)(*args, **kwargs))
        except Exception:  # guards of a branch that the example does not take raise it
            return False
    return expected_tree == found_tree and all(
        e.shape == f.shape and torch.allclose(e, f, rtol=1e-2, atol=1e-3, equal_nan=True)
        if isinstance(e, Tensor)
        else e == f
        for e, f in zip(expected, found, strict=True)
    )


def _path_of(model: nn.Module, getter: str) -> str | None:
    """Return the path of the module that ``model.getter()`` returns, or None where the model has no such method or
    module."""
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return (
        next((name for name, module in model.named_modules() if module is found), None) if found is not None else None
    )
