"""Lay out the inputs of compiled code in memory as it was compiled for.

An input of other strides than :mod:`adaptc.runtime.inductor` compiled for is copied. What the code writes to such a
copy is then written to the caller's tensor, too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, fx

from adaptc.errors import BackendError
from adaptc.runtime.strides import laid, order_of, write_back


class Layouts:
    """The memory layouts that the compiled code of a graph takes for granted, as an order of axes for each input.

    ``names`` are the placeholders of lifted inputs; those in ``slots`` may change their sizes, and are contiguous.
    ``written`` are the placeholders that the graph writes to.
    """

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
        """Return the values of the lifted inputs ``names`` in the layouts of the code.

        Slots, and the buffers that packing made, are laid out contiguously. Raises BackendError for an input that the
        graph writes to and that is not contiguous.
        """
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
        """Return the user's inputs ``flat`` in the layouts of the code."""
        return [v if order is None else laid(v, order) for v, order in zip(flat, self._users, strict=True)]

    def write_back(self, flat: Sequence[Any], taken: Sequence[Any]) -> None:
        """Copy what a call wrote to ``taken`` back to the user's inputs ``flat``.

        Raises AdaptcError where elements of a user's tensor share memory.
        """
        for i in self._written:
            if taken[i] is not flat[i]:
                write_back(flat[i], taken[i], f"number {i}")
