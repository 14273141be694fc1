"""The variants of a program's graph on a GPU: its adapters as fused kernels.

    plain    every region whose method has kernels          for few rows, and where adapter tensors are trained
    apart    and siblings in one product and one kernel     for many rows

Both are made of one lowered graph, as ``variants`` makes its own of a clean one. On other devices the kernels' ops
compute their references, so that all of this can be tried without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import BackendError
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.exclusive import exclusive_property
from adaptc.passes.ir.ops import Op
from adaptc.passes.ir.pass_infra import GraphPass
from adaptc.passes.lower.lower_regions import Lowered, LowerGraph
from adaptc.passes.lower.lower_siblings import LowerSiblings
from adaptc.passes.optimize.sibling_cost import at_most, most_rows
from adaptc.runtime.variants import APART, PLAIN, Fusion, GraphVariants, LiftedGraph


def runs_on_gpu(tensors: Iterable[Any]) -> bool:
    """Whether kernels can run on these tensors."""
    return find_spec("triton") is not None and any(isinstance(t, Tensor) and t.is_cuda for t in tensors)


def check_triton() -> None:
    """Raises BackendError where there is no triton, which the ops of kernels are made of."""
    if find_spec("triton") is None:
        raise BackendError("fused kernels need triton, which is not installed: pip install triton")


def register_kernels(what: str) -> None:
    """Make torch know the ops that ``what`` is made of. Raises BackendError where they cannot run."""
    check_triton()
    from adaptc.kernels import INTERPRETED  # and with it all ops

    if not torch.cuda.is_available() and not INTERPRETED:
        raise BackendError(
            f"{what} holds fused kernels, which run on a GPU, and torch finds none here. Load the program that was "
            "saved before adaptc.lower, or save one on the machine that has it: it is plain ATen"
        )


class GpuVariants(GraphVariants):
    """``attachments`` and ``ops``: those of the program; ``placeholders``: the names of those of lifted inputs, by FQN.
    The rest as for its base."""

    def __init__(
        self,
        source: LiftedGraph,
        attachments: Sequence[Attachment],
        ops: Mapping[str, Op],
        placeholders: Mapping[Any, str],
    ) -> None:
        check_triton()
        super().__init__(source)
        # Calls are inference, whatever the program was captured for.
        self.attachments = [replace(a, method=a.method.evaluated()) for a in attachments]
        self.ops, self.placeholders = ops, placeholders

    def may_fuse(self, compiled: bool) -> bool:
        return True

    def cleaning(self) -> list[GraphPass]:
        return [LowerGraph(self.attachments, self.ops, self.placeholders), *super().cleaning()]

    def fusing(self, kind: str) -> list[GraphPass]:
        s = self.source
        return [LowerSiblings(s.packable, s.stages, s.users)]

    @property
    def kinds(self) -> list[str]:
        return [PLAIN, APART] if self.fuses else [PLAIN]

    def kind(self, sizes: Mapping[str, int]) -> str:
        return PLAIN if not self.fuses or self._few(sizes) else APART

    @exclusive_property
    def _few(self) -> Callable[[Mapping[str, int]], bool]:
        from adaptc.kernels import FEW_ROWS

        return at_most(most_rows(self.groups), FEW_ROWS) if self.groups else lambda sizes: True

    @exclusive_property
    def fusion(self) -> Fusion:
        from adaptc.kernels import FEW_ROWS

        groups = self.groups if self.fuses else []
        layers = sum(len(g.members) for g in groups)
        lowered: Lowered = self.cleaned.data[0]
        return Fusion(len(groups), layers, layers, FEW_ROWS, kernels=lowered.regions, others=lowered.others)
