"""A module with another ``forward`` for a while, such as one that names the inputs which a capture is to have.

Before: a module, what stands in for its forward, and the parameters to show. After: the module as it was, whether its
forward was its class's or its own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn


@contextlib.contextmanager
def replaced_forward(
    model: nn.Module, forward: Callable[..., Any], parameters: Sequence[inspect.Parameter]
) -> Iterator[None]:
    """``model`` with another forward, which shows these parameters."""
    own = {name: value for name, value in vars(model).items() if name == "forward"}
    vars(forward)["__signature__"] = inspect.Signature(list(parameters))
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        vars(model).update(own)


def keyword(name: str) -> inspect.Parameter:
    """A parameter that is given by its name alone."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
