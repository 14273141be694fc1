"""Write programs to disk in torch.export's own format, atomically, and understand them again from the graph's tags
alone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.adapter_files.atomic_write import atomic_replace
from adaptc.adapter_files.safe_torch_save import open_for_torch_save
from adaptc.archives.added_files import (
    BASE_TABLE_FILE,
    CERTIFICATE_FILE,
    AddedFiles,
    read_added_files_of,
    write_added_files,
)
from adaptc.archives.archive import open_archive
from adaptc.archives.certificate import hash_graph
from adaptc.archives.checksum import add_checksum
from adaptc.archives.refusal import UnsafeFile, describe_error, printable_path
from adaptc.binding.binding import Binding
from adaptc.binding.check_binding import fingerprint
from adaptc.binding.combine_bindings import stack_bindings
from adaptc.binding.common_to_sites import settle_shared_slots
from adaptc.binding.file_keys import base_weight_name
from adaptc.binding.grouped_slots import find_slot_groups
from adaptc.binding.sources.configs import config_from_dict
from adaptc.binding.stored_adapters import StoredAdapters, read_stored_adapters
from adaptc.errors import AdaptcError, AdaptcWarning, BackendError, CheckpointError, ConfigError
from adaptc.methods import method_from_dict
from adaptc.passes.adapt.choose_forms import with_compilable_form
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.move import usable_device
from adaptc.passes.adapt.unload import Unload
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.higher_order import find_higher_order_calls
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.pass_infra import PassManager
from adaptc.passes.graph.torch_caches import drop_dead_code, release_shape_env
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.regions import program_record, read_attachments, site_op
from adaptc.passes.quantized.expand_quantized import CollectQuantized, ExpandQuantized
from adaptc.passes.train.compressed_linear import COMPRESSED_LINEAR
from adaptc.program.files.base_fingerprint import joint_fingerprint
from adaptc.program.files.base_table import complete_program, names_without_values, read_base_table, without_base
from adaptc.program.files.given_base import tensors_of_base
from adaptc.program.files.read_program_file import read_program
from adaptc.progress import stage
from adaptc.runtime.options import RunOptions
from adaptc.runtime.variants.gpu_variants import register_kernels
from adaptc.state.adaptation import Adaptation, check_format, check_header, check_tags
from adaptc.state.core import ProgramCore
from adaptc.torch_typing import named_modules

P = TypeVar("P", bound=ProgramCore)


@with_graph_lock
def save_program(
    program: ExportedProgram,
    path: Path,
    sidecar_texts: Mapping[str, str] | None = None,
    added: AddedFiles | None = None,
    base: str = "included",
    fingerprints: Mapping[str, str] | None = None,
) -> Path:
    """Write ``program`` to ``path``, and return the path.

    ``sidecar_texts``: name -> text that goes into the same file. ``added``: further files.
    ``base``: "included" writes the weights of the base, "reference" a table of them with their ``fingerprints``.

    Raises CheckpointError when the file cannot be written; what was at ``path`` is then unchanged. A symbolic link
    stays one, and an existing file keeps its permissions.
    """
    if isinstance(program, ProgramCore):
        program.check_base()
        program = program.snapshot()
        _check_none_disabled(program, path)
        _warn_of_idle_tensors(program, path)
    program, added = _without_empty_blocks(program, path), added or AddedFiles()
    if base == "reference":
        program, table = without_base(program, path, fingerprints)
        added = replace(added, files={**added.files, BASE_TABLE_FILE: table})
    program = ExpandQuantized()(program).output
    try:
        with stage(f"writing {path.name}"), atomic_replace(path, "new.pt2") as new:
            with open_for_torch_save(new) as file, _expanded_allowed(program):
                torch.export.save(program, file, extra_files=dict(sidecar_texts or {}))
            with open_archive(new) as archive:
                files = added.complete(partial(hash_graph, archive))
            write_added_files(new, files)
            add_checksum(new)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"could not save {path}: {type(error).__name__}: {error}") from error
    return path


@contextlib.contextmanager
def _expanded_allowed(program: ExportedProgram) -> Generator[None]:
    """Run the block without torch's warning about memory that no tensor fills, which torch writes as it is.

    The warning is no alarm for tensors that are views of one number, where that number is all there is. A program has
    such slots after a swap to a PEFT file of virtual tokens alone, without the network that made them.
    """
    with warnings.catch_warnings():
        if any(isinstance(t, Tensor) and 0 in t.stride() and t.numel() > 1 for t in program.state_dict.values()):
            warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        yield


def _check_none_disabled(program: ProgramCore, path: Path) -> None:
    if program.current is not None and (off := program.current.inactive_names):
        raise CheckpointError(
            f"cannot save {path}: a program's file holds what calls compute, and {', '.join(map(repr, off))} would be "
            f"lost, which is off. Let all act first, program.set_active({list(program.current.adapters_by_name)}), or "
            "take it out: program.delete_adapter, or adaptc.unload for the only one"
        )


def _warn_of_idle_tensors(program: ProgramCore, path: Path) -> None:
    current = program.current
    if current is not None and (idle := current.idle_tensors):
        warnings.warn(
            f"{path} has no tensors of layers that the program never calls, and its adapter has {len(idle)}, such as "
            f"{next(iter(idle))!r}: keep the adapter's own file, or write it with adaptc.save_adapter",
            AdaptcWarning,
            stacklevel=4,
        )


def _without_empty_blocks(program: ExportedProgram, path: Path) -> ExportedProgram:
    """Return a program that computes the same, without the empty blocks that torch writes and then cannot read.

    Raises CheckpointError for other blocks that give no value.
    """
    root = program.graph_module
    empty_blocks = [c.node.name for c in find_higher_order_calls(root) if c.is_empty()]
    for name, module in named_modules(root):
        found = find_higher_order_calls(module) if isinstance(module, fx.GraphModule) else []
        if any(c.has_no_outputs() for c in found if name or c.node.name not in empty_blocks):
            raise CheckpointError(
                f"cannot save {path}: torch.export writes blocks that give no value, and cannot read them. The program "
                f"has one{f' in {name}' if name else ''}: compute there only what is used outside, or take the "
                "torch.no_grad, torch.enable_grad, autocast or torch.cond around it away"
            )
    if not empty_blocks:
        return program
    lifted = LiftedProgram(program)
    for name in empty_blocks:
        lifted.graph.erase_node(lifted.nodes[name])
    return lifted.finish()


@with_graph_lock
def load_program(
    program_class: type[P],
    path: Path,
    options: RunOptions,
    device: torch.device | str | None = None,
    base: Any = None,
    is_strict: bool = False,
) -> P:
    """Read a program of ``program_class`` from a file.

    ``device``: the device for all its tensors; None leaves them where they were saved from. ``base``: what completes a
    program that was saved by reference, as :func:`tensors_of_base` takes it. ``is_strict``: whether to refuse what is
    of another base than the file's certificate says, where the default is to warn.

    Raises CheckpointError when the file is missing, damaged or not a program. Raises BackendError when it holds kernels
    that cannot run here, or where there is no such device.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {printable_path(path)}")
    target = None if device is None else usable_device(device)
    with stage(f"reading {path.name}"):
        files = read_added_files_of(path)
        stored = read_stored_adapters(files, path, is_strict)
        _check_base_given(files, base, path)
        _check_certified_base(files, stored, path)
        saved = read_program(path)
        if saved.uses_namespace("adaptc", besides=COMPRESSED_LINEAR):
            register_kernels(str(path))
        program = saved.to_exported_program()
        if (data := files.get(BASE_TABLE_FILE)) is not None:
            program = complete_program(program, read_base_table(data, path), tensors_of_base(base), path)
        elif CERTIFICATE_FILE in files and (lost := names_without_values(program)):
            raise CheckpointError(
                f"{printable_path(path)} is damaged: it has no values of {lost[0]!r}, and no table of its base. "
                "Save it again from the model"
            )
    try:
        loaded = from_program(program_class, program, options, str(path), stored)
    except (CheckpointError, BackendError):
        raise
    except Exception as error:  # a forged header can break any of its readers
        why = str(error) if isinstance(error, (AdaptcError, UnsafeFile)) else describe_error(error)
        raise CheckpointError(
            f"{printable_path(path)} cannot be read as an exported program, for what it says of its adapter: {why}. "
            "Save it again from the model and its adapter"
        ) from error
    drop_dead_code()
    release_shape_env(loaded.graph, just_captured=True)
    return loaded if target is None else loaded.to(target)


