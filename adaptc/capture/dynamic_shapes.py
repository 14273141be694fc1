"""Export with as many free dimensions as the model allows, and say which wanted dimensions are fixed.

Dimensions are first given by name. That also states which of them are equal, and leaves sizes 0 and 1 in range. The
next attempt gives them as hints, which torch relates and bounds by itself. Then only dimension 0 is free, and then
none.

Private torch use, with the public route that was tried:

- ``torch._dynamo.config.fake_tensor_cache_enabled``: torch keeps what it computed of fake tensors. For free sizes that
  costs more than it saves: without it, a capture takes 0.7 to 1.0 of the time. Public: an environment variable that
  torch reads when it is imported.
- ``torch.fx.experimental._config.backed_size_oblivious``: sizes of 0 and 1 are traced as all others. Public: named
  ``Dim``s, for which the tracer still assumes two and more, and takes one branch of ``if x.shape[0] == 1`` unseen;
  ``torch.export.dynamic_shapes`` with unbacked sizes refuses such a branch instead of guarding it.

``known_size_limits`` saves a first export that fails: it names the sizes at which known models branch, from their
modules. For each it gives the largest for which the model's code takes one branch. Other limits are read from torch's
message, which costs another export.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import free_symbols

from adaptc.capture.fixed_sizes import flat_input_names
from adaptc.capture.model_state import preserve_state
from adaptc.capture.repeated_layers.traced_once import CopiedLayers, copy_equal_layers
from adaptc.capture.replacements.free_lengths import any_length
from adaptc.capture.replacements.quick_sizes import fast_size_arithmetic
from adaptc.capture.replacements.series_rows import stacked_series
from adaptc.capture.replacements.shifted_labels import shift_labels_of_any_length
from adaptc.capture.replacements.size_lists import lists_of_any_size
from adaptc.capture.replacements.traceable_calls import (
    FreeScalarSizes,
    free_tensor_lengths,
    kept_modules,
    unscaled_layers,
)
from adaptc.capture.replacements.visited_experts import visited_experts
from adaptc.capture.vision.methods.joined_patches import joins_patches_at_once
from adaptc.capture.vision.trace_towers import traced_for_any_images
from adaptc.errors import CaptureError
from adaptc.passes.graph.lifted import user_inputs
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor

_UNKNOWN_OUTPUT = "not a known type"
#: what replaces functions of a model that are traced for some sizes alone, or not at all
_REPLACEMENTS: tuple[Callable[[nn.Module], AbstractContextManager[Any]], ...] = (
    traced_for_any_images,
    joins_patches_at_once,
    shift_labels_of_any_length,
    any_length,
    free_tensor_lengths,
    lists_of_any_size,
    kept_modules,
    unscaled_layers,
)

#: the free dimensions of an input: index -> name (equal names are equal sizes, ``4*name`` is four times one), or None
#: when torch is to find out
FreeDims = Callable[[Tensor], dict[int, str | None]]


def export(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any], shapes: Any, guarded: bool = False, **options: Any
) -> ExportedProgram:
    """Run ``torch.export.export`` in non-strict mode; raise a :class:`CaptureError` that says why where it fails.

    ``guarded`` turns the model's branches on sizes of 0 or 1 into guards.
    """
    from torch._dynamo import config as dynamo_config  # slow to import; an export imports it, too

    printed, graph = io.StringIO(), ""
    try:
        patched = _config.patch(backed_size_oblivious=guarded)  # type: ignore[attr-defined]  # made when it is loaded
        uncached = dynamo_config.patch(fake_tensor_cache_enabled=False)  # type: ignore[attr-defined]  # as above
        for copies in (copy_equal_layers, contextlib.nullcontext):
            with contextlib.redirect_stderr(printed), patched, uncached, preserve_state(model, only_traced=True):
                with (
                    visited_experts(model, args, kwargs),
                    stacked_series(model, args, kwargs),
                    copies(model) as once,
                    fast_size_arithmetic(),
                    FreeScalarSizes(),
                    contextlib.ExitStack() as replaced,
                    float_stand_ins(model) as put_back,
                ):
                    for replace_functions in _REPLACEMENTS:
                        replaced.enter_context(replace_functions(model))
                    program = torch.export.export(
                        model, args, dict(kwargs), dynamic_shapes=shapes, strict=False, **options
                    )
                put_back(program)
                if not isinstance(once, CopiedLayers) or once.is_sound():
                    # Models make masks that none of their layers reads.
                    if program.graph.eliminate_dead_code():
                        program.graph_module.recompile()
                    return program
        raise AssertionError("an export without copies is final")
    except Exception as error:
        graph = str(getattr(error, "partial_fx_graph", ""))
        raise CaptureError(export_error_text(model, error)) from error
    finally:
        # On a data-dependent branch torch prints the whole graph so far, thousands of lines before a short error.
        sys.stderr.write(printed.getvalue().replace(graph, "").strip("\n"))


@contextlib.contextmanager
def float_stand_ins(model: nn.Module) -> Iterator[Callable[[ExportedProgram], None]]:
    """Run the block with plain parameters in the place of ``model``'s quantised ones, which torch cannot export.

    They are all zeros. An export reads no values, so their memory is never touched, and takes no room.

    The block is given a function that puts the quantised weights into a program that was exported in the block.
    """
    stand_ins: dict[int, nn.Parameter] = {}
    weights: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(weight, QuantizedTensor):
                replaced.append((module, name, weight))

    def put_back(program: ExportedProgram) -> None:
        for fqn, tensor in program.state_dict.items():
            if id(tensor) in weights:
                program.state_dict[fqn] = weights[id(tensor)]

    try:
        for module, name, weight in replaced:
            if id(weight) not in stand_ins:
                zeros = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
                stand_in = stand_ins[id(weight)] = nn.Parameter(zeros, requires_grad=False)
                weights[id(stand_in)] = weight
            setattr(module, name, stand_ins[id(weight)])
        yield put_back
    finally:
        for module, name, weight in replaced:
            setattr(module, name, weight)


def export_with_free_dims(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any], free_dims: FreeDims, guarded: bool = False
) -> tuple[ExportedProgram, list[str]]:
    """Return the program with the most free dimensions, and one line for each wanted dimension that is fixed.

    ``guarded`` is as in :func:`export`. Dimensions are then hints, since a named dimension promises that all its sizes
    work.
    """
    failures: list[Exception] = []
    last_error: CaptureError | None = None
    wanted: FreeDims = (lambda t: dict.fromkeys(free_dims(t))) if guarded else free_dims
    for shapes, options in _shape_attempts(model, args, kwargs, wanted, failures):
        try:
            program = export(model, args, kwargs, shapes, guarded, **options)
        except CaptureError as error:
            last_error, cause = error, error.__cause__
            failures.append(cause if isinstance(cause, Exception) else error)
            # A branch on a tensor's value fails whatever the shapes are, and so does an output torch cannot take apart.
            if type(cause).__name__ == "GuardOnDataDependentSymNode" or _UNKNOWN_OUTPUT in str(cause):
                break
        else:
            return program, _fixed_dims(model, program, args, kwargs, free_dims, failures)
    assert last_error is not None
    raise last_error


def export_with_shapes(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], shapes: Any) -> ExportedProgram:
    """Return the program with exactly these dynamic shapes."""
    try:
        return export(model, args, kwargs, shapes)
    except CaptureError as error:
        if not _is_unproven_guard(error.__cause__):
            raise
    return export(model, args, kwargs, shapes, **_DEFER_GUARDS)


#: makes torch turn guards into assertions in the graph
_DEFER_GUARDS = {"prefer_deferred_runtime_asserts_over_guards": True}


def _is_unproven_guard(error: BaseException | None) -> bool:
    """Return whether torch failed on a guard that always holds but that it cannot prove.

    Grouped-query attention on torch 2.11 has such a guard.
    """
    text = str(error)
    return "Constraints violated" in text and "Suggested fixes" not in text


def _shape_attempts(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any], free_dims: FreeDims, failures: list[Exception]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    dims: dict[str, Any] = {}
    limits = {name: {"max": most} for name, most in known_size_limits(model).items()}

    def spec(make: Callable[[dict[int, str | None]], dict]) -> dict[str, Any]:
        stated = [_map_tensors(value, lambda t: make(free_dims(t)) or None) for value in (args, dict(kwargs))]
        return inspect.signature(model.forward).bind(*stated[0], **stated[1]).arguments

    def named(wanted: dict[int, str | None]) -> dict:
        return {i: _named_dim(n, dims, limits) if n else Dim.AUTO for i, n in wanted.items()}

    shapes, options = spec(named), {}
    for _ in range(3 if dims else 0):
        yield shapes, options
        refined = _refine_shapes(str(failures[-1]), shapes)
        if refined is not None:
            shapes = refined
        elif _is_unproven_guard(failures[-1]) and not options:
            options = _DEFER_GUARDS
        else:
            break
    yield spec(lambda wanted: dict.fromkeys(wanted, Dim.AUTO)), {}
    if any(set(free_dims(t)) - {0} for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
        yield spec(lambda wanted: {0: Dim.AUTO} if 0 in wanted else {}), {}
    yield None, {}


def _named_dim(name: str, dims: dict[str, Any], limits: Mapping[str, Mapping[str, int]]) -> Any:
    """Return the dimension called ``name``, made once and kept in ``dims``. ``4*name`` is four times that dimension."""
    factor, _, base = name.rpartition("*")
    found = dims.setdefault(base, Dim(base, **limits.get(base, {})))
    return int(factor) * found if factor else found


def _refine_shapes(message: str, shapes: dict[str, Any]) -> Any:
    """Return ``shapes`` with the bounds that torch suggests, or None when it suggests none or suggests to fix a
    dimension."""
    # torch's parser of suggestions fails on the paragraph that follows them in the message.
    suggestions = message.split("\n\nThe error above")[0]
    leaves, tree = pytree.tree_flatten(shapes)
    # torch cannot refine shapes that have hints among them. Its suggestions never name a hint.
    bare = pytree.tree_unflatten([None if isinstance(v, type(Dim.AUTO)) else v for v in leaves], tree)
    try:
        refined = refine_dynamic_shapes_from_suggested_fixes(suggestions, bare)
    except Exception:  # suggestions are prose, and torch cannot parse all of them
        return None
    both = zip(leaves, pytree.tree_leaves(refined), strict=True)
    refined = pytree.tree_unflatten([v if isinstance(v, type(Dim.AUTO)) else new for v, new in both], tree)
    fixes_one = any(isinstance(leaf, int) for leaf in pytree.tree_leaves(refined))
    return None if fixes_one else refined


def _map_tensors(value: Any, make: Callable[[Tensor], Any]) -> Any:
    """Return ``value`` with every tensor replaced by its shape spec, in the containers that torch.export compares
    with."""
    if isinstance(value, Tensor):
        return make(value)
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(v, make) for v in value)
    if type(value) is dict:
        return {k: _map_tensors(v, make) for k, v in value.items()}
    leaves, tree = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    return None if tree.is_leaf() else [_map_tensors(v, make) for v in leaves]


def _fixed_dims(
    model: nn.Module,
    program: ExportedProgram,
    args: tuple,
    kwargs: Mapping[str, Any],
    free_dims: FreeDims,
    failures: list[Exception],
) -> list[str]:
    names = flat_input_names(args, kwargs, list(inspect.signature(model.forward).parameters))
    reason = f" ({torch_reason(failures[0])})" if failures else ""
    lines: list[str] = []
    given = pytree.tree_leaves((args, dict(kwargs)))
    for name, value, traced in zip(names, given, user_inputs(program).values(), strict=True):
        if not isinstance(value, Tensor):
            continue
        for i, wanted in free_dims(value).items():
            if wanted is not None and isinstance(traced, Tensor) and not free_symbols(traced.shape[i]):
                lines.append(f"dimension {i} ({wanted}) of input {name!r} is fixed at {value.shape[i]}{reason}")
    return lines


def torch_reason(error: BaseException) -> str:
    """Return torch's reason in one line: the root error's first line, or the first constraint that it names as
    violated."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.startswith("Constraints violated") and len(lines) > 1:
        text = lines[1].removeprefix("- ")
    text = text.split(". If you're using mark_dynamic")[0]
    return text if len(text) <= 300 else text[:297] + "..."


