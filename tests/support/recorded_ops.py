"""Record calls as a CUDA graph does, without a GPU: a replay repeats the ops on the memory that was recorded.

What the Python code of a call computes is not computed again. So a value that it read from a tensor, a shape or a new
tensor stays what it was, as in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                t = args[i] if i < len(args) else kwargs.get(argument.name)
                if isinstance(t, Tensor):
                    # An op may give the tensor another shape in place.
                    self.before.setdefault(t.untyped_storage().data_ptr(), (t.detach(), t.clone()))
        out = func(*args, **kwargs)
        # Other tensors of the same memory, which these stay on: a graph has addresses.
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        self.ops.append((func, args, kwargs, [t.detach() for t in tree_leaves(out) if isinstance(t, Tensor)]))
        return out


class OpRecording:
    def __init__(self, log: _Log, outputs: Sequence[Any]) -> None:
        self.ops, self.outputs = log.ops, outputs

    def replay(self) -> None:
        with torch.inference_mode():  # a graph does not ask in which mode its memory was made
            for func, args, kwargs, outs in self.ops:
                found = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for to, new in zip(outs, found, strict=True):
                    if to.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        to.copy_(new)


class OpRecorder:
    """A recorder of the ops of calls on ``device``, which counts what it recorded and replayed."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.recorded, self.is_busy = device, 0, False

    def record(self, run: Callable[[], Sequence[Any]]) -> OpRecording:
        with _Log() as log:
            outputs = run()
        for tensor, values in log.before.values():  # a graph computes nothing while it is recorded
            tensor.copy_(values)
        self.recorded += 1
        return OpRecording(log, outputs)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        assert not self.is_busy, "two calls at once use the memory that all recordings share"
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False
