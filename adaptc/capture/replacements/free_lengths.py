"""Keep ``len(tensor)`` a free size while a model is traced.

Python demands an integer of ``len``, so torch fixes the size whose ``len`` a model takes, such as that of the batch.
``tensor.shape[0]`` is the same number and stays free. So the files of the model's classes get a ``len`` of their own
for a while, in the tracing thread alone. What is no tensor has Python's length.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

#: the packages whose code asks for no sizes of a model
_NO_MODELS = ("torch", "builtins")


@contextlib.contextmanager
def free_lengths(model: nn.Module) -> Iterator[None]:
    """Run the block with a ``len`` that leaves sizes free, in the files that define the classes of ``model``."""
    thread = threading.get_ident()

    def length(value: Any) -> Any:
        is_traced = threading.get_ident() == thread and isinstance(value, Tensor) and value.ndim > 0
        return value.shape[0] if is_traced else len(value)

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