def export_error_text(model: nn.Module, error: BaseException) -> str:
    """Return why ``model`` could not be exported, where that came up, and what to try."""
    reason, kind = torch_reason(error), type(error).__name__
    if kind == "GuardOnDataDependentSymNode":
        advice = (
            "the model takes a branch or a shape from a tensor's value: use torch.where, torch.cond or torch._check"
        )
    elif _UNKNOWN_OUTPUT in reason:
        advice = "the outputs must be tensors in registered containers: pass use_cache=False, or register the class"
    elif kind == "UserError":
        advice = "pass dynamic_shapes that leave those dimensions out or bound them, or dynamic_shapes=None"
    else:
        advice = "check example_inputs against the model's forward"
    return (
        f"{failure_text(model, error)}. What to try: {advice}; or export it yourself (torch.export.export with "
        "strict=True, or transformers.exporters) and pass the program"
    )


def failure_text(model: nn.Module, error: BaseException) -> str:
    """Return a line that says that ``model`` could not be captured, with torch's reason and where it came up."""
    return f"{type(model).__name__} could not be captured: {error_text(error)}"


def error_text(error: BaseException) -> str:
    """Return an error of a model or of torch in one line, with the source line outside of torch where it came up."""
    outside = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in (file := Path(frame.filename)).as_posix() and Path(__file__).parent not in file.parents
    ]
    kind, where = type(error).__name__, ""
    if outside and kind != "UserError":
        where = f", at {outside[-1].filename}:{outside[-1].lineno} `{outside[-1].line}`"
    return f"{kind}: {torch_reason(error)}{where}"


#: class of a module -> (name of a size, the largest it may have). diffusers' upsampling copies batches of 64 and more
#: to work around a fault of torch, and so takes another branch.
_MAX_SIZES = {"diffusers.models.upsampling.Upsample2D": ("batch", 63)}


def known_size_limits(model: nn.Module) -> dict[str, int]:
    """Return for each limited size, by name, the largest that ``model`` is captured for."""
    found: dict[str, int] = {}
    for kind in {type(m) for m in model.modules()}:
        if (limit := _MAX_SIZES.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            name, largest = limit
            found[name] = min(largest, found.get(name, largest))
    positions = _position_table_length(model)
    return found if positions is None else {**found, "sequence": positions}


def _position_table_length(model: nn.Module) -> int | None:
    """Return how many position_ids a transformers model has in a buffer that it slices (BERT, CLIP); None for other
    models."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    for module in model.modules():
        table = dict(module.named_buffers(recurse=False)).get("position_ids")
        tokens = (m for m in module.children() if isinstance(m, nn.Embedding))
        if table is not None and table.ndim == 2 and any(m.num_embeddings == vocabulary for m in tokens):
            return table.shape[1]
    return None
