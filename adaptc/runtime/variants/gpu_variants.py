"""Make the variants of a program's graph on a GPU, with its adapters as fused kernels.

    plain     a kernel for each region whose method has one              where slots are trained
    packed    adapters packed once per binding, siblings in one op       all other calls

Both are made of one lowered graph. The op of the packed variant chooses between kernels for few rows and for many in
each call, also in code that inductor compiled. On other devices the kernels' ops compute their references, so that all
of this can be tried without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import BackendError
from adaptc.passes.graph.graph_lock import graph_locked_property
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.pass_infra import GraphPass
from adaptc.passes.lower.lower_regions import LowerGraph, LoweringSummary
from adaptc.passes.lower.lower_siblings import CallKernelsDirectly, LowerSiblings
from adaptc.passes.protocol.attachment import Attachment
from adaptc.runtime.variants.graph_variants import Fusion, GraphVariants, LiftedGraph

PACKED = "packed"


def runs_on_gpu(tensors: Iterable[Any]) -> bool:
    """Return whether kernels can run on these tensors: triton is installed, and a tensor is on a CUDA device."""
    return find_spec("triton") is not None and any(isinstance(t, Tensor) and t.is_cuda for t in tensors)


def check_triton() -> None:
    """Raise BackendError where triton is not installed, in which the kernels are written."""
    if find_spec("triton") is None:
        raise BackendError("fused kernels need triton, which is not installed: pip install triton")


def register_kernels(owner: str) -> None:
    """Register with torch the ops of fused kernels, which ``owner`` holds. Raises BackendError where they cannot
    run."""
    check_triton()
    from adaptc.kernels import INTERPRETED  # the import registers all ops

    if not torch.cuda.is_available() and not INTERPRETED:
        raise BackendError(
            f"{owner} holds fused kernels, which run on a GPU, and torch finds none here. Load the program that was "
            "saved before adaptc.debug.lower, or save one on the machine that has it: it is plain ATen"
        )


class GpuVariants(GraphVariants):
    """The variants of one lifted graph on a GPU, each made when it is first asked for.

    ``attachments`` and ``ops`` are the program's. ``placeholders`` maps the FQN of a lifted input to its placeholder.
    Raises BackendError where triton is not installed.
    """

    def __init__(
        self,
        source: LiftedGraph,
        attachments: Sequence[Attachment],
        ops: Mapping[str, Op],
        placeholders: Mapping[Any, str],
    ) -> None:
        check_triton()
        super().__init__(source)
        self.leaves_sites_out = False
        # Variants run inference, so dropout of methods is off even if the program was captured for training.
        self.attachments = [replace(a, method=a.method.evaluated()) for a in attachments]
        self.ops, self.placeholders = ops, placeholders

    def may_fuse(self, compiled: bool) -> bool:
        return True

    def cleaning_passes(self) -> list[GraphPass]:
        return [LowerGraph(self.attachments, self.ops, self.placeholders), *super().cleaning_passes()]

    def fusing_passes(self, variant_name: str) -> list[GraphPass]:
        s = self.source
        return [LowerSiblings(s.movable, s.frozen_stages, s.user_inputs, shares=self.is_fused)]

    def calling_passes(self) -> list[GraphPass]:
        return [*super().calling_passes(), CallKernelsDirectly()]

    @property
    def variant_names(self) -> list[str]:
        return [PACKED]

    def cheapest_variant(self, sizes: Mapping[str, int]) -> str:
        return PACKED

    @graph_locked_property
    def fusion(self) -> Fusion:
        groups = [g for g in self.sibling_groups if len(g.layers) > 1]
        layers = sum(len(g.layers) for g in groups)
        lowered: LoweringSummary = self.clean_result.data[0]
        return Fusion(len(groups), layers, layers, kernels=lowered.regions, others=lowered.reasons_by_site)
