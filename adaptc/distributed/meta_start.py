"""Begin with a base that has no memory: compile a model from its config, and read its weights where they belong.

``compile_from_config`` compiles the model of a transformers directory without its weights, which stay on the meta
device. A module of the program, or of its stages, is sharded next, by FSDP2 or by a pipeline. ``load_base`` then reads
from the directory's safetensors files what each process holds, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.binding.bind import initial_values
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.combine_bindings import spec_of_adapter, stack_bindings
from adaptc.capture.model_files import read_skeleton
from adaptc.distributed.train_state import failure_text, modules_of, no_single_process_warning
from adaptc.errors import CheckpointError, ConfigError, listing, short_repr
from adaptc.passes.adapt.move import MoveToDevice, usable_device
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model
from adaptc.runtime.options import RunOptions
from adaptc.training.program_module import ProgramModule


@with_graph_lock
def compile_from_config(
    path: str | os.PathLike[str],
    adapter: Any,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> AdaptedProgram:
    """Compile the model of a transformers directory without its weights, to train an adapter in several processes.

    The program's graph is for ``device``, and its adapter has first values there. The base's parameters are on the
    meta device. :func:`load_base` gives those of a module their values; the program itself cannot be called.

    Args:
        path: the directory, with ``config.json``; nothing else is read.
        adapter: the config of the new adapter, or name -> config for several.
        device: the device of each process that computes.
        dtype: the dtype of the base; None for the one that the config says.
        generator: of the adapter's random first values, which must be equal in all processes; None for one with
            torch's initial seed.
        **options: ``adapter_name``, ``example_inputs``, ``dynamic_shapes``, ``form`` and ``autocast`` of
            ``adaptc.compile``.

    Returns:
        the program, captured for training.

    Raises:
        CheckpointError: the directory has no model that transformers can make.
        ConfigError: the adapter's first values follow from the base's weights, as DoRA's, PiSSA's and copies of whole
            modules do.
        AdaptcError: what ``adaptc.compile`` raises.

    Example:
        >>> lm.save_pretrained("base")
        >>> prog = adaptc.distributed.compile_from_config("base", LoraConfig(r=2))
        >>> module = adaptc.distributed.load_base(prog.module(), "base")
        >>> module(input_ids=ids, labels=ids).loss.ndim
        0
    """
    target = usable_device(device)
    model = read_skeleton(Path(path))
    kind = dtype or getattr(model.config, "dtype", None) or torch.get_default_dtype()
    model.to(kind)
    buffers = _computed_buffers(model, target)
    made = compile_model(
        AdaptedProgram, model, adapter, RunOptions(), training=True, **{"autocast": True, **options}
    ).snapshot()
    moved = _to_device(made, target, buffers)
    program = AdaptedProgram(moved, made.adaptation, None, made.options)
    spec = program.spec(trainable=True)
    weights = {n: _without_values(t, target) if t.device.type == "meta" else t for n, t in spec.weights.items()}
    generator = torch.Generator().manual_seed(torch.initial_seed()) if generator is None else generator
    return program.with_binding(_first_values(replace(spec, weights=weights), made.binding, generator))


def _computed_buffers(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Return the buffers that no file holds, such as rotary frequencies, computed by transformers' own function."""
    found: dict[str, Tensor] = {}
    initialize: Any = getattr(model, "_init_weights", None)
    for path, module in list(model.named_modules()):
        names = {n for n, _ in module.named_buffers(recurse=False)} - module.state_dict().keys()
        if names:
            module.to_empty(device=device, recurse=False)
            initialize(module)
            found |= {f"{path}.{n}".removeprefix("."): module.get_buffer(n) for n in names}
            module.to(device="meta")
    return found


def _to_device(program: AdaptedProgram, device: torch.device, buffers: Mapping[str, Tensor]) -> Any:
    """Return the exported program with a graph for ``device`` and these buffers; other tensors stay without values."""
    opened = LiftedProgram(program)
    values = {n: t.to(device) for n, t in buffers.items()}
    for tensors in (opened.state_dict, opened.constants):
        for name, t in tensors.items():
            if isinstance(t, Tensor):
                tensors[name] = values.get(name, t)
    if lost := [n for n, t in opened.constants.items() if isinstance(t, Tensor) and t.is_meta]:
        raise CheckpointError(
            f"the model computes with {lost[0]!r}, which no file holds and which transformers does not make again from "
            "the config: compile the model itself, with its weights"
        )
    return MoveToDevice(device, keeps_meta=True)(opened.finish()).program


