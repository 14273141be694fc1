"""The layouts that compiled code of a graph takes for granted, and its inputs in these.

Before: inputs of any strides. After: inputs in the orders that :mod:`adaptc.runtime.inductor` compiles for, copied only
where they lie otherwise; and what the code wrote to such a copy is in the caller's tensor, too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, fx

from adaptc.errors import BackendError
from adaptc.runtime.layouts import laid, order_of, write_back


class Layouts:
    """``names``: the placeholders of lifted inputs; ``slots``: those of them whose sizes may change; ``written``:
    placeholders that the graph writes to."""

    def __init__(
        self, graph: fx.Graph, names: Collection[str], slots: Collection[str], written: Collection[str]
    ) -> None:
        self._lifted: dict[str, tuple[int, ...]] = {}
        self._users: list[tuple[int, ...] | None] = []
        self._written: list[int] = []
        for node in graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            order = order_of(value) if isinstance(value, Tensor) else None
            if node.name not in names:
                if node.name in written:
                    self._written.append(len(self._users))
                self._users.append(order)
            elif order is not None and node.name not in slots:
                self._lifted[node.name] = order
        self._state = {n for n in written if n in names}

    def lifted(self, names: Sequence[str], values: Sequence[Any]) -> list[Any]:
        """Values of the lifted inputs with these names; others, which packing made, are contiguous. Raises BackendError
        for one that the graph writes to and that would have to be copied."""
        out: list[Any] = []
        for name, value in zip(names, values, strict=True):
            new = laid(value, self._lifted.get(name) or range(value.ndim)) if isinstance(value, Tensor) else value
            if new is not value and name in self._state:
                raise BackendError(
                    f"calls write to {name!r}, whose strides {value.stride()} inductor cannot be told: make it "
                    "contiguous in the model, or use backend='eager'"
                )
            out.append(new)
        return out

    def users(self, flat: Sequence[Any]) -> list[Any]:
        """The user's inputs."""
        return [v if order is None else laid(v, order) for v, order in zip(flat, self._users, strict=True)]

    def write_back(self, flat: Sequence[Any], taken: Sequence[Any]) -> None:
        """After a call that took ``taken`` for ``flat``. Raises AdaptcError where elements of a tensor share memory."""
        for i in self._written:
            if taken[i] is not flat[i]:
                write_back(flat[i], taken[i], f"number {i}")
