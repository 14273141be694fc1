"""The functions a user calls. Each is short: it names the steps, and the steps live in the files they are about.

All of them leave their inputs as they were, except ``swap``, whose whole effect is the new current binding, and
``merge(..., keep_base=False)``, which gives up the program it is handed. A call that raises changed nothing.
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
from adaptc.packages.run import BoundPackage, PackagedProgram
from adaptc.packages.write import package_program
from adaptc.packages.write_bank import package_bank
from adaptc.program.adapted import AdaptedProgram
from adaptc.program.bank import Bank
from adaptc.program.bound import Bound
from adaptc.program.compile import compiled
from adaptc.program.files import load_program, save_program
from adaptc.program.holder import Holder, check_program, of_programs, through_holders
from adaptc.program.lower import lowered
from adaptc.program.merge import merged, unmerged
from adaptc.program.module_files import check_followed
from adaptc.program.packed_calls import PackedCalls
from adaptc.program.packing import packed, read_bounds
from adaptc.program.pretrained_module import PretrainedModule
from adaptc.program.swap import swapped
from adaptc.program.unload import unloaded
from adaptc.program.views import check_unseen
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
    """Capture ``model`` and adapt it.

    ``model``: an nn.Module (with ``example_inputs``: a tensor, a tuple, or a dict of keywords), a transformers model or
    a UNet or Flux denoiser of diffusers (``example_inputs`` are made from its config where none are given), an
    ExportedProgram, or what ``transformers.exporters`` returns. ``adapter``: a config, a ``peft`` config, an adapter
    with its weights (a PEFT directory, a file of diffusers, kohya, LyCORIS or torchtune, or a state dict with such
    keys), or a list of these: then the program gets the union of their sites and is bound to the first. A dict of these
    by name makes adapters that act together, each on what the ones before it made of the weights. ``config``: of one
    adapter with weights, instead of what its file says; where it has no ``target_modules``, those are the modules that
    the keys name. Alone it is the adapter. ``component``: which one to take of a file that has several (a UNet's and a
    text encoder's), where the names of modules do not tell. ``training=True`` captures the training behaviour (dropout,
    and the loss of a transformers model). ``backend``: "eager" or "inductor". ``form``: "apply" puts adapters around
    the layers, "weight" in front of their weights, "auto" chooses per site what costs less (``report`` says why).
    ``autocast_adapter_dtype``: adapters of half-precision bases are float32. ``key_mapping``: regular expression ->
    replacement, applied to the keys of adapter files (PEFT's rule); refused where ``adapter`` is none. ``generator``
    draws first values; by default torch's global generator. ``hoist_limit``: bytes of memory for what calls of the
    program, in inference, compute once per adapter instead of every time; None for any number (see
    :attr:`AdaptedProgram.hoist_limit`). ``fuse``: layers that read one tensor share a product in calls of the program
    (see :attr:`AdaptedProgram.fuse`). ``checkpoint``: how many repeated blocks its modules compute again at a time in
    the backward, "auto" for one, for less memory; None keeps all (see :attr:`AdaptedProgram.checkpoint`).
    ``pack``: "float32" or "bf16", the type of base weights of which calls on a CPU may hold packed copies, for more
    memory; None for no copies (see :attr:`AdaptedProgram.pack`).

    The values of the model are not modified, and its parameters are shared, not copied; at the first call of a program
    that fuses, the memory of sibling weights moves into one buffer, so let no other thread run the model then.
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
    """PEFT's ``create_arrow_model``: ``base_model`` with an adapter that routes each token between LoRA adapters.

    It is ``compile(base_model, arrow_adapter(...), **options)``: :func:`adaptc.arrow_adapter` says what the adapters
    may be, and makes the next ones to swap to; :func:`compile` has the ``options``. There is nothing to train, as in
    PEFT, and no weight to merge into. Raises what the two raise.
    """
    adapter = arrow_adapter(task_specific_adapter_paths, arrow_config, general_adapter_paths)
    return compile(base_model, adapter, **options)


@through_holders
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
    """Make ``adapter`` the current one: a PEFT directory, a file or a state dict of any format that :func:`compile`
    takes, a binding, or what ``prog.bind`` returned. ``component``, ``key_mapping`` and ``config`` as there; the report
    says what was found. ``scale``: a factor on the scale it was made with, as ``prog.set_scale`` sets it.

    Any rank, alpha, and any subset of the program's sites (the others take identity values); nothing is compiled or
    copied but the adapter's own tensors. For a bare state dict the scale follows ``config`` if given, else the
    program's alpha and the tensors' ranks. ``key_mapping``: regular expression -> replacement, applied to the keys of
    the directory or state dict (PEFT's rule), without their ``base_model.model.``; where all keys differ from the
    program's by what they begin with, the error has the mapping that fits. Atomic: calls that have begun finish with
    the adapter they began with.

    Raises SwapError (naming the site) when the adapter needs a site the program was not compiled for, CheckpointError
    for damaged files, wrong shapes, missing keys or NaN; the program is then unchanged.

    ``program`` may be a package, of :func:`load_package`: then ranks have a limit, and adapters that change base
    weights need a package that holds these (see :meth:`PackagedProgram.swap`).
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
    """A callable that keeps ``adapter`` whatever ``program`` is swapped to, for any thread; None gives the base.

    ``options`` and errors: :meth:`AdaptedProgram.bind`, and for packages :meth:`PackagedProgram.bind`, which it is.
    """
    check_program(program, "bind", PackagedProgram, Holder)
    return program.bind(adapter, **options)


@of_programs
@checked("safe", "keep_base", "progress")
def merge(
    program: AdaptedProgram, *, safe: bool = True, keep_base: bool = True, progress: bool = False
) -> AdaptedProgram:
    """A plain ATen program with the current adapter folded into the weights; ``.merge_report`` tells each site's error.

    Changes are computed in float32 (float64 for float64 weights) and rounded once. ``safe`` refuses results that are
    not finite. With ``keep_base`` the result keeps a reference to what it replaced and ``unmerge`` gives it back bit
    for bit; without it, each old weight is freed before the next new one is made (fused siblings, which have one
    memory, with the last of them) and ``program`` must not be used any more.
    Raises MergeError, with ``program`` unchanged, and AdaptcError where its module trains other tensors than it has.
    """
    check_unseen(program, "merge")
    check_followed(program)
    source = program.binding.source
    new, rows = merged(program, safe=safe, keep_base=keep_base, progress=progress)
    new.merge_report = MergeReport(rows, source)
    return new


@through_holders
def unmerge(program: AdaptedProgram) -> AdaptedProgram:
    """The adapted program ``program`` was merged from, with the adapter it had then: every bit as it was.

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
    """The base: no adapter, every base tensor the object it was before compile.

    Raises MergeError for a program whose file held only an adapter's own version of the base.
    """
    return unloaded(program)


@of_programs
def lower(program: AdaptedProgram) -> AdaptedProgram:
    """The program with its adapters as fused Triton kernels in its graph, for files and artifacts that run on a GPU.

    Calls need no lowering: those of a program on a GPU run kernels anyhow (:attr:`AdaptedProgram.kernels`). Where a
    site has no kernels its region stays ATen, and ``report`` says why. The result swaps, merges, unloads and saves as
    ``program`` does; ``program`` stays plain ATen. Loading it needs adaptc, triton and a GPU.
    Raises BackendError where the base is not on a GPU, or triton is not installed.
    """
    return lowered(program)


def save(program: ExportedProgram | Holder, path: str | os.PathLike[str]) -> Path:
    """Write a program as ``.pt2`` (torch.export's format), aside first and then moved into place.

    An adapted program carries its sites, slots and config in its graph; a merged or unloaded one is plain ATen and
    needs no adaptc to run. Raises AdaptcError for a program whose module trains other tensors than the program has.
    """
    beside = program.beside() if isinstance(program, Holder) else None
    inside: Any = program.program if isinstance(program, Holder) else program
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
    """Read a ``.pt2`` written by :func:`save` or ``torch.export.save``: an :class:`AdaptedProgram`, whose adapters are
    known again from the graph, or, of what generates, a :class:`Generator` again.

    ``backend``, ``hoist_limit`` and ``fuse`` as for :func:`compile`; a program without adapters is never fused unasked.
    ``device``: where its tensors and its adapter go; None leaves them where they were.

    Nothing in the file is run, and its tensors own their memory. Raises CheckpointError for files that are missing,
    damaged, of another format, or hold what could run code: pickled weights and objects, example inputs that are not
    tensors and plain values, operators that reach beyond the program, compiled code. BackendError for one whose kernels
    cannot run here.
    """
    program = load_program(Path(path), RunOptions(backend, hoist_limit, fuse), device)
    return generator_in(Path(path), program) or program


@through_holders
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
    """Write the current adapter as a PEFT adapter directory; returns the directory that holds it.

    ``format="diffusers"``: a ``pytorch_lora_weights.safetensors`` in the directory ``path``, or the file ``path``
    itself; ``component`` ("unet", "transformer", "text_encoder", ...) is put in front of its keys, as pipelines want
    it. ``format="kohya"``: the file ``path``, of ``component``, which it needs. Both return the file. They hold LoRA,
    DoRA and LoKr, kohya also LoHa; what one cannot hold raises CheckpointError, as do disks that are full.

    Of adapters that act together the one called ``adapter_name`` is written, under its name as PEFT does.
    ``peft.PeftModel.from_pretrained(model, path)`` loads it. ``base_model`` is recorded as base_model_name_or_path.
    ``save_embedding_layers`` adds the base weights of ``embed_tokens`` and ``lm_head``, which an adapter needs whose
    vocabulary was resized (PEFT also adds them whenever one of the two is targeted).

    ``program`` may be a module that ``program.module()`` made. It must be one that FSDP2 holds in parts: then every
    process makes the call, the first one writes, and all return when it has. Raises AdaptcError for a program whose
    module trains other tensors than the program has, and CheckpointError where the directory cannot be written.
    An :class:`Adapter` is written as a PEFT directory alone, and has no embeddings to add.
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
    program: AdaptedProgram | PackagedProgram | Holder, model: nn.Module | AdaptedProgram | None = None, **options: Any
) -> VerifyReport:
    """Run the program against the model it came from on random inputs of several shapes; see
    :func:`adaptc.verify.verify.verify_program` for ``options``.

    A package is run against the program it was made from, or against the model; the options are the same (see
    :func:`adaptc.verify.package.verify_package`).
    """
    if isinstance(program, PackagedProgram):
        return verify_package(program, model, **options)
    if isinstance(program, Holder):
        with program.as_program(model) as same:
            inside = program.program
            if isinstance(inside, PackagedProgram):
                options = program.drawn(options)
            return verify(inside, same, **options)
    return verify_program(program, model, **options)


def package(
    program: AdaptedProgram | Holder | Bank | GeneratorBank,
    path: str | os.PathLike[str],
    *,
    max_rank: int | None = None,
    products: str = "measured",
    tokenizer: Any = None,
    capacity: int | None = None,
) -> Path:
    """Compile ahead of time with AOTInductor into one file with swappable adapters; see ``adaptc.packages.write``.

    The file is machine code, which runs when it is loaded. ``products``: "measured" computes the base by what is
    fastest on this machine, "plain" by torch.

    Of what generates it holds the step (and the encoder), its generation config, and ``tokenizer``: one of
    transformers, or the directory of one. Of a bank it has room for ``capacity`` adapters, by default one more than
    there are, and :func:`load_package` gives one again. ConfigError for either where it does not belong.
    """
    inside: Any = program
    carried = parts = None
    if tokenizer is not None and not isinstance(program, (Holder, GeneratorBank)):
        raise ConfigError("a tokenizer goes into packages of what adaptc.compile_for_generation gives")
    if isinstance(program, GeneratorBank):
        inside, carried = program.bank, program.carried(tokenizer)
    if isinstance(program, (Bank, GeneratorBank)):
        options = {"capacity": capacity, "max_rank": max_rank, "products": products, "carried": carried}
        return package_bank(inside, Path(path), **options)
    if capacity is not None:
        raise ConfigError(f"capacity={shown(capacity)} is for packages of a bank")
    if isinstance(program, Holder):
        inside, carried, parts = program.program, program.carried(tokenizer), program.divided()
    if isinstance(inside, AdaptedProgram):
        check_unseen(inside, "package")
        check_followed(inside)
    return package_program(inside, Path(path), max_rank=max_rank, products=products, carried=carried, parts=parts)


def load_package(path: str | os.PathLike[str]) -> Any:
    """A runner for a file written by :func:`package`: call it, ``swap`` its adapter, ``bind`` others beside it. Of what
    generates, a :class:`Generator` again, which needs none of the model's own code; ``.tokenizer`` is the one it was
    packaged with.

    A package is machine code, which runs as it is loaded: load only those whose author you trust. Hashes in the file
    tell damage; they are no signature. Raises CheckpointError for files that are missing, damaged or changed, before
    any of their code is loaded, BackendError for one that was packaged without adaptc or does not run on this machine.
    """
    return load_generation(Path(path))


# What modules capture their models again for needs what is made of them.
PretrainedModule.generating = generate
PackedCalls.packing, PackedCalls.reading = packed, read_bounds