def _without_values(t: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the shape of ``t`` on ``device`` that takes no memory, and whose values are not numbers."""
    return torch.full((), torch.nan, dtype=t.dtype, device=device).expand(t.shape)


def _first_values(spec: BindingSpec, binding: Binding, generator: torch.Generator) -> Binding:
    def made(own: BindingSpec, b: Binding) -> Binding:
        found = initial_values(own, b.config, generator, methods_by_id=b.methods)
        if lost := [n for n, t in found.values.items() if t.is_floating_point() and not t.isfinite().all()]:
            raise ConfigError(
                f"the first values of {lost[0]!r} follow from the base's weights, which are not read yet: compile the "
                "model with its weights, or choose a method and an initialisation that do not need them (LoRA's own)"
            )
        return found

    if not binding.joint_adapters:
        return made(spec, binding)
    parts = {n: made(spec_of_adapter(spec, n), b) for n, b in binding.joint_adapters.items()}
    return stack_bindings(parts, spec.attachments)


def load_base(trained: Any, path: str | os.PathLike[str]) -> Any:
    """Read the base's weights of a transformers directory into modules that have none; return ``trained``.

    Of a sharded parameter each process reads its own shard, and a pipeline the parameters of its stages.

    Args:
        trained: a module of a program that :func:`compile_from_config` made, a ``StagedModule`` or a
            ``TrainingPipeline``. FSDP2 may have sharded the modules.
        path: the directory, with safetensors files.

    Returns:
        ``trained``, which can be called now.

    Raises:
        CheckpointError: the files lack a weight, or hold another shape of it.

    Example:
        >>> lm.save_pretrained("base")
        >>> prog = adaptc.distributed.compile_from_config("base", LoraConfig(r=2))
        >>> module = adaptc.distributed.load_base(prog.module(), "base")
    """
    for module in modules_of(trained):
        _load_into(module, Path(path))
    return trained


def _load_into(module: ProgramModule, path: Path) -> None:
    from torch.distributed import checkpoint

    dcp: Any = checkpoint  # it does not say what it exports
    empty = {n: t for n, t in module.tensors().items() if t.device.type == "meta"}
    if not empty:
        return
    device = next((t.device for t in module.tensors().values() if t.device.type != "meta"), torch.device("cpu"))
    try:
        reader = dcp.HuggingFaceStorageReader(str(path))
        stored = reader.read_metadata().state_dict_metadata
    except Exception as error:  # torch and safetensors have several types
        raise CheckpointError(f"cannot read the safetensors files of {path}: {short_repr(str(error))}") from error
    keys = _keys_in_files(empty, module.program.state_dict, stored, path)
    values: dict[int, Tensor] = {}
    for t in empty.values():
        if id(t) not in values:
            values[id(t)] = torch.empty_like(t, device=device, requires_grad=False)
    for name, t in empty.items():
        if tuple(stored[keys[id(t)]].size) != tuple(t.shape):
            raise CheckpointError(
                f"{path} has {keys[id(t)]!r} in shape {tuple(stored[keys[id(t)]].size)}, and the model has {name!r} in "
                f"{tuple(t.shape)}"
            )
    try:
        with no_single_process_warning():
            dcp.load({keys[i]: value for i, value in values.items()}, storage_reader=reader, no_dist=True)
    except dcp.CheckpointException as error:
        raise CheckpointError(f"cannot read the weights in {path}: {failure_text(error)}") from error
    module.load_state_dict({n: values[id(t)] for n, t in empty.items()}, strict=False, assign=True)
    module.original_device = device


def _keys_in_files(
    empty: Mapping[str, Tensor], state: Mapping[str, Any], stored: Mapping[str, Any], path: Path
) -> dict[int, str]:
    """Return the key of each tensor in the files, by the tensor's id.

    Of tied weights, which are one tensor in the program's ``state``, files hold one. Files of a bare model lack the
    first part of the names, and the other way round.
    """
    keys: dict[int, str] = {}
    names: dict[int, list[str]] = {}
    for name, t in state.items():
        names.setdefault(id(t), []).append(name)
    for name, t in empty.items():
        aliases = names.get(id(state.get(name)), [name])
        if (key := next((k for n in aliases for k in _spellings(n, stored)), None)) is not None:
            keys[id(t)] = key
    if lost := [n for n, t in empty.items() if id(t) not in keys]:
        raise CheckpointError(
            f"{path} does not hold {listing(map(repr, lost), 3)}. Where its files spell names as an older release did, "
            "load the model with transformers once, and save it again"
        )
    return keys


def _spellings(name: str, stored: Mapping[str, Any]) -> Iterator[str]:
    if name in stored:
        yield name
    elif (short := name.partition(".")[2]) in stored:
        yield short
    else:
        yield from (k for k in stored if k.partition(".")[2] == name)
