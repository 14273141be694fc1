"""Make another program of one with adapters: merged, without adapters, or lowered to kernels. Prove each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from adaptc.errors import BackendError, MergeError
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.lower.lower_regions import Lower
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import ProgramWrapper, accepts_wrappers, needs_graph
from adaptc.reports.results import MergeReport
from adaptc.runtime.gpu_variants import check_triton, runs_on_gpu
from adaptc.state.core import ProgramCore
from adaptc.state.merge_program import merge_program, unload_program, unmerge_program
from adaptc.state.overrides import check_no_override
from adaptc.training.module_files import check_not_stale
from adaptc.value_types import validates_options
from adaptc.verify.package import verify_package
from adaptc.verify.report import VerifyReport
from adaptc.verify.verify import verify_program


@needs_graph
@validates_options("safe", "keep_base", "progress")
def merge(
    program: AdaptedProgram, *, safe: bool = True, keep_base: bool = True, progress: bool = False
) -> AdaptedProgram:
    """Return a plain ATen program with the current adapter folded into the weights.

    Its ``.merge_report`` has the rounding error of each site. Changes are computed in float32 (float64 for float64
    weights) and rounded once. ``safe`` refuses results that are not finite.

    With ``keep_base`` the result keeps a reference to the weights that it replaced, and ``unmerge`` restores them bit
    for bit. Without it, each old weight is freed before the next new one is made, and ``program`` must not be used any
    more. Fused siblings share memory, which is freed with the last of them.

    Raises MergeError, with ``program`` unchanged, and AdaptcError where its module trains other tensors than it has.
    """
    check_no_override(program, "merge")
    check_not_stale(program)
    source = program.binding.source
    new, rows = merge_program(program, safe=safe, keep_base=keep_base, progress=progress)
    new.merge_report = MergeReport(rows, source)
    return new


@accepts_wrappers
def unmerge(program: AdaptedProgram) -> AdaptedProgram:
    """Return the adapted program that ``program`` was merged from, with the adapter it had then, bit for bit.

    Raises MergeError where it was merged with ``keep_base=False``, loaded from a file, or never merged.
    """
    if not isinstance(program, AdaptedProgram):
        raise MergeError(
            f"a {type(program).__name__} does not know what it was merged from; unmerge takes what adaptc.merge gives"
        )
    back = unmerge_program(program)
    assert isinstance(back, AdaptedProgram)
    return back


@needs_graph
def unload(program: AdaptedProgram) -> AdaptedProgram:
    """Return the base program without any adapter; every base tensor is the object it was before compile.

    Raises MergeError for a program whose file held only an adapter's own version of the base.
    """
    return unload_program(program)


@needs_graph
def lower(program: AdaptedProgram) -> AdaptedProgram:
    """Return the program with its adapters as fused Triton kernels in its graph, for files that run on a GPU.

    Calls of a program need no lowering: on a GPU they run kernels anyway (:attr:`AdaptedProgram.kernels`). Where a site
    has no kernels its region stays ATen, and ``report`` says why. The result swaps, merges, unloads and saves as
    ``program`` does. Loading it needs adaptc, triton and a GPU.
    Raises BackendError where the base is not on a GPU, or triton is not installed.
    """
    return lower_program(program)


def verify(
    program: AdaptedProgram | PackagedProgram | ProgramWrapper,
    model: nn.Module | AdaptedProgram | None = None,
    **options: Any,
) -> VerifyReport:
    """Compare the program with the model it came from on random inputs of several shapes, and return a report.

    :func:`adaptc.verify.verify.verify_program` documents the ``options``. A package is compared with the program it was
    made from, or with the model; the options are the same (see :func:`adaptc.verify.package.verify_package`).
    """
    if isinstance(program, PackagedProgram):
        return verify_package(program, model, **options)
    if isinstance(program, ProgramWrapper):
        with program.as_program(model) as base_model:
            inside = program.program
            if isinstance(inside, PackagedProgram):
                options = program.example_inputs(options)
            return verify(inside, base_model, **options)
    return verify_program(program, model, **options)


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
