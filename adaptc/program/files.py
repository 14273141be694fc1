"""Programs on disk: torch.export's own format, written atomically, understood again from the graph's tags alone."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from adaptc.binding.bind import joined
from adaptc.binding.binding import Binding
from adaptc.binding.combine import together
from adaptc.binding.file_keys import base_name
from adaptc.binding.source import from_dict
from adaptc.errors import BackendError, CheckpointError
from adaptc.methods import method_of
from adaptc.passes.adapt.choose_forms import compilable
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.move import usable
from adaptc.passes.adapt.unload import Unload
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.pass_infra import PassManager
from adaptc.passes.ir.regions import attachments, header, site_op
from adaptc.program.adaptation import Adaptation, check_format
from adaptc.program.adapted import AdaptedProgram
from adaptc.runtime.gpu_variants import register_kernels
from adaptc.runtime.options import RunOptions

# How torch.export writes the output type of a transformers model; a file cannot name any other module to import.
_OUTPUT_TYPE = re.compile(rb'\\"type\\": \\"(transformers\.(?:modeling_outputs|models\.\w+\.modeling_\w+))\.\w+\\"')

# How it writes an op of adaptc.kernels.
_KERNEL = b'"torch.ops.adaptc.'


def save_program(program: ExportedProgram, path: Path) -> Path:
    """Raises CheckpointError when the file cannot be written; what was at ``path`` is then unchanged."""
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot save to {path}: the directory {path.parent} does not exist")
    try:
        # A directory of its own, since a file from mkstemp is for its owner alone, and torch writes its name inside.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
            file = Path(aside, f"{path.stem}.pt2")
            torch.export.save(program, file)
            os.replace(file, path)
    except Exception as error:
        raise CheckpointError(f"could not save {path}: {type(error).__name__}: {error}") from error
    return path


def load_program(path: Path, options: RunOptions, device: torch.device | str | None = None) -> AdaptedProgram:
    """Raises CheckpointError when the file is missing, damaged or not a program, BackendError when it holds kernels
    that cannot run here, or there is no such device. ``device``: where to, with all its tensors; None leaves them where
    they were saved from."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    target = None if device is None else usable(device)
    try:
        _import_what_it_names(path)
        program = torch.export.load(path)
    except BackendError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as an exported program: {first}") from error
    loaded = from_program(program, options, str(path))
    return loaded if target is None else loaded.to(target)


def _import_what_it_names(path: Path) -> None:
    """Import the classes of a program's outputs and the ops of its kernels: torch.export.load knows only what is
    imported already."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json") and "/models/" in name:
                text = archive.read(name)
                if _KERNEL in text:
                    register_kernels(str(path))
                for module in set(_OUTPUT_TYPE.findall(text)):
                    importlib.import_module(module.decode())


def from_program(
    program: ExportedProgram, options: RunOptions | None = None, source: str = "program"
) -> AdaptedProgram:
    """An AdaptedProgram of any program; one without regions has no adapter and can only be called and saved.

    Raises CheckpointError where its regions are of another format.
    """
    options = options or RunOptions()
    lifted = Lifted(program)
    for fqn, tensor in lifted.state_dict.items():
        if isinstance(tensor, torch.nn.Parameter):
            lifted.state_dict[fqn] = tensor.requires_grad_(False)
    stored = header(lifted.graph)
    if stored is None:
        return AdaptedProgram(lifted.finish(), Adaptation(), options=replace(options, fuse=False))
    check_format(stored, source)
    adaptation = Adaptation.from_header(stored, attachments(lifted.graph, method_of))
    binding = _binding(lifted, adaptation.attachments, stored, source)
    made = lifted.finish()
    wanted = [compilable(a, options.backend) for a in adaptation.attachments]
    if wanted != adaptation.attachments:
        # The file has forms that its backend cannot compile for every rank.
        done = PassManager([Unload(), Inject(wanted, binding.values, stored)])(made)
        made, adaptation = done.output, replace(adaptation, attachments=done.data[1])
    return AdaptedProgram(made, adaptation, binding, options)


def _binding(lifted: Lifted, found: Sequence[Attachment], stored: dict[str, Any], source: str) -> Binding:
    if not stored["parts"]:
        return _one_binding(lifted, found, stored, source)
    parts: dict[str, Binding] = {}
    for name, part in stored["parts"].items():
        beside = {} if parts else {k: stored[k] for k in ("unread", "carried")}
        own = {**stored, "unread": {}, "carried": [], **beside, **part}
        parts[name] = _one_binding(lifted, [a for a in found if a.adapter == name], own, source)
    return together(parts)


def _one_binding(lifted: Lifted, found: Sequence[Attachment], stored: dict[str, Any], source: str) -> Binding:
    config = from_dict(stored["config"])
    present = set(stored["present"])
    values: dict[str, torch.Tensor] = {}
    methods, ops = {}, {}
    train = stored["training"] or not config.inference_mode
    for a in found:
        op = site_op(lifted, a)
        slots = {name: lifted.tensor(fqn) for name, fqn in a.slots.items()}
        values |= {a.slots[n]: t for n, t in slots.items()}
        if a.scale_slot is not None:
            values[a.scale_slot] = lifted.tensor(a.scale_slot)
        if a.id in present:
            methods[a.id] = a.method.rebind(config, a).at(op).with_sizes_of(op, slots)
            ops[a.id] = op
        for name, spec in a.method.slots(op).items():
            if spec.trainable and a.id in present and train:
                slots[name].requires_grad_(slots[name].is_floating_point() or slots[name].is_complex())
    beside = {**stored["unread"], **{k: base_name(k) for k in stored["carried"]}}
    carried = {key: lifted.tensor(fqn).detach() for key, fqn in beside.items()}
    methods = joined(methods, ops)
    return Binding(values, methods, config, name=found[0].adapter, source=source, carried=carried)
