"""Share frozen projections that are as large as the largest site of an adapter needs, such as VeRA's A and B.

Each site reads their first columns and rows. A method with such projections has the fields ``inputs`` and ``outputs``,
the largest sizes among the adapter's sites, and a function ``shared_projections`` that makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.torch_modes import outside_modes


@lru_cache(maxsize=8)
def draw_projections(key: int, *shapes: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return projections of these shapes as PEFT draws them, one after the other, float32 on the CPU.

    They are cached: copy them, never write to them.
    """
    with outside_modes(), torch.no_grad():
        generator = torch.Generator(device="cpu").manual_seed(key)
        empty = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes]
        return tuple(nn.init.kaiming_uniform_(t, generator=generator) for t in empty)


class ProjectionFiles(FileFormat):
    """Files that may lack the projections, which then are drawn again."""

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return {**self.method.identity(op, W, dtype), **self.method.shared_projections(op, W, dtype)}


class LargestSites(SharedSlots):
    """Shared slots whose axes are as long as the largest site of the adapter needs."""

    def settle_shared_sizes(self, sites: Sequence[tuple[Any, Op]]) -> list[Any]:
        sizes = [op.matrix_shape for _, op in sites]
        largest = {"inputs": max(c for _, c in sizes), "outputs": max(r for r, _ in sizes)}
        return [replace(method, **largest) for method, _ in sites]
