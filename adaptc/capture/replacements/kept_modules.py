"""Let a model convert its modules to the dtype that they have while it is traced.

Routers of mixtures write ``self.classifier = self.classifier.to(torch.float32)`` in each call. torch converts a module
by replacing the memory of its parameters, which a trace refuses, even where nothing would change. Such a conversion
gives the module itself. One that would change a parameter is left to torch.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from adaptc.capture.model_state import own_attribute


@contextlib.contextmanager
def kept_modules(model: nn.Module) -> Iterator[None]:
    """Run the block with modules of ``model`` that stay as they are where ``to`` would not change them."""
    kinds = {kind: _converts(kind) for kind in {type(m) for m in model.modules()}}
    children = {id(c): c for m in model.modules() if kinds[type(m)] for c in m.children()}
    with contextlib.ExitStack() as stack:
        for child in children.values():
            stack.enter_context(own_attribute(child, "to", _keeping_to(child)))
        yield


def _converts(kind: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "to" in code.co_names


def _keeping_to(module: nn.Module) -> Callable[..., nn.Module]:
    original = module.to

    def to(*args: Any, **kwargs: Any) -> nn.Module:
        wanted = (*args, *kwargs.values())
        tensors = list(itertools.chain(module.parameters(), module.buffers()))
        is_dtype = len(wanted) == 1 and isinstance(wanted[0], torch.dtype)
        # As torch does: a dtype of floats converts no integers.
        if is_dtype and all(t.dtype == wanted[0] for t in tensors if t.is_floating_point() or t.is_complex()):
            return module
        return original(*args, **kwargs)

    return to
