"""Define the functions that a user calls.

All leave inputs as they were, with two exceptions: ``swap``, whose only effect is the new current
binding, and ``merge(..., keep_base=False)``, after which the program must not be used. A call that raises changed
nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from adaptc.adapters.adapter import Adapter
from adaptc.adapters.arrow import arrow_adapter
from adaptc.adapters.write import written
from adaptc.errors import ConfigError, MergeError, shown
from adaptc.generation.bank import GeneratorBank
from adaptc.generation.files import generator_in
from adaptc.generation.of_module import generate
from adaptc.generation.packaged import load_generation
from adaptc.packages.package_program import package_program
from adaptc.packages.packaged_program import BoundPackage, PackagedProgram
from adaptc.packages.write_bank import package_bank
from adaptc.program.adapted import AdaptedProgram
from adaptc.program.bank import Bank
from adaptc.program.bound import Bound
from adaptc.program.compile import compiled
from adaptc.program.files import load_program, save_program
from adaptc.program.lower import lowered
from adaptc.program.merge import merged, unmerged
from adaptc.program.module_files import check_followed
from adaptc.program.overrides import check_unseen
from adaptc.program.packed_calls import PackedCalls
from adaptc.program.packing import packed, read_bounds
from adaptc.program.pretrained_module import PretrainedModule
from adaptc.program.swap import swapped
from adaptc.program.unload import unloaded
from adaptc.program.wrapper import ProgramWrapper, accepts_wrappers, check_program, of_programs
from adaptc.reports.results import MergeReport, SwapReport
from adaptc.runtime.options import RunOptions
from adaptc.value_types import checked
from adaptc.verify.package import verify_package
from adaptc.verify.report import VerifyReport
from adaptc.verify.verify import verify_program


@checked("adapter_name", "training", "form", "autocast_adapter_dtype", "key_mapping", "component", "generator")
def compile(
    model: nn.Module | ExportedProgram | Any,
    adapter: Any = None,
    *,
    config: Any = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    adapter_name: str = "default",
    training: bool = False,
    backend: str = "eager",
    form: str = "auto",
    autocast_adapter_dtype: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    generator: torch.Generator | None = None,
    hoist_limit: int | None = None,
    fuse: bool = True,
    checkpoint: int | Literal["auto"] | None = None,
    pack: str | None = None,
) -> AdaptedProgram:
    """Capture ``model``, adapt it, and return the adapted program.

    ``model``: an nn.Module, a transformers model, a UNet or Flux denoiser of diffusers, an ExportedProgram, or the
    result of ``transformers.exporters``. ``example_inputs``: a tensor, a tuple, or a dict of keywords. An nn.Module
    needs them; for models of transformers and diffusers they are made from the config where none are given.

    ``adapter``: a config, a ``peft`` config, or an adapter with its weights: a PEFT directory, a file of diffusers,
    kohya, LyCORIS or torchtune, or a state dict with such keys. It may be a list of these: the program then gets the
    union of their sites and is bound to the first. A dict of these by name makes adapters that act together, each on
    the weights as changed by the ones before it. ``config``: the config of one adapter with weights, in place of the
    one in its file. Without ``target_modules`` it targets the modules that the keys name. Given without ``adapter``, it
    is the adapter. ``component``: the part to take of a file that has several (a UNet's and a text encoder's), where
    the names of modules do not tell. ``key_mapping``: regular expression -> replacement, applied to the keys of adapter
    files (PEFT's rule); refused where ``adapter`` is none.

    ``training=True`` captures the training behaviour: dropout, and the loss of a transformers model. ``backend``:
    "eager" or "inductor". ``form``: "apply" puts adapters around the layers, "weight" in front of their weights, and
    "auto" chooses the cheaper form per site (``report`` says why). ``autocast_adapter_dtype``: adapters of
    half-precision bases are float32. ``generator`` draws first values; by default torch's global generator.

    ``hoist_limit`` is the number of bytes that hoisted values may take. ``fuse`` computes layers that read one tensor
    by one matmul. ``checkpoint``: how many blocks the backward computes again at a time. ``pack`` allows packed copies
    of base weights on a CPU. The properties of :class:`AdaptedProgram` with these names document them.

    The model's values are not modified, and its parameters are shared. The first call of a program
    that fuses moves sibling weights into one buffer; let no other thread run the model then.
    Raises CaptureError, ConfigError, TargetError, CheckpointError or BackendError.
    """
    options = RunOptions(backend, hoist_limit, fuse, checkpoint=checkpoint, pack=pack)
    if options.checkpoint is not None and not training:
        raise ConfigError(
            f"checkpoint={shown(checkpoint)} is for training, and the program is captured for inference: "
            "compile(model, config, training=True)"
        )
    if adapter is None:
        adapter, config = config, None
    return compiled(
        model,
        adapter,
        options,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        adapter_name=adapter_name,
        training=training,
        form=form,
        autocast=autocast_adapter_dtype,
        key_mapping=key_mapping,
        component=component,
        override=config,
        generator=generator,
    )


def create_arrow_model(
    base_model: nn.Module | ExportedProgram | Any,
    task_specific_adapter_paths: Sequence[Any],
    arrow_config: Any,
    general_adapter_paths: Sequence[Any] | None = None,
    **options: Any,
) -> AdaptedProgram:
    """Return ``base_model`` with an adapter that routes each token between LoRA adapters, as PEFT's function does.

    It is ``compile(base_model, arrow_adapter(...), **options)``. :func:`adaptc.arrow_adapter` makes further ones to
    swap to; :func:`compile` documents the ``options``. As in PEFT, nothing is trained, and
    the adapter cannot be merged. Raises the errors of both.
    """
    adapter = arrow_adapter(task_specific_adapter_paths, arrow_config, general_adapter_paths)
    return compile(base_model, adapter, **options)


@accepts_wrappers
def swap(
    program: AdaptedProgram | PackagedProgram,
    adapter: Any,
    *,
    config: Any = None,
    adapter_name: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    scale: float | Mapping[str, float] | None = None,
) -> SwapReport:
    """Make ``adapter`` the current adapter of ``program``, and return a report of what was found.

    ``adapter``: a PEFT directory, a file or a state dict of any format that :func:`compile` takes, a binding, or a
    result of ``prog.bind``. ``component`` and ``config``: see :func:`compile`. ``scale``: a factor on the scale that
    the adapter was made with, as ``prog.set_scale`` sets it. ``key_mapping``: regular expression -> replacement,
    applied to the keys (PEFT's rule), without their ``base_model.model.``. Where all
    keys differ from the program's by a prefix, the error has the mapping that fits.

    The adapter may have any rank and alpha, and any subset of the program's sites; the other sites get identity values.
    Nothing is compiled, and only the adapter's own tensors are copied. For a bare state dict the scale follows
    ``config`` if given, else the program's alpha and the tensors' ranks. The swap is atomic: calls that have begun
    finish with the adapter that they began with.

    Raises SwapError, which names the site, where the adapter needs a site that the program was not compiled for. Raises
    CheckpointError for damaged files, wrong shapes, missing keys or NaN. The program is then unchanged.

    ``program`` may be a package of :func:`load_package`. Then ranks have a limit, and adapters that change base weights
    need a package that holds these weights (see :meth:`PackagedProgram.swap`).
    """
    options: dict[str, Any] = {"config": config, "adapter_name": adapter_name, "key_mapping": key_mapping}
    options |= {"component": component, "scale": scale}
    if isinstance(program, PackagedProgram):
        return program.swap(adapter, **options)
    check_program(program, "swap")
    start = time.perf_counter()
    binding = swapped(program, adapter, **options)
    return SwapReport.of(program.adaptation.attachments, binding, time.perf_counter() - start)


def bind(program: AdaptedProgram | PackagedProgram, adapter: Any, **options: Any) -> Bound | BoundPackage:
    """Return a callable that keeps ``adapter`` whatever ``program`` is swapped to, for any thread; None gives the base.

    :meth:`AdaptedProgram.bind`, and for packages :meth:`PackagedProgram.bind`, document the ``options`` and errors.
    """
    check_program(program, "bind", PackagedProgram, ProgramWrapper)
    return program.bind(adapter, **options)


@of_programs
@checked("safe", "keep_base", "progress")
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
    check_unseen(program, "merge")
    check_followed(program)
    source = program.binding.source
    new, rows = merged(program, safe=safe, keep_base=keep_base, progress=progress)
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
    back = unmerged(program)
    assert isinstance(back, AdaptedProgram)
    return back


@of_programs
def unload(program: AdaptedProgram) -> AdaptedProgram:
    """Return the base program without any adapter; every base tensor is the object it was before compile.

    Raises MergeError for a program whose file held only an adapter's own version of the base.
    """
    return unloaded(program)


@of_programs
def lower(program: AdaptedProgram) -> AdaptedProgram:
    """Return the program with its adapters as fused Triton kernels in its graph, for files that run on a GPU.

    Calls of a program need no lowering: on a GPU they run kernels anyway (:attr:`AdaptedProgram.kernels`). Where a site
    has no kernels its region stays ATen, and ``report`` says why. The result swaps, merges, unloads and saves as
    ``program`` does. Loading it needs adaptc, triton and a GPU.
    Raises BackendError where the base is not on a GPU, or triton is not installed.
    """
    return lowered(program)


def save(program: ExportedProgram | ProgramWrapper, path: str | os.PathLike[str]) -> Path:
    """Write a program as ``.pt2`` (torch.export's format), to a temporary file that is then moved to ``path``.

    An adapted program has its sites, slots and config in its graph. A merged or unloaded program is plain ATen and
    needs no adaptc to run. Raises AdaptcError for a program whose module trains other tensors than the program has.
    """
    beside = program.beside() if isinstance(program, ProgramWrapper) else None
    inside: Any = program.program if isinstance(program, ProgramWrapper) else program
    check_program(inside, "save", ExportedProgram)
    if isinstance(inside, AdaptedProgram):
        check_unseen(inside, "save")
        check_followed(inside)
    return save_program(inside, Path(path), beside)


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = "eager",
    hoist_limit: int | None = None,
    fuse: bool = True,
    device: torch.device | str | None = None,
) -> Any:
    """Read a ``.pt2`` written by :func:`save` or ``torch.export.save``.

    Returns an :class:`AdaptedProgram`, whose adapters are found in the graph, or for a saved :class:`Generator` a
    Generator. ``backend``, ``hoist_limit`` and ``fuse``: see :func:`compile`; a program without adapters is never fused
    unasked. ``device``: the device of its tensors and its adapter; None leaves them where they were.

    Nothing in the file is run, and its tensors own their memory. Raises CheckpointError for files that are missing,
    damaged or of another format, and for files with anything that could run code. That is pickled weights and objects,
    example inputs other than tensors and plain values, operators that reach beyond the program, and compiled code.
    Raises BackendError for a program whose kernels cannot run here.
    """
    program = load_program(Path(path), RunOptions(backend, hoist_limit, fuse), device)
    return generator_in(Path(path), program) or program


@accepts_wrappers
@checked("adapter_name", "safe_serialization", "base_model", "save_embedding_layers", "format", "component")
def save_adapter(
    program: AdaptedProgram | nn.Module | Adapter,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    safe_serialization: bool = True,
    base_model: str | None = None,
    save_embedding_layers: bool = False,
    format: str = "peft",
    component: str | None = None,
) -> Path:
    """Write the current adapter as a PEFT adapter directory, and return the directory that holds it.

    ``peft.PeftModel.from_pretrained(model, path)`` loads it. ``base_model`` is recorded as base_model_name_or_path. Of
    adapters that act together, the one called ``adapter_name`` is written, under its name as PEFT does.
    ``save_embedding_layers`` adds the base weights of ``embed_tokens`` and ``lm_head``, which an adapter needs if its
    vocabulary was resized. (PEFT also adds them whenever one of the two is targeted.)

    ``format="diffusers"`` writes a ``pytorch_lora_weights.safetensors`` in the directory ``path``, or the file ``path``
    itself. ``component`` ("unet", "transformer", "text_encoder", ...) is put in front of its keys, as pipelines need
    it. ``format="kohya"`` writes the file ``path`` and needs ``component``. Both return the file. They hold LoRA, DoRA
    and LoKr, kohya also LoHa.

    ``program`` may be a module that ``program.module()`` made. Where FSDP2 has sharded that module, it must be: then
    every process makes the call, the first one writes, and all return when it has. An :class:`Adapter` can only be
    written as a PEFT directory, and has no embeddings to add.

    Raises AdaptcError for a program whose module trains other tensors than the program has. Raises CheckpointError for
    an adapter that the format cannot hold, and where the path cannot be written.
    """
    options: dict[str, Any] = {
        "adapter_name": adapter_name,
        "safe_serialization": safe_serialization,
        "base_model": base_model,
        "save_embedding_layers": save_embedding_layers,
        "format": format,
        "component": component,
    }
    return written(program, path, options)


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
        with program.as_program(model) as same:
            inside = program.program
            if isinstance(inside, PackagedProgram):
                options = program.drawn(options)
            return verify(inside, same, **options)
    return verify_program(program, model, **options)


def package(
    program: AdaptedProgram | ProgramWrapper | Bank | GeneratorBank,
    path: str | os.PathLike[str],
    *,
    max_rank: int | None = None,
    products: str = "measured",
    tokenizer: Any = None,
    capacity: int | None = None,
) -> Path:
    """Compile ``program`` ahead of time with AOTInductor into one file with swappable adapters; return its path.

    The file is machine code, which runs when it is loaded; ``adaptc.packages.package_program`` has the details.
    ``max_rank``: the largest rank of later swaps, by default the present ones. ``products``: "measured" uses the base's
    fastest matmuls on this machine, "plain" torch's.

    The package of a :class:`Generator` holds the step (and the encoder), the generation config, and ``tokenizer``: a
    transformers tokenizer, or the directory of one. The package of a bank has room for ``capacity`` adapters, by
    default one more than there are, and :func:`load_package` returns a bank. Raises ConfigError for a ``tokenizer`` or
    ``capacity`` with a program that takes none.
    """
    inside: Any = program
    carried = parts = None
    if tokenizer is not None and not isinstance(program, (ProgramWrapper, GeneratorBank)):
        raise ConfigError("a tokenizer goes into packages of what adaptc.compile_for_generation gives")
    if isinstance(program, GeneratorBank):
        inside, carried = program.bank, program.carried(tokenizer)
    if isinstance(program, (Bank, GeneratorBank)):
        options = {"capacity": capacity, "max_rank": max_rank, "products": products, "carried": carried}
        return package_bank(inside, Path(path), **options)
    if capacity is not None:
        raise ConfigError(f"capacity={shown(capacity)} is for packages of a bank")
    if isinstance(program, ProgramWrapper):
        inside, carried, parts = program.program, program.carried(tokenizer), program.divided()
    if isinstance(inside, AdaptedProgram):
        check_unseen(inside, "package")
        check_followed(inside)
    return package_program(inside, Path(path), max_rank=max_rank, products=products, carried=carried, parts=parts)


def load_package(path: str | os.PathLike[str]) -> Any:
    """Return a runner for a file written by :func:`package`: call it, ``swap`` its adapter, ``bind`` further ones.

    For a packaged :class:`Generator` it is a Generator, which needs none of the model's own code; its ``.tokenizer`` is
    the one it was packaged with.

    A package is machine code, which runs as it is loaded: load only packages whose author you trust. Hashes in the file
    detect damage alone. Raises CheckpointError for files that are missing, damaged or changed, before
    any of their code is loaded. Raises BackendError for a file that was packaged without adaptc or does not run on this
    machine.
    """
    return load_generation(Path(path))


# Modules capture their models again for these; set here, since importing them there would be a circle.
PretrainedModule.generating = generate
PackedCalls.packing, PackedCalls.reading = packed, read_bounds
