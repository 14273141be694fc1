"""Let four calls be traced that torch.export takes otherwise than a model means them.

``len(tensor)``: Python demands an integer, so torch fixes the size whose ``len`` a model takes, such as that of the
batch. ``tensor.shape[0]`` is the same number and stays free. So the files of the model's classes get a ``len`` of their
own for a while, in the tracing thread alone. What is no tensor has Python's length.

``torch.as_tensor(tensor.shape[1])``: torch makes a constant of the size, which is fixed by that. A tensor that is
filled with the size has the same value, and the size stays free. So does that of a list of :mod:`size_lists`.

``module.to(dtype)``: routers of mixtures write ``self.classifier = self.classifier.to(torch.float32)`` in each call.
torch converts a module by replacing the memory of its parameters, which a trace refuses, even where nothing would
change. Such a conversion gives the module itself. One that would change a parameter is left to torch.

``model._rescale_layers()``: RWKV's first call divides weights of late layers by powers of two, which its later calls
count on. A program would divide them in every call. Layers that were not rescaled when the trace begins are traced as
they are, which gives the same.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaptc.capture.model_functions import Function, replaced_functions
from adaptc.capture.model_state import own_attribute
from adaptc.capture.replacements.size_lists import SizeList

#: the packages whose code asks for no sizes of a model
_NO_MODELS = ("torch", "builtins")


@contextlib.contextmanager
def free_tensor_lengths(model: nn.Module) -> Iterator[None]:
    """Run the block with a ``len`` that leaves sizes free, in the files that define the classes of ``model``."""
    thread = threading.get_ident()

    def length(value: Any) -> Any:
        if threading.get_ident() != thread:
            return len(value)
        if isinstance(value, SizeList):
            return value.size
        return value.shape[0] if isinstance(value, Tensor) and value.ndim > 0 else len(value)

    names = {c.__module__ for m in model.modules() for c in type(m).__mro__}
    files = [sys.modules[n] for n in names if n in sys.modules and n.partition(".")[0] not in _NO_MODELS]
    changed = [vars(file) for file in files if "len" not in vars(file)]
    try:
        for own in changed:
            own["len"] = length
        yield
    finally:
        for own in changed:
            own.pop("len", None)


class FreeScalarSizes(TorchFunctionMode):
    """A mode in which a size becomes a tensor without being fixed."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in (torch.as_tensor, torch.tensor) and len(args) == 1 and isinstance(args[0], torch.SymInt):
            size: Any = args[0]
            return torch.full((), size, **{"dtype": torch.int64, **options})
        if func in (torch.as_tensor, torch.tensor) and len(args) == 1 and isinstance(args[0], SizeList):
            return args[0].tensor(**options)
        return func(*args, **options)


@contextlib.contextmanager
def kept_modules(model: nn.Module) -> Iterator[None]:
    """Run the block with modules of ``model`` that stay as they are where ``to`` would not change them."""
    kinds = {kind: _converts(kind) for kind in {type(m) for m in model.modules()}}
    children = {id(c): c for m in model.modules() if kinds[type(m)] for c in m.children()}
    with contextlib.ExitStack() as stack:
        for child in children.values():
            stack.enter_context(own_attribute(child, "to", _keeping_to(child)))
        yield


def unscaled_layers(model: nn.Module) -> AbstractContextManager[None]:
    """Run the block with layers of RWKV that are not rescaled, unless they were before."""
    return replaced_functions(model, {"_rescale_layers": _no_rescaling})


def _no_rescaling(original: Function) -> Function | None:
    """Return what rescales nothing; None where ``original`` does something else than RWKV's method."""

    def block() -> SimpleNamespace:
        attention, feed_forward = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        return SimpleNamespace(
            attention=SimpleNamespace(output=attention), feed_forward=SimpleNamespace(value=feed_forward)
        )

    with torch.random.fork_rng(devices=[]):
        blocks = [block() for _ in range(5)]
    weights = [(b.attention.output.weight, b.feed_forward.value.weight) for b in blocks]
    before = [[w.detach().clone() for w in pair] for pair in weights]
    drawn = SimpleNamespace(
        layers_are_rescaled=False, training=False, blocks=blocks, config=SimpleNamespace(rescale_every=2)
    )
    with contextlib.suppress(Exception):  # a method of another kind may need anything else
        original(drawn)
    is_known = drawn.layers_are_rescaled and all(
        torch.equal(w, old / 2 ** (i // 2))
        for i, pair in enumerate(zip(weights, before, strict=True))
        for w, old in zip(*pair, strict=True)
    )
    return (lambda self: None) if is_known else None


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
