"""Programs on disk: torch.export's own format, written atomically, understood again from the graph's tags alone."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from adaptc._other_names import base_name
from adaptc.adapters import from_dict
from adaptc.binding import Binding, joined
from adaptc.errors import BackendError, CheckpointError
from adaptc.inductor import compilable
from adaptc.lowering import register_kernels
from adaptc.methods._registry import method_of
from adaptc.passes._lifted import Lifted
from adaptc.passes._method import Attachment
from adaptc.passes._regions import attachments, header
from adaptc.passes.inject import Inject, site_op
from adaptc.passes.unload import Unload
from adaptc.program import Adaptation, AdaptedProgram
from adaptc.runtime import check_backend
from adaptc.several import together

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


def load_program(path: Path, backend: str = "eager") -> AdaptedProgram:
    """Raises CheckpointError when the file is missing, damaged or not a program, BackendError when it holds kernels
    that cannot run here."""
    check_backend(backend)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        _import_what_it_names(path)
        program = torch.export.load(path)
    except BackendError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as an exported program: {first}") from error
    return from_program(program, backend, str(path))


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


def from_program(program: ExportedProgram, backend: str = "eager", source: str = "program") -> AdaptedProgram:
    """An AdaptedProgram of any program; one without regions has no adapter and can only be called and saved."""
    lifted = Lifted(program)
    for fqn, tensor in lifted.state_dict.items():
        if isinstance(tensor, torch.nn.Parameter):
            lifted.state_dict[fqn] = tensor.requires_grad_(False)
    found = attachments(lifted.graph, method_of)
    stored = header(lifted.graph)
    if not found or stored is None:
        return AdaptedProgram.adopt(lifted.finish(), Adaptation(), None, backend)
    adaptation = Adaptation(
        found,
        matches=stored["matches"],
        left_out=stored["left_out"],
        fills=stored["fills"],
        training=stored["training"],
        autocast=stored["autocast"],
        residual=stored["residual"],
        unread=stored["unread"],
    )
    binding = _binding(lifted, found, stored, source)
    program = lifted.finish()
    if backend == "inductor":
        program, found = _compilable(program, found, binding, stored)
        adaptation = replace(adaptation, attachments=found)
    return AdaptedProgram.adopt(program, adaptation, binding, backend)


def _compilable(
    program: ExportedProgram, found: list[Attachment], binding: Binding, stored: dict[str, Any]
) -> tuple[ExportedProgram, list[Attachment]]:
    """The program with the forms inductor can compile for every rank, if the file has others."""
    wanted = [compilable(a, "inductor") for a in found]
    if wanted == found:
        return program, found
    result = Inject(wanted, binding.values, stored)(Unload()(program).program)
    return result.program, list(result.data)


def _binding(lifted: Lifted, found: list[Attachment], stored: dict[str, Any], source: str) -> Binding:
    if not stored["parts"]:
        return _one_binding(lifted, found, stored, source)
    parts: dict[str, Binding] = {}
    for name, part in stored["parts"].items():
        beside = {} if parts else {k: stored[k] for k in ("unread", "carried")}
        own = {**stored, "unread": {}, "carried": [], **beside, **part}
        parts[name] = _one_binding(lifted, [a for a in found if a.adapter == name], own, source)
    return together(parts)


def _one_binding(lifted: Lifted, found: list[Attachment], stored: dict[str, Any], source: str) -> Binding:
    config = from_dict(stored["config"])
    present = set(stored["present"])
    values: dict[str, torch.Tensor] = {}
    methods, ops = {}, {}
    train = stored["training"] or not config.inference_mode
    for a in found:
        op = site_op(lifted, a)
        slots = {name: lifted.tensor(fqn) for name, fqn in a.slots.items()}
        values |= {a.slots[n]: t for n, t in slots.items()}
        if a.scale is not None:
            values[a.scale] = lifted.tensor(a.scale)
        if a.id in present:
            methods[a.id] = a.method.rebind(config, a).at(op).fit(op, slots)
            ops[a.id] = op
        for name, spec in a.method.slots(op).items():
            if spec.trainable and a.id in present and train:
                slots[name].requires_grad_(slots[name].is_floating_point())
    beside = {**stored["unread"], **{k: base_name(k) for k in stored["carried"]}}
    carried = {key: lifted.tensor(fqn).detach() for key, fqn in beside.items()}
    methods = joined(methods, ops)
    return Binding(values, methods, config, name=found[0].adapter, source=source, carried=carried)
