"""Explain a failed capture in terms of the inputs that the user gave.

An error of ``torch.export`` becomes a CaptureError that names the input which torch cannot take. Where the inputs were
made from the model's config, the error lists them and asks for others. Nobody is told to check inputs that they did not
give. The error also says whether the model itself runs on these inputs.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.check_size_one import run_without_effects
from adaptc.capture.dynamic_shapes import error_text, failure_text
from adaptc.capture.model_state import can_run, preserve_state
from adaptc.errors import CaptureError, listing
from adaptc.passes.graph.pytree import named_leaves, pytree
from adaptc.tables import dtype_name

_UNSUPPORTED = re.compile(r"Unsupported input type <class '([\w.<>]+)'>")
#: names of torch's errors that are about the model's code, whatever the inputs are
_TORCH_ERRORS = ("UserError", "GuardOnDataDependentSymNode", "Unsupported", "ConstraintViolationError")
_UNKNOWN_OUTPUT = "not a known type"


@contextlib.contextmanager
def explain_inputs(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], *, inputs_made: bool) -> Iterator[None]:
    """Run the block, which captures ``model`` with these inputs, with clearer messages in its CaptureErrors.

    ``inputs_made`` says that adaptc made the inputs, since none were given.
    """
    try:
        yield
    except CaptureError as error:
        cause = error.__cause__
        if cause is None:
            raise
        raise CaptureError(_explained_text(model, args, kwargs, error, cause, inputs_made)) from cause


def _explained_text(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    error: CaptureError,
    cause: BaseException,
    inputs_made: bool,
) -> str:
    """Return the text of ``error``, or a clearer one."""
    if found := _UNSUPPORTED.search(str(cause)):
        return _unsupported_text(model, args, kwargs, found[1])
    eager = _eager_outcome(model, args, kwargs)
    if not inputs_made or type(cause).__name__ in _TORCH_ERRORS or _UNKNOWN_OUTPUT in str(cause):
        return f"{error}{eager}"
    takes = ", ".join(inspect.signature(model.forward).parameters)
    return (
        f"{failure_text(model, cause)}. No example_inputs were given, and the inputs made from its config do not suit "
        f"it: {listing(_input_texts(model, args, kwargs).values())}. Pass example_inputs, a dict of keyword inputs "
        f"(its forward takes {takes}){eager}"
    )


def _eager_outcome(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Return a sentence that says whether the model itself runs on the inputs, or '' where running it is not tried."""
    if not can_run(model, args, kwargs):
        return ""
    copies = pytree.tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    try:
        with run_without_effects(model):
            model(*copies[0], **copies[1])
    except Exception as error:  # a model may raise anything on such inputs
        return f". The model itself fails on these inputs, too: {error_text(error)}"
    return ". The model itself runs on these inputs"


def run_model(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the model's outputs in eval mode and without gradients, and leave the model unchanged.

    Raises CaptureError where the model fails on these inputs.
    """
    try:
        with preserve_state(model, training=False), torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:  # a model may raise anything on such inputs
        raise CaptureError(
            f"{type(model).__name__} itself fails, before anything is captured: {error_text(error)}. It was given "
            f"{listing(_input_texts(model, args, kwargs).values())}. Check that it runs on these without adaptc"
        ) from error


def _unsupported_text(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], class_name: str) -> str:
    odd = [
        name
        for name, value in _named_input_leaves(model, args, kwargs).items()
        if _class_path(type(value)) == class_name
    ]
    short = class_name.rpartition(".")[2]
    where = f"input {odd[0]!r}" if odd else "an input"
    if "Cache" in short:
        advice = (
            "Leave it out of example_inputs: the program then computes whole sequences, without a cache. To generate "
            "with one, export the model with transformers.exporters, whose programs take a cache, and pass the program"
        )
    else:
        advice = (
            "Give its tensors as inputs of their own, or make it known: torch.utils._pytree.register_pytree_node for a "
            "container, torch.export.register_dataclass for a dataclass"
        )
    return (
        f"{type(model).__name__} could not be captured: {where} is a {short}, and torch.export takes tensors, numbers, "
        f"strings, None, and lists and dicts of these. {advice}"
    )


def _class_path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _named_input_leaves(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return every leaf of the inputs, by its parameter name in ``forward`` followed by its path within that input."""
    names = list(inspect.signature(model.forward).parameters)
    out: dict[str, Any] = {}
    for i, value in enumerate(args):
        name = names[min(i, len(names) - 1)]
        out |= {f"{name}{path}": leaf for path, leaf in named_leaves(value)}
    for name, value in kwargs.items():
        out |= {f"{name}{path}": leaf for path, leaf in named_leaves(value)}
    return out


def _input_texts(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Return every leaf of the inputs as text: a tensor's dtype and shape, and any other value's repr."""
    return {
        name: f"{name} {dtype_name(v.dtype)}{list(v.shape)}" if isinstance(v, Tensor) else f"{name}={v!r}"
        for name, v in _named_input_leaves(model, args, kwargs).items()
    }
