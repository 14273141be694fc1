"""Fakes whose sizes are nobody's: what is traced on them is code for all sizes.

The values of a program are symbolic in the sizes of its inputs, but an adapter's slots have the sizes of one adapter,
which would become constants of what is traced on them. Here both get symbols, in an environment that is thrown away;
what was traced is code alone, and its values come from the program it is put into (``propagate``).

Private torch use, with the public route that was tried: ``FakeTensorMode``, ``ShapeEnv.create_symbol`` and
``create_symintnode``. Public: ``make_fx(tracing_mode="symbolic")`` on tensors of example sizes, which needs memory for
them and makes sizes one that are equal by chance; ``torch.export.Dim`` is for inputs of modules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

HINT = 16


class FreeFakes:
    """An environment. Sizes of one name are one size; no two others are known to be equal. ``sums``: name -> those of
    the sizes that it is the sum of."""

    def __init__(self, sums: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
        self.sums = sums
        self.env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.env)
        self.sizes: dict[str, Any] = {}

    def size(self, name: str) -> Any:
        from torch._dynamo.source import ConstantSource

        if name in self.sums:
            return sum(self.size(part) for part in self.sums[name])
        if name not in self.sizes:
            source = ConstantSource(f"adaptc_free_{len(self.sizes)}")
            symbol = self.env.create_symbol(HINT, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            self.sizes[name] = self.env.create_symintnode(symbol, hint=HINT, source=source)
        return self.sizes[name]

    def like(self, value: Tensor, free: Collection[int] | Mapping[int, str] = (), name: str = "") -> Tensor:
        """A fake like ``value``, with a size for each that is symbolic, and one called ``name`` along the axes
        ``free``, or called as these say."""
        names = free if isinstance(free, Mapping) else dict.fromkeys(free, name)
        shape = [
            self.size(names[i]) if i in names else s if isinstance(s, int) else self.size(str(s))
            for i, s in enumerate(value.shape)
        ]
        with self.mode:
            return torch.empty(shape, dtype=value.dtype, device=value.device)
