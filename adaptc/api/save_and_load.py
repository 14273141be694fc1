"""Write programs, adapters and packages to files, and read them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from adaptc.adapters.adapter import Adapter
from adaptc.bank.bank import Bank
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.generation.artifact import load_package_contents, read_generator
from adaptc.generation.generator_bank import GeneratorBank
from adaptc.packages.package_program import package_program
from adaptc.packages.write_bank import package_bank
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.program_file import load_program, save_program
from adaptc.program.wrapper import ProgramWrapper, accepts_wrappers, check_program
from adaptc.runtime.options import RunOptions
from adaptc.state.adapter_output import write_adapter
from adaptc.state.overrides import check_no_override
from adaptc.training.module_files import check_not_stale, write_module_adapter
from adaptc.training.program_module import ProgramModule
from adaptc.value_types import validates_options


def save(program: ExportedProgram | ProgramWrapper, path: str | os.PathLike[str]) -> Path:
    """Write a program as ``.pt2`` (torch.export's format), to a temporary file that is then moved to ``path``.

    An adapted program has its sites, slots and config in its graph. A merged or unloaded program is plain ATen and
    needs no adaptc to run. Raises AdaptcError for a program whose module trains other tensors than the program has.
    """
    sidecar_texts = program.sidecar_texts() if isinstance(program, ProgramWrapper) else None
    inside: Any = program.program if isinstance(program, ProgramWrapper) else program
    check_program(inside, "save", ExportedProgram)
    if isinstance(inside, AdaptedProgram):
        check_no_override(inside, "save")
        check_not_stale(inside)
    return save_program(inside, Path(path), sidecar_texts)


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
    return read_generator(Path(path), program) or program


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
    return write_adapter_of(program, path, options)


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
    package_files = parts = None
    if tokenizer is not None and not isinstance(program, (ProgramWrapper, GeneratorBank)):
        raise ConfigError("a tokenizer goes into packages of what adaptc.compile_for_generation gives")
    if isinstance(program, GeneratorBank):
        inside, package_files = program.bank, program.package_files(tokenizer)
    if isinstance(program, (Bank, GeneratorBank)):
        options = {"capacity": capacity, "max_rank": max_rank, "products": products, "package_files": package_files}
        return package_bank(inside, Path(path), **options)
    if capacity is not None:
        raise ConfigError(f"capacity={short_repr(capacity)} is for packages of a bank")
    if isinstance(program, ProgramWrapper):
        inside, package_files, parts = program.program, program.package_files(tokenizer), program.part_outputs()
    if isinstance(inside, AdaptedProgram):
        check_no_override(inside, "package")
        check_not_stale(inside)
    return package_program(
        inside, Path(path), max_rank=max_rank, products=products, package_files=package_files, parts=parts
    )


def load_package(path: str | os.PathLike[str]) -> Any:
    """Return a runner for a file written by :func:`package`: call it, ``swap`` its adapter, ``bind`` further ones.

    For a packaged :class:`Generator` it is a Generator, which needs none of the model's own code; its ``.tokenizer`` is
    the one it was packaged with.

    A package is machine code, which runs as it is loaded: load only packages whose author you trust. Hashes in the file
    detect damage alone. Raises CheckpointError for files that are missing, damaged or changed, before
    any of their code is loaded. Raises BackendError for a file that was packaged without adaptc or does not run on this
    machine.
    """
    return load_package_contents(Path(path))


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
