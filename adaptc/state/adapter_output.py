"""Write the current adapter of a program as a directory that PEFT reads, or as a file of another format."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from filecmp import cmp
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.adapter_files.atomic_write import atomic_replace
from adaptc.adapter_files.format import SAFETENSORS_WEIGHTS_NAME
from adaptc.adapter_files.formats.detect import WRITERS
from adaptc.adapter_files.formats.writing import AdaptedModule, write_format_file
from adaptc.binding.bind import embedding_weights, file_tensors
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.combine_bindings import spec_of_adapter
from adaptc.binding.sources.write_directory import write_with_experts
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError
from adaptc.methods import AdapterConfig
from adaptc.state.core import ProgramCore

#: the name under which transformers' Trainer looks for weights when it resumes from a checkpoint
TRAINER_WEIGHTS = "model.safetensors"


def write_adapter(
    program: ProgramCore,
    path: str | os.PathLike[str],
    binding: Binding | None = None,
    *,
    adapter_name: str = "default",
    safe_serialization: bool = True,
    base_model: str | None = None,
    save_embedding_layers: bool = False,
    format: str = "peft",
    component: str | None = None,
) -> Path:
    """Write an adapter of ``program`` as ``adaptc.save_adapter`` does; returns the path written.

    ``binding``: what to write, None for the program's current one.
    """
    binding, spec = program.binding if binding is None else binding, program.spec()
    if binding.joint_adapters:
        if adapter_name not in binding.joint_adapters:
            raise ConfigError(
                f"the program has no adapter called {adapter_name!r}; say which of {list(binding.joint_adapters)} to "
                "write with adapter_name"
            )
        binding, spec = binding.joint_adapters[adapter_name], spec_of_adapter(spec, adapter_name)
    binding = prepare_for_file(binding)
    if format != "peft":
        asked = {"safe_serialization": not safe_serialization, "save_embedding_layers": save_embedding_layers}
        asked["base_model"] = base_model is not None
        asked["adapter_name"] = adapter_name != "default" and not program.binding.joint_adapters
        if said := [n for n, given in asked.items() if given]:
            raise ConfigError(f"{said[0]}: only files in PEFT's format have that; leave it out with format={format!r}")
        return write_other_format(path, spec, binding, format, component)
    if component is not None:
        raise ConfigError(f"component={component!r}: files in PEFT's format name no component; leave it out")
    tensors: dict[str, Tensor] = file_tensors(spec, binding)
    if save_embedding_layers:
        found = embedding_weights(spec, binding)
        if not found:
            raise ConfigError(
                "save_embedding_layers=True, but the program has no module called embed_tokens or lm_head"
            )
        tensors = {**found, **tensors}
    return write_file_tensors(
        path,
        binding.config,
        tensors,
        of_transformers=program.adaptation.source is not None,
        adapter_name=adapter_name,
        safe_serialization=safe_serialization,
        base_model=base_model,
    )


def write_file_tensors(
    path: str | os.PathLike[str],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    *,
    of_transformers: bool = False,
    **options: Any,
) -> Path:
    """Write tensors under the bare keys of PEFT's files as a PEFT directory; returns its path.

    ``of_transformers``: whether the model is one of transformers, also where its config does not say so. ``options``:
    those of :func:`write_with_experts`.
    """
    library = str((config.auto_mapping or {}).get("parent_library", ""))
    tags = ("transformers",) if of_transformers or library.partition(".")[0] == "transformers" else ()
    return write_with_experts(path, config, tensors, tags=tags, **options)


def prepare_for_file(binding: Binding) -> Binding:
    """Return an adapter as files hold it: turned on, even where it is off. Warns where it is scaled, which no file
    says."""
    binding = binding.active_form or binding
    if binding.scale_factors:
        factor = next(iter(binding.scale_factors.values()))
        warnings.warn(
            f"the adapter {binding.describe_scales()}, and what is written is the adapter as it was made, as PEFT "
            f"writes it: set the scale again where it is read, or write {factor:g} * adaptc.load_adapter(path), which "
            "has it",
            AdaptcWarning,
            stacklevel=2,
        )
    return binding


def write_other_format(
    path: str | os.PathLike[str], spec: BindingSpec, binding: Binding, format: str, component: str | None
) -> Path:
    """Write ``binding`` in a format other than PEFT's.

    Raises ConfigError for a format that does not exist, CheckpointError for tensors that the format cannot hold.
    """
    writer = WRITERS.get(format)
    if writer is None:
        raise ConfigError(f"format={format!r} is not one of peft, {', '.join(WRITERS)}")
    remaining = file_tensors(spec, binding)
    modules: list[AdaptedModule] = []
    for a in spec.attachments:
        method, op = binding.methods.get(a.id), spec.ops[a.id]
        if method is None:
            continue
        keys = {n: a.file_key(n, slot) for n, slot in method.slots(op).items() if slot.saved}
        own = {n: remaining.pop(k) for n, k in keys.items() if k == f"{a.key}.{n}" and k in remaining}
        scale, rank = method.scale(op), method.sizes.rank()
        if own and scale is not None and rank is not None:
            modules.append(AdaptedModule(a.key, own, scale, rank))
        else:
            remaining |= {keys[n]: t for n, t in own.items()}
    if remaining:
        raise CheckpointError(
            f"the format {format} cannot hold {next(iter(remaining))!r}"
            + (f" and {len(remaining) - 1} more of the adapter's tensors" if len(remaining) > 1 else "")
            + f", which {binding.config.peft_type} has in PEFT's files. Write it as format='peft'."
        )
    if binding.changed_base:
        raise CheckpointError(
            f"the format {format} cannot hold an adapter that changed the base ({next(iter(binding.changed_base))!r}): "
            "its reader would add it to the unchanged one. Write it as format='peft'."
        )
    names = [fqn.removesuffix(".weight") for fqn in spec.weights if fqn.endswith(".weight")]
    content = writer.file_content(modules, component, binding.config.non_default_fields(), names)
    return write_format_file(writer.resolve_path(Path(path)), content)


def has_other_model(directory: Path) -> bool:
    """Return whether ``directory`` has a file under the name that Trainer looks for that is not the adapter beside
    it."""
    weights, name = directory / SAFETENSORS_WEIGHTS_NAME, directory / TRAINER_WEIGHTS
    own = weights.is_file() and name.is_file() and cmp(weights, name, shallow=False)
    return os.path.lexists(name) and not own


@contextmanager
def without_trainer_name(directory: Path) -> Generator[None]:
    """Run the block, which writes an adapter into ``directory``, and then remove a second name for its weights.

    That name would be of the adapter that was there before. A whole model under that name stays.
    """
    old = not has_other_model(directory)
    yield
    if old:
        (directory / TRAINER_WEIGHTS).unlink(missing_ok=True)


@contextmanager
def with_trainer_name(directory: Path) -> Generator[None]:
    """Run the block, which writes an adapter into ``directory``, and then give its weights a second name for Trainer to
    find.

    The name is a link to the same file, or a copy of it where the filesystem has no links. Raises CheckpointError,
    before anything is written, where something else has that name, such as a whole model.
    """
    weights, name = directory / SAFETENSORS_WEIGHTS_NAME, directory / TRAINER_WEIGHTS
    if has_other_model(directory):
        raise CheckpointError(
            f"{name} is there, and not this adapter's: it would be lost, or Trainer would resume from it. Choose "
            "another directory"
        )
    name.unlink(missing_ok=True)  # or a write that fails could leave an older adapter under this name
    try:
        yield
    finally:
        if weights.is_file():
            try:
                os.link(weights, name)
            except OSError:
                with atomic_replace(name) as copied:
                    shutil.copyfile(weights, copied)
