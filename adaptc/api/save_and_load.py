"""Write programs, adapters and packages to files, and read them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from adaptc.adapter_files.atomic_write import atomic_replace
from adaptc.adapters.adapter import Adapter
from adaptc.adapters.pack_adapters import PackedAdapters, pack_adapters
from adaptc.api.certify import certify
from adaptc.archives.added_files import BASE_TABLE_FILE, AddedFiles, read_added_files_of
from adaptc.archives.archive import is_package
from adaptc.bank.bank import Bank
from adaptc.bank.stack_placement import StackPlacement
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.packages.package_program import package_program
from adaptc.packages.write_bank import package_bank
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.files.base_fingerprint import base_fingerprints, joint_fingerprint
from adaptc.program.files.program_file import load_program, save_program
from adaptc.program.wrapper import ProgramWrapper, accepts_wrappers, check_program
from adaptc.runtime.options import RunOptions
from adaptc.serving.serving_file import load_package_contents, wrapper_of_file
from adaptc.serving.serving_model import ServingModel
from adaptc.state.adapter_output import write_adapter
from adaptc.state.overrides import check_no_override
from adaptc.training.module_files import check_not_stale, write_module_adapter
from adaptc.training.program_module import ProgramModule
from adaptc.value_types import validates_options
from adaptc.verification.certified_facts import certifier


def save(
    program: ExportedProgram | ProgramWrapper,
    path: str | os.PathLike[str],
    *,
    adapters: Mapping[str, Any] | None = None,
    base: str = "included",
    verify: bool = False,
) -> Path:
    """Write a program as ``.pt2`` (torch.export's format), to a temporary file that is then moved to ``path``.

    An adapted program has its sites, slots and config in its graph. A merged or unloaded program is plain ATen and
    needs no adaptc to run.

    Args:
        program: an exported program, adapted or not, or a generator.
        path: the file to write.
        adapters: name -> adapter as :func:`swap` takes it. The file holds the base once, and each of these as its own
            tensors and config; the program that is loaded is swapped to them by name. None keeps those that the program
            has from its own file.
        base: "included" writes the weights of the base. "reference" writes their names, shapes, dtypes and fingerprints
            instead: the file is small, and :func:`load` needs the base beside it.
        verify: whether to load the file once, measure it, and write that into its certificate; see :func:`certify`.

    Returns:
        the path of the file.

    Raises:
        AdaptcError: a module of the program trains other tensors than the program has. An adapter does not fit; it is
            named. Or ``verify`` is set and a check failed; nothing is written then.
        ConfigError: ``adapters`` has a name that no file can hold, or is given with a program that has no sites. Or
            ``base`` is another word.
        CheckpointError: the file cannot be written. With "reference", a weight is quantised, or the adapter has its own
            version of it; it is named.

    Example:
        >>> path = adaptc.save(prog, "model.pt2")
        >>> torch.allclose(adaptc.load(path)(x), prog(x), atol=1e-6)
        True
    """
    if verify:
        return _verified(program, Path(path), lambda new: save(program, new, adapters=adapters, base=base))
    sidecar_texts = program.sidecar_texts() if isinstance(program, ProgramWrapper) else None
    inside: Any = program.program if isinstance(program, ProgramWrapper) else program
    check_program(inside, "save", ExportedProgram)
    if isinstance(inside, AdaptedProgram):
        check_no_override(inside, "save")
        check_not_stale(inside)
    given: Any = base  # callers may give anything
    if given not in ("included", "reference"):
        raise ConfigError(f'base={short_repr(given)} is neither "included" nor "reference"')
    added = _AddedToFile(inside, adapters)
    return save_program(inside, Path(path), sidecar_texts, added.files, base, added.fingerprints)


def _verified(program: Any, path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` write a file of ``program``, certify it, and move it to ``path``; a failed check leaves nothing."""
    inside = program.program if isinstance(program, ProgramWrapper) else program
    with atomic_replace(path, path.name) as new:
        write(new)
        model = None
        if isinstance(inside, AdaptedProgram) and inside.adaptation.attachments:
            residual = inside.adaptation.residual
            model = inside if is_package(new) else None if residual else inside.base
        certify(new, model, base=inside if BASE_TABLE_FILE in read_added_files_of(new) else None)
    return path


class _AddedToFile:
    """The files added to the file of ``program``: its ``adapters`` by name, and the certificate.

    ``files`` are to be written, and ``bindings`` the adapters as ``program`` takes them. Raises ConfigError for
    adapters that the program cannot have.
    """

    def __init__(self, program: ExportedProgram, adapters: Any) -> None:
        self.fingerprints = base_fingerprints(program)
        if isinstance(program, AdaptedProgram):
            program = program.snapshot()
            packed = pack_adapters(program, adapters, joint_fingerprint(self.fingerprints))
        elif adapters is None:
            packed = PackedAdapters({}, {})
        else:
            raise ConfigError("adapters= is for programs with adapter sites, and this is a plain ExportedProgram")
        self.bindings = packed.bindings
        self.files = AddedFiles(packed.files, certifier(program, self.fingerprints, packed.files))


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = "eager",
    hoist_limit: int | None = None,
    fuse: bool = True,
    device: torch.device | str | None = None,
    base: Any = None,
    strict: bool = False,
) -> Any:
    """Read a ``.pt2`` written by :func:`save` or ``torch.export.save``.

    Nothing in the file is run, and its tensors own their memory.

    Args:
        path: the file to read.
        backend: "eager" or "inductor".
        hoist_limit: the number of bytes that hoisted values may take; see :func:`compile`.
        fuse: whether layers that read one tensor are computed by one matmul. A program without adapters is never fused
            unasked.
        device: the device of its tensors and its adapter; None leaves them where they were.
        base: the base of a program that was saved by reference: the model, its state dict, a program of it, a
            transformers directory, a ``.safetensors`` file or a GGUF file. Its tensors are shared, not copied.
        strict: whether to refuse what is of another base than the file's certificate says: the table of the base, the
            adapters in the file, and stored adapters of other files at a swap. The default is to warn.

    Returns:
        an :class:`AdaptedProgram`, whose current adapter is found in the graph, and whose ``adapters`` are those that
        lie in the file by name; for a saved generator a :class:`Generator`,
        for a saved serving model a :class:`ServingModel` with an empty bank.

    Raises:
        CheckpointError: the file is missing, damaged or of another format, or has something that could run code:
            pickled objects, operators that reach beyond the program, compiled code. Or its base is not in the file and
            not given, or ``base`` is another one; the first weights that differ are named.
        ConfigError: ``base`` is given for a file that holds its base.
        BackendError: the kernels of the program cannot run here.

    Example:
        >>> adaptc.load(adaptc.save(prog, "model.pt2")).binding.config.r
        2
    """
    program = load_program(AdaptedProgram, Path(path), RunOptions(backend, hoist_limit, fuse), device, base, strict)
    return wrapper_of_file(Path(path), program) or program