def _check_base_given(files: Mapping[str, bytes], base: Any, path: Path) -> None:
    """Raise CheckpointError for a file that lacks its base where none is given, ConfigError for one that has it."""
    if BASE_TABLE_FILE not in files:
        if base is not None:
            raise ConfigError(f"{printable_path(path)} holds its base: leave base= out")
    elif base is None:
        table = read_base_table(files[BASE_TABLE_FILE], path)
        first = ", ".join(map(repr, list(table)[:2]))
        raise CheckpointError(
            f"{printable_path(path)} was saved by reference: it has the names of its base's {len(table)} weights, such "
            f"as {first}, and not the weights. Give the base it was made from, adaptc.load(path, base=...): the model, "
            "its state dict, its directory or its .safetensors file"
        )


def _check_certified_base(files: Mapping[str, bytes], stored: StoredAdapters, path: Path) -> None:
    """Warn of a table of another base than the certificate says, or raise CheckpointError where that is asked."""
    if (data := files.get(BASE_TABLE_FILE)) is None or stored.base is None:
        return
    if joint_fingerprint({n: e["sha256"] for n, e in read_base_table(data, path).items()}) != stored.base:
        message = (
            f"{printable_path(path)} refers to another base than its certificate says ({stored.base[:12]}): save it "
            "again from the model"
        )
        if stored.is_strict:
            raise CheckpointError(message)
        warnings.warn(message, AdaptcWarning, stacklevel=5)


