"""Lower a program: write its adapters as fused Triton kernels into its graph, for files and artifacts that run on a
GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from adaptc.errors import BackendError
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.lower.lower_regions import Lower
from adaptc.runtime.gpu_variants import check_triton, runs_on_gpu
from adaptc.state.core import ProgramCore

P = TypeVar("P", bound=ProgramCore)


def lower_program(program: P) -> P:
    """Return ``program`` with its adapters as fused Triton kernels; ``adaptc.debug.lower`` tells more. Raises
    BackendError where the base is not on a GPU, or triton is not installed."""
    check_triton()
    if not runs_on_gpu(program.base_tensors.values()):
        raise BackendError(
            "the program's weights are not on a GPU, where its kernels would run: move the model there (model.cuda()) "
            "before adaptc.compile, or the program: prog.to('cuda')"
        )
    return insert_kernels(program)


@with_graph_lock
def insert_kernels(program: P) -> P:
    """Return ``program`` with Triton kernels in its graph, on whatever device its base is."""
    program = program.snapshot()
    a = program.adaptation
    done = Lower(a.attachments, program.ops)(program)
    adaptation = replace(a, trail=(*a.trail, *done.trail))
    return type(program)(done.output, adaptation, program.current, program.options, program.originals)
