"""Write programs to disk in torch.export's own format, atomically, and understand them again from the graph's tags
alone."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.adapter_files.atomic_write import replacing
from adaptc.adapter_files.safe_torch_save import writing
from adaptc.binding.bind import joined
from adaptc.binding.binding import Binding
from adaptc.binding.check_binding import fingerprint
from adaptc.binding.combine_bindings import together
from adaptc.binding.file_keys import base_name
from adaptc.binding.grouped_slots import groups
from adaptc.binding.sources.source import from_dict
from adaptc.capture.capture import Source
from adaptc.errors import AdaptcError, BackendError, CheckpointError
from adaptc.methods import method_of
from adaptc.passes.adapt.choose_forms import compilable
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.move import usable
from adaptc.passes.adapt.unload import Unload
from adaptc.passes.graph.graph_lock import exclusive
from adaptc.passes.graph.higher_order import calls
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.pass_infra import PassManager
from adaptc.passes.graph.torch_caches import forget_code, forget_sizes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.regions import attachments, header, site_op
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.progress import stage
from adaptc.runtime.gpu_variants import register_kernels
from adaptc.runtime.options import RunOptions
from adaptc.safe_pt2.checksum import seal
from adaptc.safe_pt2.program import read
from adaptc.safe_pt2.refusal import UnsafeFile, reason, shown_path
from adaptc.state.adaptation import Adaptation, check_format, check_header, check_tags
from adaptc.training.program_module import ProgramModule


@exclusive
def save_program(program: ExportedProgram, path: Path, beside: Mapping[str, str] | None = None) -> Path:
    """Write ``program`` to ``path``, and return the path. ``beside``: name -> text that goes into the same file.

    Raises CheckpointError when the file cannot be written; what was at ``path`` is then unchanged. A symbolic link
    stays one, and an existing file keeps its permissions.
    """
    if isinstance(program, AdaptedProgram):
        program.check_base()
        program = program.snapshot()
        _check_all_act(program, path)
    program = _readable(program, path)
    try:
        with stage(f"writing {path.name}"), replacing(path, "new.pt2") as new:
            with writing(new) as file, _without_alarm(program):
                torch.export.save(program, file, extra_files=dict(beside or {}))
            seal(new)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"could not save {path}: {type(error).__name__}: {error}") from error
    return path


@contextlib.contextmanager
def _without_alarm(program: ExportedProgram) -> Iterator[None]:
    """Run the block without torch's warning about memory that no tensor fills, which torch writes as it is.

    The warning is no alarm for tensors that are views of one number, where that number is all there is. A program has
    such slots after a swap to a PEFT file of virtual tokens alone, without the network that made them.
    """
    with warnings.catch_warnings():
        if any(isinstance(t, Tensor) and 0 in t.stride() and t.numel() > 1 for t in program.state_dict.values()):
            warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        yield


def _check_all_act(program: AdaptedProgram, path: Path) -> None:
    if program.current is not None and (off := program.current.off):
        raise CheckpointError(
            f"cannot save {path}: a program's file holds what calls compute, and {', '.join(map(repr, off))} would be "
            f"lost, which is off. Let all act first, program.set_active({program.available_adapters}), or take it out: "
            "program.delete_adapter, or adaptc.unload for the only one"
        )


def _readable(program: ExportedProgram, path: Path) -> ExportedProgram:
    """Return a program that computes the same, without the empty blocks that torch writes and then cannot read.

    Raises CheckpointError for other blocks that give no value.
    """
    root = program.graph_module
    empty = [c.node.name for c in calls(root) if c.is_empty()]
    for name, module in root.named_modules():
        found = calls(module) if isinstance(module, fx.GraphModule) else []
        if any(c.gives_nothing() for c in found if name or c.node.name not in empty):
            raise CheckpointError(
                f"cannot save {path}: torch.export writes blocks that give no value, and cannot read them. The program "
                f"has one{f' in {name}' if name else ''}: compute there only what is used outside, or take the "
                "torch.no_grad, torch.enable_grad, autocast or torch.cond around it away"
            )
    if not empty:
        return program
    lifted = Lifted(program)
    for name in empty:
        lifted.graph.erase_node(lifted.nodes[name])
    return lifted.finish()


@exclusive
def load_program(path: Path, options: RunOptions, device: torch.device | str | None = None) -> AdaptedProgram:
    """Read a program from a file. ``device``: the device for all its tensors; None leaves them where they were saved
    from.

    Raises CheckpointError when the file is missing, damaged or not a program. Raises BackendError when it holds kernels
    that cannot run here, or where there is no such device.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {shown_path(path)}")
    target = None if device is None else usable(device)
    with stage(f"reading {path.name}"):
        saved = read(path)
        if saved.uses("adaptc"):
            register_kernels(str(path))
        program = saved.program()
    try:
        loaded = from_program(program, options, str(path))
    except (CheckpointError, BackendError):
        raise
    except Exception as error:  # a forged header can break any of its readers
        why = str(error) if isinstance(error, (AdaptcError, UnsafeFile)) else reason(error)
        raise CheckpointError(
            f"{shown_path(path)} cannot be read as an exported program, for what it says of its adapter: {why}. Save "
            "it again from the model and its adapter"
        ) from error
    forget_code()
    forget_sizes(loaded.graph, captured=True)
    return loaded if target is None else loaded.to(target)


