"""Tell which tensors of a file reach the result of a converter that belongs to another library.

A converter renames tensors, splits and joins them, scales them, and may leave some out without a word. Traced tensors
remember the keys that they were made from, through any operation of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: ends of keys whose tensor is a number that goes into other tensors, or beside them
_NUMBERS = (".alpha", ".rank", ".scale")


class TracedTensor(Tensor):
    """A tensor that knows the keys of the tensors that it was made from.

    One that nothing was done to yet knows its ordinary tensor, too.
    """

    keys: frozenset[str]
    ordinary: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[arg-type]
        keys = frozenset(k for t in _traced_in((args, kwargs)) for k in t.keys)
        for t in _traced_in(out):
            vars(t)["keys"] = keys | vars(t).get("keys", frozenset())
        name = getattr(func, "__name__", "_")
        if name.endswith("_") and name != "__get__":  # such as mul_, __iadd__ and __set__
            for t in _traced_in(args):  # it may have other memory, or another shape, now
                vars(t).pop("ordinary", None)
        return out


def traced(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, which share their memory, as traced ones."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        ordinary = tensor.detach()
        found[key] = ordinary.as_subclass(TracedTensor)
        vars(found[key]).update(keys=frozenset((key,)), ordinary=ordinary)
    return found


def plain(tensor: Tensor) -> Tensor:
    """Return a traced tensor as an ordinary one."""
    if not isinstance(tensor, TracedTensor):
        return tensor
    ordinary = vars(tensor).get("ordinary")
    return torch.from_dlpack(tensor) if ordinary is None else ordinary


def lost_keys(given: Mapping[str, Tensor], made: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> list[str]:
    """Return the keys of ``given`` that nothing in ``made`` follows from.

    A number, such as an alpha, counts as used where a tensor of its layer is. A converter may turn it into one of
    ``numbers``.
    """
    used = {k for t in _traced_in((list(made.values()), list(numbers.values()))) for k in t.keys}
    layers = {k.split(".lora", 1)[0] for k in used}
    return [k for k in given if k not in used and not (k.endswith(_NUMBERS) and k.rpartition(".")[0] in layers)]


def _traced_in(value: Any) -> Iterator[Any]:
    if isinstance(value, TracedTensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _traced_in(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _traced_in(one)
