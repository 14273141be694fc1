"""Replace a module's ``forward`` for a while, for example by one that names the inputs of a capture."""

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
    """Run the block with ``forward`` as the model's forward, whose signature has these parameters.

    Afterwards the model has its former forward, whether that is its class's or an attribute of its own.
    """
    own = {name: value for name, value in vars(model).items() if name == "forward"}
    vars(forward)["__signature__"] = inspect.Signature(list(parameters))
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        vars(model).update(own)


def keyword(name: str) -> inspect.Parameter:
    """Return a keyword-only parameter called ``name``."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
