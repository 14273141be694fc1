"""Run functions of a model under the torch mode in which its tensors were made.

A model that belongs to a ``torch.func`` transform is refused, with the name of the tensor that ends with the transform.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.errors import CaptureError
from adaptc.torch_modes import is_wrapped_or_dual

P = ParamSpec("P")
R = TypeVar("R")


def match_inference_mode(function: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Wrap a function of a model so that it runs in inference mode where the model's tensors were made in inference
    mode.

    No gradient may be recorded with such tensors. The wrapper raises CaptureError for a model that belongs to a
    transform of ``torch.func``.
    """

    @wraps(function)
    def run(model: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not any(t.is_inference() for t in _model_tensors(model)):
            return function(model, *args, **kwargs)
        with torch.inference_mode():
            return function(model, *args, **kwargs)

    return run


def check_can_train(model: Any) -> None:
    """Raise CaptureError for a model that no program can train with: its tensors were made in inference mode."""
    if any(t.is_inference() for t in _model_tensors(model)):
        raise CaptureError(
            "training=True takes gradients, and the model has none: its tensors were made in torch.inference_mode. "
            "Make or load the model outside of it"
        )


def _model_tensors(model: Any) -> list[Tensor]:
    if isinstance(model, ExportedProgram):
        found = dict(model.state_dict)
    elif isinstance(model, nn.Module):
        found = dict(model.named_parameters()) | dict(model.named_buffers())
    else:
        return []
    for name, t in found.items():
        if is_wrapped_or_dual(t):
            raise CaptureError(
                f"{name!r} belongs to a transform of torch.func, or a forward-mode derivative, and ends with it: make "
                "the model outside. torch.func.functional_call(prog.module(), parameters, inputs) is a call by others"
            )
    return [t for t in found.values() if isinstance(t, Tensor)]