@accepts_wrappers
@validates_options("adapter_name", "safe_serialization", "base_model", "save_embedding_layers", "format", "component")
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

    ``peft.PeftModel.from_pretrained(model, path)`` loads it. Where FSDP2 has sharded the module ``program``, every
    process must make the call; the first one writes, and all return when it has.

    Args:
        program: a program, a generator, a module that ``program.module()`` made, or an :class:`Adapter`. An Adapter
            can only be written as a PEFT directory, and has no embeddings to add.
        path: the directory, or for ``format="kohya"`` the file. For "diffusers" it may be either.
        adapter_name: of adapters that act together the one to write, under its name as PEFT does.
        safe_serialization: whether to write ``.safetensors``; False writes a ``.bin``.
        base_model: the name that is recorded as base_model_name_or_path.
        save_embedding_layers: whether to add the base weights of ``embed_tokens`` and ``lm_head``, which an adapter
            needs if its vocabulary was resized. (PEFT also adds them whenever one of the two is targeted.)
        format: "peft", "diffusers" or "kohya". The last two hold LoRA, DoRA and LoKr, kohya also LoHa.
        component: what is put in front of the keys ("unet", "transformer", "text_encoder", ...), as pipelines need it.
            "kohya" needs it.

    Returns:
        the path of the directory; for "diffusers" and "kohya" the path of the file.

    Raises:
        AdaptcError: a module of the program trains other tensors than the program has.
        CheckpointError: the format cannot hold the adapter, or the path cannot be written.

    Example:
        >>> path = adaptc.save_adapter(prog, "my-adapter")
        >>> report = adaptc.swap(prog, path)
    """
    options: dict[str, Any] = {
        "adapter_name": adapter_name,
        "safe_serialization": safe_serialization,
        "base_model": base_model,
        "save_embedding_layers": save_embedding_layers,
        "format": format,
        "component": component,
    }
    return write_adapter_of(program, path, options)


def package(
    program: AdaptedProgram | ProgramWrapper | Bank,
    path: str | os.PathLike[str],
    *,
    max_rank: int | None = None,
    products: str = "measured",
    tokenizer: Any = None,
    capacity: int | None = None,
    adapters: Mapping[str, Any] | None = None,
    verify: bool = False,
) -> Path:
    """Compile ``program`` ahead of time with AOTInductor into one file with swappable adapters; return its path.

    The file is machine code, which runs when it is loaded. The package of a :class:`Generator` holds the step (and the
    encoder), the generation config, and the tokenizer. That of a :class:`ServingModel` holds its bank.

    Args:
        program: a program, a generator, a bank of one of these, or a serving model.
        path: the file to write.
        max_rank: the largest rank of later swaps; None for the present ranks, and those of ``adapters``.
        products: "measured" uses the base's fastest matmuls on this machine, "plain" torch's.
        tokenizer: a transformers tokenizer or the directory of one, for a generator.
        capacity: the number of adapters that the package of a bank has room for; None for one more than there are.
        adapters: name -> adapter, as for :func:`save`. A bank has its adapters already, and takes none here.
        verify: whether to load the package once, compare it with the program, and write that into its certificate.

    Returns:
        the path of the file.

    Raises:
        ConfigError: ``tokenizer``, ``capacity`` or ``adapters`` is given with a program that takes none.
        AdaptcError: an adapter of ``adapters`` does not fit the package; it is named. Or ``verify`` is set and a check
            failed; nothing is written then.
        BackendError: the program cannot be compiled.

    Example:
        >>> path = adaptc.package(prog, "packaged.pt2", max_rank=4)
        >>> adaptc.load_package(path)(x).shape
        torch.Size([2, 3])
    """
    inside: Any = program
    if verify:
        options: dict[str, Any] = {"max_rank": max_rank, "products": products, "tokenizer": tokenizer}
        options |= {"capacity": capacity, "adapters": adapters}
        if isinstance(program, Bank):
            raise ConfigError("verify= compares with one adapter, and a bank has many: verify the program it is of")
        return _verified(program, Path(path), lambda new: package(program, new, **options))
    package_files = parts = None
    generates = isinstance(program, ProgramWrapper) or (isinstance(program, Bank) and program.generator is not None)
    if tokenizer is not None and not generates:
        raise ConfigError("a tokenizer goes into packages of what adaptc.compile_for_generation gives")
    is_bank = isinstance(program, (Bank, ServingModel))
    if is_bank and adapters is not None:
        raise ConfigError("adapters= is for programs, and this is a bank: add them to it, bank.add(name, adapter)")
    if isinstance(program, ServingModel):
        package_files = program.package_files(tokenizer)
        return _package_bank(program.bank, path, capacity, max_rank, products, package_files)
    if isinstance(program, Bank):
        if program.generator is not None:
            package_files = program.generator.package_files(tokenizer)
        return _package_bank(program, path, capacity, max_rank, products, package_files)
    if capacity is not None:
        raise ConfigError(f"capacity={short_repr(capacity)} is for packages of a bank")
    if isinstance(program, ProgramWrapper):
        inside, package_files, parts = program.program, program.package_files(tokenizer), program.part_outputs()
    if isinstance(inside, AdaptedProgram):
        check_no_override(inside, "package")
        check_not_stale(inside)
    options = {"max_rank": max_rank, "products": products, "package_files": package_files, "parts": parts}
    if not isinstance(inside, AdaptedProgram):
        raise ConfigError(f"package takes what adaptc.compile or adaptc.load gives, not a {type(inside).__name__}")
    added = _AddedToFile(inside, adapters)
    return package_program(inside, Path(path), **options, added=added.files, members=added.bindings)


def _package_bank(bank: Bank, path: str | os.PathLike[str], *options: Any) -> Path:
    """Package ``bank``, with the certificate of its base and its adapters."""
    names = ("capacity", "max_rank", "products", "package_files")
    placement = bank.placement
    added = _AddedToFile(placement.program, None).files if isinstance(placement, StackPlacement) else AddedFiles()
    return package_bank(bank, Path(path), **dict(zip(names, options, strict=True)), added=added)


def load_package(path: str | os.PathLike[str], *, strict: bool = False) -> Any:
    """Return a runner for a file written by :func:`package`: call it, ``swap`` its adapter, ``bind`` further ones.

    A package is machine code, which runs as it is loaded: load only packages whose author you trust. Hashes in the file
    detect damage alone.

    Args:
        path: the file to read.
        strict: whether to refuse adapters of another base than the file's certificate says; the default is to warn.

    Returns:
        a :class:`PackagedProgram`, or a bank for the package of one. For a packaged :class:`Generator` it is a
        Generator, which needs none of the model's own code. Its ``tokenizer`` is the one it was packaged with.

    Raises:
        CheckpointError: the file is missing, damaged or changed. None of its code is loaded then.
        BackendError: the file was packaged without adaptc, or does not run on this machine.

    Example:
        >>> runner = adaptc.load_package(adaptc.package(prog, "packaged.pt2"))
        >>> torch.allclose(runner(x), prog(x), atol=1e-5)
        True
    """
    return load_package_contents(Path(path), strict)


def write_adapter_of(program: Any, path: str | os.PathLike[str], options: Mapping[str, Any]) -> Path:
    """Write the adapter of ``program`` to ``path``, and return the path that was written.

    ``options`` are those of ``adaptc.save_adapter``. Raises ConfigError for options that need a model where there is
    none, and AdaptcError for anything that has no adapter.
    """
    if isinstance(program, Adapter):
        own = ("adapter_name", "safe_serialization", "base_model")
        said = {n: v not in (None, False, "peft") for n, v in options.items() if n not in own}
        if given := [name for name, value in said.items() if value]:
            raise ConfigError(f"{given[0]} needs the model: bind the adapter to a program of it, and save that")
        return program.write(path, **{n: options[n] for n in own})
    if isinstance(program, ProgramModule):
        return write_module_adapter(program, path, **options)
    if not isinstance(program, AdaptedProgram):
        raise AdaptcError(
            f"save_adapter takes what adaptc.compile or program.module() gives, not a {type(program).__name__}; of "
            "what wraps a module, such as DistributedDataParallel, give what is inside"
        )
    check_no_override(program, "save_adapter")
    check_not_stale(program)
    return write_adapter(program, path, **options)
