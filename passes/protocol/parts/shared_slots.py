"""Slots that are one tensor for several sites of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.parts.method_part import MethodPart


class SharedSlots(MethodPart):
    """The slots that sites of an adapter share. By default there are none.

    Args:
        shares: whether the method has slots that all sites share.

    Arguments of the functions:
        - `sites`: the sites of one adapter, each as (method, op), in the order of the model's modules.
        - `home`: the name of the embedding's module.

    Example:
        >>> @dataclass(frozen=True)
        ... class OneShift(Shift):
        ...     sharing = adaptc.methods.SharedSlots(shares=True)
        ...     def slots(self, op):
        ...         return {"shift": adaptc.methods.Slot((op.out_features,), shared=True)}
        >>> OneShift().sharing.shares()
        True
    """

    def __init__(self, shares: bool = False) -> None:
        self._shares = shares

    def shares(self) -> bool:
        """Return whether the method has slots that all sites share."""
        return self._shares

    def settle_shared_sizes(self, sites: Sequence[tuple[Any, Op]]) -> list[Any]:
        """Return the methods of all sites of one adapter, adjusted to each other's sizes.

        A shared slot must be as large as its largest site needs. It is asked of the class, so there is no ``method``.
        """
        return [method for method, _ in sites]

    def grouped_slots(self, sites: Sequence[tuple[Any, Op]]) -> list[Mapping[str, int]]:
        """Return a dict for each site: the name of a slot that it shares with others -> the group's first site.

        The first site is an index into ``sites``. The adapter decides which slots are one tensor. In the program and in
        files each site has a slot of its own, so adapters with different groups run through the same code. It is asked
        of the class, so there is no ``method``.
        """
        return [{} for _ in sites]

    def with_weights(self, sites: Sequence[tuple[Any, Op, Callable[[], Tensor]]]) -> list[Any]:
        """Return the methods of all sites of one adapter, for making values that follow from the weights of several.

        Each site comes with a function that returns its canonical base weight. The methods returned here make first
        values and what files do not hold, and are kept nowhere. It is asked of the class, so there is no ``method``.
        """
        return [method for method, _, _ in sites]

    def tied_to(self, home: str) -> Any:
        """Return the method for a linear layer tied to the embedding at module ``home``, using the embedding's slots.

        The two then change one weight. None where the method has no such form.
        """
        return None
