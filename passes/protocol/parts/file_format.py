"""The form that a method's slots have in adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Self

import torch
from torch import Tensor

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.parts.low_rank import LowRank
from adaptc.passes.protocol.parts.method_part import MethodPart, Slots


class FileFormat(MethodPart):
    """The tensors that files hold for a site. By default these are the slots that are ``saved``, unchanged.

    Args:
        names: the names of the tensors in files, after the path of the site, for readers of a file that have no model.
        summed: the name of the tensor in which the weight's change is linear; '' where there is none.

    Arguments of the functions:
        - `op`: the op that reads the weight, an :class:`adaptc.methods.Op`.
        - `W`: the weight in canonical layout.
        - `dtype`: the adapter's dtype.
        - `slots`: name -> tensor of the adapter at this site.
        - `found`: name -> tensor, what a file holds for this site; for ``derived`` the slots made from it.
        - `place`: the name of the site in the model.
        - `slot`: the name of the slot.
        - `adapter`: the name of the adapter.
        - `rest`: the end of a file's key.
        - `change`: a low-rank change, with ``down``, ``up``, ``scale`` and ``bias``.
        - `like`: the tensors of another adapter of this method at this site.

    Example:
        >>> class ShiftFiles(adaptc.methods.FileFormat):
        ...     def read(self, op, found):
        ...         return {"shift": found["shift_vector"]}
        ...     def write(self, op, slots):
        ...         return {"shift_vector": slots["shift"]}
        >>> [*ShiftFiles(names=("shift_vector",)).write(None, {"shift": torch.zeros(7)})]
        ['shift_vector']
    """

    def __init__(self, names: tuple[str, ...] = (), summed: str = "") -> None:
        self.names = names
        self._summed = summed

    def with_names(self, *names: str) -> Self:
        """Return this object with other names, as in ``files = VirtualTokens.files.with_names("my_rows")``."""
        new = copy(self)
        new.names = names
        return new

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the slots made from a file's tensors for this site.

        Raises:
            CheckpointError: the tensors do not fit together.
        """
        return dict(found)

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        """Return the tensors that a file holds for these slots; the inverse of :meth:`read`."""
        return dict(slots)

    def keys(self, op: Op) -> list[str]:
        """Return further names that a file may have for this site beside the saved slots, for :meth:`read`."""
        return []

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        """Return values of the slots that a file does not hold, derived from ``found``, the slots that it does."""
        return self.method.identity(op, W, dtype)

    def needs_base(self) -> bool:
        """Return whether :meth:`derived` computes with the values of the base weight, so that no package can bind."""
        return False

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        """Return the name of a slot in the program's state dict, which is PEFT's name in a wrapped model."""
        head, _, tail = slot.partition(".")
        return ".".join(p for p in (place, head, adapter, tail) if p)

    def inner_path(self, rest: str) -> str | None:
        """Return the path inside the adapted module that ``rest`` stands for, the end of a file's key.

        Only a method that trains a module's own tensors has such a path. None for all others.
        """
        return None

    def in_place(self) -> bool:
        """Return whether PEFT trains the base's own tensor, so that the adapter adds no parameters to count."""
        return False

    # -- several adapters made into one ------------------------------------------------------------------------------

    def summed(self) -> str:
        """Return the name in files of the tensor in which the weight's change is linear; '' where there is none.

        Adapters that agree in all other tensors are combined by a weighted sum of this one.
        """
        return self._summed

    def low_rank(self, found: Slots) -> LowRank | None:
        """Return the change that a file's tensors make at a site, if it is the matmul of two tensors and nothing else.

        None for all other methods.

        Raises:
            CheckpointError: the tensors do not fit together.
        """
        return None

    def with_low_rank(self, change: LowRank, like: Slots) -> dict[str, Tensor]:
        """Return the tensors that make a low-rank change at this site; the inverse of :meth:`low_rank`.

        ``like`` are the tensors of another adapter of this method at this site. The result has their shapes, except for
        the rank. The tensors do not hold ``change.scale``, so the caller has to account for it.
        """
        raise AssertionError(f"{type(self).__name__} has no with_low_rank()")
