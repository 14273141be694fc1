"""The codes of a program on a GPU: its adapters as fused kernels.

    plain    every region whose method has kernels          for few rows, and where adapter tensors are trained
    apart    and siblings in one product and one kernel     for many rows

Both are made of one lowered graph, as ``fusing`` makes its own of a clean one. On other devices the kernels' ops
compute their references, so that all of this can be tried without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from adaptc.errors import BackendError
from adaptc.fusing import APART, PLAIN, Codes, Fusion
from adaptc.passes._kinds import Op
from adaptc.passes._lifted import copy_graph
from adaptc.passes._method import Attachment
from adaptc.passes.canonicalize import canonicalize
from adaptc.passes.fuse_siblings import Group, Pack, fuse
from adaptc.passes.hoist import stages_of
from adaptc.passes.lower import Lower, lower
from adaptc.passes.sibling_cost import at_most, most_rows

if TYPE_CHECKING:
    from adaptc.program import AdaptedProgram


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
    from adaptc.kernels import dora, lora_linear, lora_siblings  # noqa: F401
    from adaptc.kernels._launch import INTERPRETED

    if not torch.cuda.is_available() and not INTERPRETED:
        raise BackendError(
            f"{what} holds fused kernels, which run on a GPU, and torch finds none here. Load the program that was "
            "saved before adaptc.lower, or save one on the machine that has it: it is plain ATen"
        )


def lowered(program: AdaptedProgram) -> AdaptedProgram:
    """See ``adaptc.lower``."""
    check_triton()
    if not runs_on_gpu(program.base_tensors.values()):
        raise BackendError(
            "the program's weights are not on a GPU, where its kernels would run: move the model there (model.cuda()) "
            "before adaptc.compile"
        )
    return with_kernels(program)


def with_kernels(program: AdaptedProgram) -> AdaptedProgram:
    """``program`` with kernels in its graph, wherever it is."""
    result = Lower(program.adaptation.attachments, program.ops, type(program))(program).program
    assert isinstance(result, type(program))
    binding, originals = program.binding, program._originals
    new = type(program).adopt(result, program.adaptation, binding, program.backend, originals)
    new.hoist_limit, new.fuse, new.kernels = program.hoist_limit, program.fuse, program.kernels
    return new


class LoweredCodes(Codes):
    """``placeholders``: the names of those of slots and scales, by FQN; the rest as for :class:`Codes`."""

    def __init__(
        self,
        *arguments: Any,
        attachments: Sequence[Attachment],
        ops: Mapping[str, Op],
        placeholders: Mapping[Any, str],
    ) -> None:
        check_triton()
        super().__init__(*arguments)
        # Calls are inference, whatever the program was captured for.
        self.attachments = [replace(a, method=a.method.evaluated()) for a in attachments]
        self.ops, self.placeholders = ops, placeholders
        self.regions, self.others = 0, {}

    def may_fuse(self, compiled: bool) -> bool:
        return True

    @cached_property
    def clean(self) -> fx.Graph:
        graph = copy_graph(self.module.graph)
        names = {n.name: n for n in graph.find_nodes(op="placeholder")}
        slots = {fqn: names[name] for fqn, name in self.placeholders.items()}
        self.regions, self.others = lower(graph, self.attachments, self.ops, slots)
        canonicalize(graph, self.users, self.differentiable)
        return graph

    def grouped(self) -> tuple[fx.Graph, list[Group]]:
        from adaptc.passes.lower_siblings import find_lowered

        graph = copy_graph(self.clean)
        return graph, find_lowered(graph, self.packable, stages_of(graph, [self.base, self.slots]))

    def write(self, graph: fx.Graph, groups: Sequence[Group], kind: str) -> Sequence[Pack]:
        from adaptc.passes.lower_siblings import LoweredFuser

        return fuse(graph, groups, self.users, stacked=False, fuser=LoweredFuser)

    def kind(self, sizes: Mapping[str, int]) -> str:
        return PLAIN if not self.fuses or self._few(sizes) else APART

    @cached_property
    def _few(self) -> Callable[[Mapping[str, int]], bool]:
        from adaptc.kernels.lora_linear import FEW_ROWS

        groups = self.grouped()[1]
        return at_most(most_rows(groups), FEW_ROWS) if groups else lambda sizes: True

    @cached_property
    def fusion(self) -> Fusion:
        from adaptc.kernels.lora_linear import FEW_ROWS

        groups = self.grouped()[1] if self.fuses else []
        layers = sum(len(g.members) for g in groups)
        self.clean  # noqa: B018  # what it counts
        return Fusion(len(groups), layers, layers, FEW_ROWS, self.regions, self.others)
