"""Models whose tensors belong to what was on in torch when they were made.

Before: a model, or a program of one. After: what is made of it is made where its tensors can be used; or an error that
names the tensor which will end with a transform.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.errors import CaptureError
from adaptc.torch_modes import transformed

P = ParamSpec("P")
R = TypeVar("R")


def where_made(function: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Run a function of a model in inference mode where the model was made in it: no gradient may be recorded with such
    tensors. Raises CaptureError for a model that belongs to a transform of ``torch.func``."""

    @wraps(function)
    def run(model: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not any(t.is_inference() for t in _tensors(model)):
            return function(model, *args, **kwargs)
        with torch.inference_mode():
            return function(model, *args, **kwargs)

    return run


def _tensors(model: Any) -> list[Tensor]:
    if isinstance(model, ExportedProgram):
        found = dict(model.state_dict)
    elif isinstance(model, nn.Module):
        found = dict(model.named_parameters()) | dict(model.named_buffers())
    else:
        return []
    for name, t in found.items():
        if transformed(t):
            raise CaptureError(
                f"{name!r} belongs to a transform of torch.func, or a forward-mode derivative, and ends with it: make "
                "the model outside. torch.func.functional_call(prog.module(), parameters, inputs) is a call by others"
            )
    return [t for t in found.values() if isinstance(t, Tensor)]