@exclusive
def from_program(
    program: ExportedProgram, options: RunOptions | None = None, source: str = "program"
) -> AdaptedProgram:
    """Return an AdaptedProgram of any exported program; one without regions has no adapter and can only be called and
    saved.

    ``source``: the name of the program in errors, and as the source of its binding. Raises CheckpointError where its
    regions are of another format.
    """
    options = options or RunOptions()
    lifted = Lifted(program)
    for fqn, tensor in lifted.state_dict.items():
        if isinstance(tensor, torch.nn.Parameter):
            lifted.state_dict[fqn] = tensor.requires_grad_(False)
    stored = header(lifted.graph)
    if stored is not None:
        check_format(stored, source)
    check_tags(lifted.graph)
    if stored is None:
        return AdaptedProgram(lifted.finish(), Adaptation(), options=replace(options, fuse=False))
    found = attachments(lifted.graph, method_of)
    check_header(stored, {a.id for a in found})
    adaptation = Adaptation.from_header(stored, found)
    binding = _binding(lifted, adaptation.attachments, stored, source)
    made = lifted.finish()
    wanted = [compilable(a, options.backend) for a in adaptation.attachments]
    if wanted != adaptation.attachments:
        # The program has forms that this backend cannot compile for every rank (see ``compilable``).
        done = PassManager([Unload(), Inject(wanted, binding.values, stored)])(made)
        made, adaptation = done.output, replace(adaptation, attachments=done.data[1])
    return AdaptedProgram(made, adaptation, binding, options)


def unpickled_module(
    data: bytes, source: Source | None, options: RunOptions, logits: str, training: bool, every: Any
) -> ProgramModule:
    """Return the module that :func:`_pickled` took apart."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.pt2"
        path.write_bytes(data)
        loaded = load_program(path, options)
    adaptation = replace(loaded.adaptation, source=source)
    module = AdaptedProgram(loaded, adaptation, loaded.current, options).module(logits=logits)
    if every is not None:
        module.checkpoint(every)
    return module.train(training)


def _pickled(module: ProgramModule) -> tuple[Any, ...]:
    program = module.program
    with tempfile.TemporaryDirectory() as folder:
        data = save_program(program, Path(folder) / "module.pt2").read_bytes()
    how = program.adaptation.source, program.options, module.making.logits, module.training, module.checkpointed
    return unpickled_module, (data, *how)


ProgramModule.pickled = staticmethod(_pickled)


def _binding(lifted: Lifted, found: Sequence[Attachment], stored: dict[str, Any], source: str) -> Binding:
    if not stored["parts"]:
        return _one_binding(lifted, found, stored, source)
    parts: dict[str, Binding] = {}
    gone = {fqn: lifted.tensor(fqn) for a in found if a.adapter not in stored["parts"] for fqn in a.tensor_names}
    for name, part in stored["parts"].items():
        beside = {} if parts else {k: stored[k] for k in ("unread", "carried")}
        own = {**stored, "unread": {}, "carried": [], **beside, **part}
        parts[name] = _one_binding(lifted, [a for a in found if a.adapter == name], own, source)
    return together(parts, found, gone)


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
    for fqn, first in groups(found, ops, methods, lifted.state_dict).items():
        one, other = values[first], values[fqn]
        if (one.dtype, one.device) == (other.dtype, other.device):
            if not torch.equal(one, other):
                raise CheckpointError(f"{first!r} and {fqn!r} are one tensor of its adapter, and differ")
            values[fqn] = lifted.state_dict[fqn] = one
    # The original base is not in the file, so a binding of this program fits only where the base is this changed one.
    bases = {fqn: fingerprint(lifted.tensor(fqn)) for fqn in stored["residual"] if fqn in lifted.state_dict}
    # The file holds the scale in effect: the scale that the adapter was made with, times this factor.
    factors = {site: factor for site, factor in stored.get("factors", {}).items() if site in methods}
    own: dict[str, Any] = {"carried": carried, "bases": bases, "factors": factors}
    return Binding(values, methods, config, name=found[0].adapter, source=source, **own)
