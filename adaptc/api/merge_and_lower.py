"""Make another program of one with adapters: merged, without adapters, or lowered to kernels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from adaptc.adapters.directories.merge_files import merge_into_directory
from adaptc.errors import BackendError, MergeError
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.lower.lower_regions import Lower
from adaptc.passes.quantized.quantized_merge import parse_correction_rank, parse_quantized_merge
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import accepts_wrappers, needs_graph
from adaptc.reports.results import MergeReport
from adaptc.runtime.variants.gpu_variants import check_triton, runs_on_gpu
from adaptc.state.core import ProgramCore
from adaptc.state.merge_program import merge_program, unload_program, unmerge_program
from adaptc.state.overrides import check_no_override
from adaptc.training.module_files import check_not_stale
from adaptc.value_types import validates_options


@needs_graph
@validates_options("safe", "keep_base", "progress", "dequantize", "requantize", "correction_rank", "keep")
def merge(
    program: AdaptedProgram,
    *,
    safe: bool = True,
    keep_base: bool = True,
    progress: bool = False,
    dequantize: bool = False,
    requantize: bool = False,
    correction_rank: int | None = None,
    keep: Literal["residual"] | None = None,
) -> AdaptedProgram:
    """Return a plain ATen program with the current adapter folded into the weights.

    Changes are computed in float32 (float64 for float64 weights) and rounded once to the weight's dtype. The
    ``merge_report`` of the result has the rounding error of each site.

    Args:
        program: a program or a generator.
        safe: whether to refuse weights that are not finite.
        keep_base: whether the result keeps a reference to the weights that it replaced, so that :func:`unmerge`
            restores them bit for bit. Without it, each old weight is freed before the next new one is made, and
            ``program`` must not be used any more. Fused siblings share memory, which is freed with the last of them.
        progress: whether to show a bar on a terminal from the start.
        dequantize: whether quantised weights that the adapter changes become plain weights of their dtype.
        requantize: whether such weights are stored by their scheme again, with the rounding errors in the report.
        correction_rank: the rank of a correction that stays in the graph beside each requantised weight. It has the
            largest singular terms of the rounding error, and the report has the error that is left.
        keep: "residual" leaves such weights as they are, and the adapter's own tensors beside them as part of the
            graph. Nothing is rounded, and the program has no adapter any more.

    Returns:
        the merged program, which needs no adaptc once it is saved.

    Raises:
        MergeError: a method has no form on the weight, or a result is not finite. So does an adapter that changes
            quantised weights, where none of the last three options says how. ``program`` is unchanged.
        ConfigError: more than one of these options is given, or ``correction_rank`` without ``requantize``.
        AdaptcError: a module of the program trains other tensors than the program has.

    Example:
        >>> merged = adaptc.merge(prog)
        >>> torch.allclose(merged(x), prog(x), atol=1e-6)
        True
    """
    check_no_override(program, "merge")
    check_not_stale(program)
    source = program.binding.source
    quantized = parse_quantized_merge(dequantize, requantize, keep)
    new, rows = merge_program(
        program,
        safe=safe,
        keep_base=keep_base,
        progress=progress,
        quantized=quantized,
        correction_rank=parse_correction_rank(correction_rank, quantized),
    )
    new.merge_report = MergeReport(rows, source)
    return new


@validates_options("dequantize", "requantize", "safe", "component", "progress")
def merge_directory(
    model: str | os.PathLike[str],
    adapter: Any,
    path: str | os.PathLike[str],
    *,
    dequantize: bool = False,
    requantize: bool = False,
    safe: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    progress: bool = False,
) -> MergeReport:
    """Merge an adapter into the files of a transformers model, without the model in memory; return the report.

    The files are rewritten one tensor at a time, with the names, keys and order that they have. Weights are the same as
    those of :func:`merge`. Tokenizer files are copied. ``from_pretrained`` loads the result.

    A model that is quantised needs one of two options. Models of bitsandbytes, GPTQ and AWQ are read, without their
    libraries; "requantize" is for bitsandbytes.

    Args:
        model: the model's directory, with ``config.json`` and safetensors files.
        adapter: an adapter as :func:`compile` takes it, such as a PEFT directory.
        path: the directory to write, other than ``model``.
        dequantize: whether all quantised weights become plain ones. The config says so.
        requantize: whether quantised weights that the adapter changes are stored by their scheme again.
        safe: whether to refuse weights that are not finite.
        key_mapping: as for :func:`compile`.
        component: as for :func:`compile`.
        progress: whether to show a bar on a terminal from the start.

    Returns:
        the report, with the rounding error of each weight.

    Raises:
        MergeError: a method has no form on the weight, a result is not finite, or the files have no place for one: a
            bias that a layer lacks, or one of two tied weights alone. ``path`` is as it was, here and below.
        CheckpointError: the directory has no such model, a file is damaged, or ``path`` cannot be written.
        ConfigError: an option does not fit the model.
        AdaptcError: what :func:`compile` raises for the adapter.

    Example:
        >>> lm.save_pretrained("base")
        >>> config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        >>> adapter = adaptc.save_adapter(adaptc.compile(lm, config), "my-adapter")
        >>> report = adaptc.merge_directory("base", adapter, "merged")
        >>> report.max_error
        0.0
    """
    rows, source = merge_into_directory(
        Path(model),
        adapter if not isinstance(adapter, os.PathLike) else str(adapter),
        Path(path),
        dequantize=dequantize,
        requantize=requantize,
        safe=safe,
        key_mapping=key_mapping,
        component=component,
        progress=progress,
    )
    return MergeReport(rows, source)


@accepts_wrappers
def unmerge(program: AdaptedProgram) -> AdaptedProgram:
    """Return the adapted program that ``program`` was merged from, with the adapter it had then, bit for bit.

    Args:
        program: a result of :func:`merge`.

    Returns:
        the program before the merge.

    Raises:
        MergeError: ``program`` was merged with ``keep_base=False``, loaded from a file, or never merged.

    Example:
        >>> back = adaptc.unmerge(adaptc.merge(prog))
        >>> torch.equal(back(x), prog(x))
        True
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

    Args:
        program: a program or a generator.

    Returns:
        the base, equal to the captured model to the bit.

    Raises:
        MergeError: the file of the program held only an adapter's own version of the base.

    Example:
        >>> torch.equal(adaptc.unload(prog)(x), model(x))
        True
    """
    return unload_program(program)


@needs_graph
def lower(program: AdaptedProgram) -> AdaptedProgram:
    """Return the program with its adapters as fused Triton kernels in its graph, for files that run on a GPU.

    Calls of a program need no lowering: on a GPU they run kernels anyway (:attr:`AdaptedProgram.kernels`). Where a site
    has no kernels its region stays ATen, and ``report`` says why. Loading the result needs adaptc, triton and a GPU.

    Args:
        program: a program whose base is on a GPU.

    Returns:
        a program that swaps, merges, unloads and saves as ``program`` does.

    Raises:
        BackendError: the base is not on a GPU, or triton is not installed.

    Example:
        >>> if torch.cuda.is_available():
        ...     path = adaptc.save(adaptc.debug.lower(prog.to("cuda")), "model.pt2")
    """
    return lower_program(program)


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
