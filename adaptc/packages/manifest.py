"""What a packaged program knows of itself: the manifest inside the ``.pt2`` file, next to the compiled code.

Format: two records added to the archive AOTInductor writes. ``data/extra/adaptc.json`` is the :class:`Manifest`;
``data/adaptc/tensors.safetensors`` holds tensors that follow from the base weights, which cannot be read back from
compiled code (torch's loader reads everything under ``data/extra`` as text, so they lie outside). torch's own loader
ignores both.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isinf
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from adaptc.errors import BackendError, CheckpointError
from adaptc.methods import method_of
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.ops import TABLE, Op
from adaptc.runtime.call_inputs import TensorInput
from adaptc.runtime.rank_padding import Padding

FORMAT = 2
MANIFEST = "data/extra/adaptc.json"
TENSORS = "data/adaptc/tensors.safetensors"


@dataclass(frozen=True)
class Site:
    """An attachment, its op, and the shape and dtype of the base weight as it is stored."""

    attachment: Attachment
    op: Op
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Room:
    """A slot of the compiled code.

    ``padding`` None: values must have exactly ``shape``. ``identity``: the value of every element for which the site is
    the base; None where it follows from the base weight and is stored as a tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    padding: Padding | None = None
    identity: float | None = None


@dataclass(frozen=True)
class Input:
    """A flat input. ``order``: axes from the outermost to the innermost in memory, as the code was compiled for."""

    name: str
    tensor: TensorInput | None
    constant: Any = None
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """``header`` is the program's (``Adaptation.header``); ``bases`` are the base parameters an adapter may replace."""

    device: str
    header: Mapping[str, Any]
    inputs: Sequence[Input]
    ranges: Mapping[str, tuple[float, float]]
    sites: Sequence[Site] = ()
    rooms: Mapping[str, Room] = field(default_factory=dict)
    bases: Sequence[str] = ()
    torch: str = torch.__version__
    format: int = FORMAT


def write(path: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Add the two records to an archive."""
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{MANIFEST}", json.dumps(_data(manifest)))
        if tensors:
            archive.writestr(f"{root}/{TENSORS}", save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}))


def read(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """Raises CheckpointError for files that are missing, damaged or of another kind, BackendError for a package that
    holds compiled code but no manifest."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            root = names[0].partition("/")[0] if names else ""
            if f"{root}/{MANIFEST}" not in names:
                raise _no_manifest(path, names)
            text = archive.read(f"{root}/{MANIFEST}").decode()
            tensors = load(archive.read(f"{root}/{TENSORS}")) if f"{root}/{TENSORS}" in names else {}
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has package format {data['format']}, and this adaptc reads {FORMAT}; package the program again"
            )
        return _manifest(data), tensors
    except (zipfile.BadZipFile, OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is not a packaged program, or is damaged: {first}") from error


def _no_manifest(path: Path, names: Sequence[str]) -> BackendError | CheckpointError:
    if any("/data/aotinductor/" in n for n in names):
        return BackendError(
            f"{path} was packaged without adaptc, so nothing in it says where adapters go. Run it with "
            "torch._inductor.aoti_load_package, or package the adapted program with adaptc.package."
        )
    if any("/models/" in n for n in names):
        return CheckpointError(f"{path} is an exported program, not a package; open it with adaptc.load")
    return CheckpointError(f"{path} is an archive, but not one that adaptc.package wrote")


def _data(m: Manifest) -> dict[str, Any]:
    """A manifest as plain JSON values; :func:`_manifest` is the inverse."""
    plain = {f.name: getattr(m, f.name) for f in dataclasses.fields(m)}
    return plain | {
        "inputs": [_strings(dataclasses.asdict(i)) for i in m.inputs],
        "ranges": {k: [None if isinf(v) else int(v) for v in bounds] for k, bounds in m.ranges.items()},
        "sites": [_site_data(s) for s in m.sites],
        "rooms": {k: _strings(dataclasses.asdict(r)) for k, r in m.rooms.items()},
        "bases": list(m.bases),
    }


def _strings(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _strings(v) for k, v in value.items()}
    return str(value) if isinstance(value, torch.dtype) else value


def _site_data(site: Site) -> dict[str, Any]:
    op = site.op
    return {
        "attachment": site.attachment.to_dict(),
        "op": {"kind": op.kind, "shape": op.shape, "target": op.target and str(op.target), "rest": op.rest},
        "shape": site.shape,
        "dtype": str(site.dtype),
    }


def _manifest(data: Mapping[str, Any]) -> Manifest:
    return Manifest(
        device=data["device"],
        header=data["header"],
        inputs=[_input(i) for i in data["inputs"]],
        ranges={
            k: (-inf if low is None else low, inf if up is None else up) for k, (low, up) in data["ranges"].items()
        },
        sites=[_site(s) for s in data["sites"]],
        rooms={k: _room(r) for k, r in data["rooms"].items()},
        bases=data["bases"],
        torch=data["torch"],
    )


def _input(data: Mapping[str, Any]) -> Input:
    t = data["tensor"]
    tensor = None if t is None else TensorInput(_dtype(t["dtype"]), tuple(t["shape"]))
    return Input(data["name"], tensor, data["constant"], tuple(data["order"]))


def _room(data: Mapping[str, Any]) -> Room:
    padding = None if data["padding"] is None else Padding(**data["padding"])
    return Room(tuple(data["shape"]), _dtype(data["dtype"]), padding, data["identity"])


def _site(data: Mapping[str, Any]) -> Site:
    a = Attachment.from_dict(data["attachment"], method_of)
    op = data["op"]
    target = None if op["target"] is None else _TARGETS[op["target"]]
    return Site(
        a, Op(op["kind"], tuple(op["shape"]), target, _tuples(op["rest"])), tuple(data["shape"]), _dtype(data["dtype"])
    )


_TARGETS = {str(target): target for target in TABLE}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found