@with_graph_lock
def from_program(
    program_class: type[P],
    program: ExportedProgram,
    options: RunOptions | None = None,
    source: str = "program",
    adapters: StoredAdapters | None = None,
) -> P:
    """Return a program of ``program_class`` of any exported program; one without regions has no adapter and can only be
    called and saved.

    ``source``: the name of the program in errors, and as the source of its binding. ``adapters``: those of its file, by
    name. Raises CheckpointError where its regions are of another format.
    """
    options = options or RunOptions()
    lifted = LiftedProgram(CollectQuantized()(program).output)
    for fqn, tensor in lifted.state_dict.items():
        if isinstance(tensor, torch.nn.Parameter):
            lifted.state_dict[fqn] = tensor.requires_grad_(False)
    stored = program_record(lifted.graph)
    if stored is not None:
        check_format(stored, source)
    check_tags(lifted.graph)
    if stored is None:
        return program_class(lifted.finish(), Adaptation(), options=replace(options, fuse=False))
    found = read_attachments(lifted.graph, method_from_dict)
    check_header(stored, {a.id for a in found})
    adaptation = replace(
        Adaptation.from_header(stored, found), stored=StoredAdapters() if adapters is None else adapters
    )
    binding = _read_binding(lifted, adaptation.attachments, stored, source)
    made = lifted.finish()
    wanted = [with_compilable_form(a, options.backend) for a in adaptation.attachments]
    if wanted != adaptation.attachments:
        # The program has forms that this backend cannot compile for every rank (see ``with_compilable_form``).
        done = PassManager([Unload(), Inject(wanted, binding.values, stored)])(made)
        made, adaptation = done.output, replace(adaptation, attachments=done.data[1])
    return program_class(made, adaptation, binding, options)


def _read_binding(
    lifted: LiftedProgram, attachments_found: Sequence[Attachment], stored: dict[str, Any], source: str
) -> Binding:
    if not stored["parts"]:
        return _read_adapter_binding(lifted, attachments_found, stored, source)
    parts: dict[str, Binding] = {}
    gone = {
        fqn: lifted.tensor(fqn) for a in attachments_found if a.adapter not in stored["parts"] for fqn in a.tensor_names
    }
    for name, part in stored["parts"].items():
        beside: dict[str, Any] = {} if parts else {k: stored[k] for k in ("unread", "carried")}
        own: dict[str, Any] = {**stored, "unread": {}, "carried": [], **beside, **part}
        parts[name] = _read_adapter_binding(lifted, [a for a in attachments_found if a.adapter == name], own, source)
    return stack_bindings(parts, attachments_found, gone)


def _read_adapter_binding(
    lifted: LiftedProgram, attachments_found: Sequence[Attachment], stored: dict[str, Any], source: str
) -> Binding:
    config = config_from_dict(stored["config"])
    present = set(stored["present"])
    values: dict[str, torch.Tensor] = {}
    methods, ops = dict[str, Method](), dict[str, Op]()
    is_trainable = stored["training"] or not config.inference_mode
    for a in attachments_found:
        op = site_op(lifted, a)
        slots = {name: lifted.tensor(fqn) for name, fqn in a.slots.items()}
        values |= {a.slots[n]: t for n, t in slots.items()}
        if a.scale_slot is not None:
            values[a.scale_slot] = lifted.tensor(a.scale_slot)
        if a.id in present:
            methods[a.id] = a.method.rebind(config, a).sizes.specialized_for(op).sizes.with_sizes_of(op, slots)
            ops[a.id] = op
        for name, spec in a.method.slots(op).items():
            if spec.trainable and a.id in present and is_trainable:
                slots[name].requires_grad_(slots[name].is_floating_point() or slots[name].is_complex())
    beside = {**stored["unread"], **{k: base_weight_name(k) for k in stored["carried"]}}
    carried = {key: lifted.tensor(fqn).detach() for key, fqn in beside.items()}
    methods = settle_shared_slots(methods, ops, lifted.state_dict)
    for fqn, first in find_slot_groups(attachments_found, ops, methods, lifted.state_dict).items():
        one, other = values[first], values[fqn]
        if (one.dtype, one.device) == (other.dtype, other.device):
            if not torch.equal(one, other):
                raise CheckpointError(f"{first!r} and {fqn!r} are one tensor of its adapter, and differ")
            values[fqn] = lifted.state_dict[fqn] = one
    # The original base is not in the file, so a binding of this program fits only where the base is this changed one.
    bases = {fqn: fingerprint(lifted.tensor(fqn)) for fqn in stored["residual"] if fqn in lifted.state_dict}
    # The file holds the scale in effect: the scale that the adapter was made with, times this factor.
    factors = {site: factor for site, factor in stored.get("factors", {}).items() if site in methods}
    own: dict[str, Any] = {"extra_tensors": carried, "base_fingerprints": bases, "scale_factors": factors}
    return Binding(values, methods, config, name=attachments_found[0].adapter, source=source, **own)
