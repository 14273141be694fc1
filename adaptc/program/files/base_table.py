"""Save a program by reference to its base: with a table of the base's weights in their place, and complete it again.

The table has the shape, dtype, device and fingerprint of each weight and persistent buffer, by name. In the program
itself these tensors are on the meta device, which torch writes without data. ``torch.export.load`` reads such a file,
and a call of the result fails for want of the weights.

What lies in the graph stays in the file: the adapter, buffers that are not persistent, and constants.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.archives.json_schema import DictOf, Nullable, Size, check_json
from adaptc.archives.names import parse_json
from adaptc.archives.refusal import UnsafeFile, printable_path
from adaptc.errors import MAX_LISTED, CheckpointError, and_more
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.storage import storage_key
from adaptc.program.files.base_fingerprint import adapter_tensor_names, changed_weights, fingerprints_of

_TENSOR_SCHEMA = {"shape": [Size], "dtype": str, "device": str, "sha256": str, "tied": Nullable(str)}
_TABLE_SCHEMA = {"format": Size, "tensors": DictOf(_TENSOR_SCHEMA)}
FORMAT = 1


def without_base(
    program: ExportedProgram, path: Path, fingerprints: Mapping[str, str] | None = None
) -> tuple[ExportedProgram, bytes]:
    """Return ``program`` with its base on the meta device, and the table of the base as JSON.

    ``fingerprints``: those of the base's weights where they are known; None computes them.

    Raises CheckpointError, naming the weight, for a base that is quantised, and for one that the adapter changed.
    """
    lifted, own = LiftedProgram(program), adapter_tensor_names(program)
    base = {n: t for n, t in lifted.state_dict.items() if n not in own}
    changed = changed_weights(program)
    for name, tensor in base.items():
        if name in changed:
            raise CheckpointError(
                f"cannot save {printable_path(path)} by reference: the adapter has its own version of {name!r} (its "
                'initialisation changed the base). Save it with base="included", or make it plain LoRA first'
            )
        if type(tensor) not in (Tensor, nn.Parameter):
            raise CheckpointError(
                f"cannot save {printable_path(path)} by reference: {name!r} is stored in few bits (it is a "
                f'{type(tensor).__name__}), and no file of the model has that. Save it with base="included"'
            )
    prints, names_by_place = fingerprints or fingerprints_of(base), dict[Any, str]()
    table: dict[str, Any] = {}
    for name, tensor in base.items():
        first = names_by_place.setdefault(storage_key(tensor), name)
        table[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype),
            "device": str(tensor.device),
            "sha256": prints[name],
            "tied": None if first == name else first,
        }
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        lifted.state_dict[name] = nn.Parameter(meta, requires_grad=False) if _is_parameter(tensor) else meta
    return lifted.finish(), json.dumps({"format": FORMAT, "tensors": table}).encode()


def read_base_table(data: bytes, path: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return the table of a file that was saved by reference. Raises CheckpointError where it is no such table."""
    try:
        table = parse_json(data)
        check_json(table, _TABLE_SCHEMA)
        if table["format"] != FORMAT:
            raise UnsafeFile(f"its format is {table['format']}, and this adaptc reads {FORMAT}")
        tensors: Mapping[str, Mapping[str, Any]] = table["tensors"]
        for name, entry in tensors.items():
            if entry["tied"] is not None and tensors.get(entry["tied"], entry)["tied"] is not None:
                raise UnsafeFile(f"{name!r} is tied to {entry['tied']!r}, which is no weight of the base")
        return tensors
    except UnsafeFile as error:
        raise CheckpointError(
            f"{printable_path(path)}: its table of the base cannot be read: {error}. Save it again from the model"
        ) from error


def names_without_values(program: ExportedProgram) -> list[str]:
    """Return the names of the tensors that only a base can give to ``program``."""
    state: Mapping[str, Any] = program.state_dict
    return [n for n, t in state.items() if isinstance(t, Tensor) and t.device.type == "meta"]


def complete_program(
    program: ExportedProgram, table: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any], path: Path
) -> ExportedProgram:
    """Return ``program`` with the weights of ``given``, which are shared with it, not copied, where they fit as they
    are.

    Raises CheckpointError, with the first weights that differ, where ``given`` is not the base of the ``table``.
    """
    lifted = LiftedProgram(program)
    on_meta = names_without_values(program)
    if wrong := sorted(table.keys() ^ on_meta):
        raise CheckpointError(
            f"{printable_path(path)} is damaged: {wrong[0]!r} is {'missing in' if wrong[0] in on_meta else 'only in'} "
            "its table of the base. Save it again from the model"
        )
    sources = {name: _source_of(name, entry, given) for name, entry in table.items()}
    _check_same_base(table, {n: given.get(source) for n, source in sources.items()}, path)
    for name, entry in table.items():
        like, tensor = lifted.state_dict[name], given[sources[name]].detach().to(entry["device"])
        if tensor.stride() != like.stride():
            laid_out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=tensor.device)
            tensor = laid_out.copy_(tensor)
        lifted.state_dict[name] = nn.Parameter(tensor, requires_grad=False) if _is_parameter(like) else tensor
    return lifted.finish()


def _source_of(name: str, entry: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return the name in ``given`` of the tensor for ``name``: of tied weights files have only one."""
    first = entry["tied"] or name
    return first if first in given else name


def _check_same_base(table: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any], path: Path) -> None:
    problems: list[str] = []
    for name, entry in table.items():
        tensor, shape = given[name], tuple(entry["shape"])
        if tensor is None:
            problems.append(f"{name!r} is missing")
        elif type(tensor) not in (Tensor, nn.Parameter):
            problems.append(f"{name!r} is a {type(tensor).__name__}, expected plain {entry['dtype']}")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name!r} has shape {tuple(tensor.shape)}, expected {shape}")
        elif str(tensor.dtype) != entry["dtype"]:
            problems.append(f"{name!r} is {tensor.dtype}, expected {entry['dtype']}")
    if not problems:  # hashes cost time, and say less than shapes
        prints = fingerprints_of(given)
        problems = [f"{name!r} has other values" for name, entry in table.items() if prints[name] != entry["sha256"]]
    if problems:
        raise CheckpointError(
            f"{printable_path(path)} was saved with another base: {'; '.join(problems[:MAX_LISTED])}"
            f"{and_more(problems)}, of {len(table)} weights. Give the model that the program was made from, in the "
            "same dtype"
        )


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)
