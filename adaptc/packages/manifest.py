"""Read and write the manifest of a packaged program, which lies in the ``.pt2`` file beside the compiled code.

The format adds records to the archive that AOTInductor writes. ``data/extra/adaptc.json`` is the :class:`Manifest`.
``data/adaptc/tensors.safetensors`` holds tensors that cannot be read back from compiled code. They are the adapter that
the package was made with, and tensors made from base weights. They lie outside ``data/extra``, where torch's loader
reads every record as text. ``data/adaptc/carried`` has files that are not of the program itself, such as a tokenizer.
torch's own loader ignores all of these records.

The manifest has the sha256 of every other record, and one of itself. So a package that was damaged or edited is refused
before its code is loaded. That is no signature: whoever forges a package can forge the hashes, and its code runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import zipfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf, isinf
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from adaptc.archives.added_files import ADDED_FOLDER, AddedFiles, read_added_files
from adaptc.archives.archive import ADDED_RECORD_PATTERN, Archive, no_package_error, open_archive
from adaptc.archives.certificate import hash_code
from adaptc.archives.json_schema import DictOf, Nullable, OptionalField, Size, check_json
from adaptc.archives.names import parse_json
from adaptc.archives.refusal import UnsafeFile, describe_error, printable_path, short_repr
from adaptc.errors import AdaptcError, BackendError, CheckpointError
from adaptc.program.files.stored_sites import SITE_SCHEMA, StoredSite, parse_dtype, parse_site, site_data
from adaptc.runtime.calls.call_inputs import TensorInput
from adaptc.runtime.rank_padding import Padding
from adaptc.state.adaptation import check_header
from adaptc.torch_typing import is_dict

FORMAT = 4
MANIFEST = "data/extra/adaptc.json"
TENSORS = "data/adaptc/tensors.safetensors"
FILES_PREFIX = "data/adaptc/carried/"
#: the name of the model in a package of one model, and the pattern of the names of parts
SINGLE_MODEL = "model"
_MODEL_PATTERN = "[a-z]{1,32}"

_MAX_JSON_BYTES = 64 << 20
#: the pattern of the path of a package file: no part of it begins with a dot
_FILE_PATTERN = r"\w[\w.\-]*(/\w[\w.\-]*){0,3}"
# The records that a package may have. torch would unpickle programs and weights that lie beside its code.
_RECORD_PATTERN = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/[\w.]+|\.format_version|\.storage_alignment"
    rf"|data/aotinductor/{_MODEL_PATTERN}/[\w.\-]+"
    r"|data/adaptc/tensors\.safetensors"
    rf"|{FILES_PREFIX}{_FILE_PATTERN}|{ADDED_RECORD_PATTERN}",
    re.ASCII,
)


@dataclass(frozen=True)
class SlotCapacity:
    """The capacity of the compiled code for one slot.

    Values are padded to ``shape`` by ``padding``; where that is None they must have exactly this shape. Where every
    element is ``identity``, the site computes the base. None means that no single value does, so a tensor is stored if
    there is one. ``unread`` says that the code reads no such slot. Then an adapter's values keep their own size (see
    ``passes.lower.unused_slots``).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    padding: Padding | None = None
    identity: float | None = None
    unread: bool = False


@dataclass(frozen=True)
class Input:
    """A flat input: a ``tensor``, or None for an input that was captured as the Python value ``constant``.

    ``order`` has the axes from the outermost to the innermost in memory, as the code was compiled for. ``written``
    says that the code writes to the input. ``bounds`` are the least and the greatest number that it may hold: for
    others the code would end the process. None means any number.
    """

    name: str
    tensor: TensorInput | None
    constant: Any = None
    order: tuple[int, ...] = ()
    written: bool = False
    bounds: tuple[int, int] | None = None


@dataclass(frozen=True)
class PackagedPart:
    """A part of the program, a model of the package that is called by itself.

    It has its flat inputs, the ``ranges`` and ``guards`` of their sizes as a whole program has them, and the names of
    its outputs.
    """

    inputs: Sequence[Input]
    ranges: Mapping[str, tuple[float, float]]
    guards: Sequence[str] = ()
    outputs: Sequence[str] = ()


@dataclass(frozen=True)
class Manifest:
    """The facts of a packaged program that its compiled code does not tell.

    ``header`` is the program's (``Adaptation.header``). ``ranges`` has the least and the greatest value of each free
    size. ``rooms`` has the capacity for each slot and scale, by FQN. ``bases`` are the FQNs of base parameters that an
    adapter may replace. ``parts`` has the models that make up the program, by name and in the order of its outputs; it
    is empty where the program is one model.
    """

    device: str
    header: Mapping[str, Any]
    inputs: Sequence[Input]
    ranges: Mapping[str, tuple[float, float]]
    sites: Sequence[StoredSite] = ()
    rooms: Mapping[str, SlotCapacity] = field(default_factory=dict[str, SlotCapacity])
    bases: Sequence[str] = ()
    #: conditions on sizes that the compiled code relies on, beside ``ranges``
    guards: Sequence[str] = ()
    #: the kinds of matmul that compute the base, as ``Products.data`` gives them
    products: Sequence[Mapping[str, Any]] = ()
    #: "count", how many adapters a bank has room for, and "names", of those in it, by place; None for no bank
    bank: Mapping[str, Any] | None = None
    parts: Mapping[str, PackagedPart] = field(default_factory=dict[str, PackagedPart])
    torch: str = torch.__version__
    format: int = FORMAT


@dataclass(frozen=True)
class Contents:
    """The contents of a package beside its code.

    ``package_files`` maps paths to the bytes of files that whoever wrote the package added, and that nothing here
    reads.
    """

    manifest: Manifest
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    package_files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    #: such as adapters by name
    added: AddedFiles = field(default_factory=AddedFiles)


def write(path: Path, contents: Contents) -> None:
    """Add the records of ``contents`` to an archive that AOTInductor wrote."""
    with open_archive(path) as archive:
        root, hashes = archive.root, {name: archive.sha256(name) for name in archive.records}
    with zipfile.ZipFile(path, "a") as writer:
        records = {FILES_PREFIX + name: data for name, data in contents.package_files.items()}
        added_files = contents.added.complete(lambda: hash_code(hashes))
        records |= {ADDED_FOLDER + name: data for name, data in added_files.items()}
        if contents.tensors:
            records[TENSORS] = save({k: t.detach().cpu().contiguous() for k, t in contents.tensors.items()})
        for name, data in records.items():
            hashes[name] = hashlib.sha256(data).hexdigest()
            writer.writestr(f"{root}/{name}", data)
        plain = _manifest_data(contents.manifest) | {"hashes": hashes}
        writer.writestr(f"{root}/{MANIFEST}", json.dumps(plain | {"sha256": _digest(plain)}))


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def is_package_file_name(name: str) -> bool:
    """Return whether a file may have this path in a package."""
    return re.fullmatch(_FILE_PATTERN, name, re.ASCII) is not None


def read(path: Path) -> Contents:
    """Return the contents of a package, after comparing every record with its hash.

    Raises CheckpointError for files that are missing, damaged or of another kind. Raises BackendError for a package
    that holds compiled code but no manifest.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {printable_path(path)}")
    with as_checkpoint_errors(path), open_archive(path) as archive:
        return _read(path, archive)


@contextmanager
def as_checkpoint_errors(path: Path) -> Generator[None]:
    """Run the block with every error turned into a CheckpointError that names the file, BackendError excepted."""
    try:
        yield
    except (CheckpointError, BackendError):
        raise
    except Exception as error:  # a forged file can break any reader of its fields
        why = str(error) if isinstance(error, (UnsafeFile, AdaptcError)) else describe_error(error)
        raise CheckpointError(
            f"{printable_path(path)} is not a packaged program, or is damaged: {why}. Package or download it again"
        ) from error


def _read(path: Path, archive: Archive) -> Contents:
    if MANIFEST not in archive.records:
        raise no_package_error(path, list(archive.records))
    data = parse_json(
        archive.read_record(MANIFEST, _MAX_JSON_BYTES), allow_nan=True
    )  # an input may be the constant inf
    if not is_dict(data) or "format" not in data:
        raise UnsafeFile("its manifest has no format number")
    if data["format"] != FORMAT:
        raise CheckpointError(
            f"{printable_path(path)} has package format {short_repr(data['format'])}, and this adaptc reads {FORMAT}; "
            "package the program again"
        )
    digest = data.pop("sha256", None)
    try:
        check_json(data, MANIFEST_SCHEMA)
    except UnsafeFile as error:
        raise error.prepend_location(f"record {MANIFEST!r}, ") from None
    if digest != _digest(data):
        raise UnsafeFile(f"record {MANIFEST!r} does not have the hash that it says: it was changed or is damaged")
    _check_records(archive, data.pop("hashes"))
    tensors = load(archive.read_record(TENSORS, archive.size)) if TENSORS in archive.records else {}
    manifest = _parse_manifest(data)
    _check_sites(manifest)
    _check_parts(manifest, archive.records)
    names = [name for name in archive.records if name.startswith(FILES_PREFIX)]
    files = {n.removeprefix(FILES_PREFIX): archive.read_record(n, archive.size) for n in names}
    return Contents(manifest, tensors, files, AddedFiles(read_added_files(archive)))


def _check_sites(manifest: Manifest) -> None:
    """Raise UnsafeFile where sites, capacities, bank and header of a manifest do not fit one another.

    A forged option that is no number, for example, gives slots without sizes.
    """
    for s in manifest.sites:
        a = s.attachment
        slots = a.method.slots(s.op)
        if slots.keys() != a.slots.keys() or any(type(n) is not int for v in slots.values() for n in v.shape):
            raise UnsafeFile(f"the options of the site {a.fqn!r} do not give its slots")
        if missing := [fqn for fqn in a.tensor_names if fqn not in manifest.rooms]:
            raise UnsafeFile(f"the site {a.fqn!r} has no room for {missing[0]!r}")
    if manifest.bank is not None:
        names, room = manifest.bank["names"], manifest.bank["count"]
        if len(set(names)) != len(names) or len(names) > room or not manifest.sites:
            raise UnsafeFile(f"its bank has room for {room} adapters, and has {short_repr(names)}")
    if manifest.sites:
        check_header(manifest.header, [s.attachment.id for s in manifest.sites])
    else:  # of a merged or unloaded program
        check_json(manifest.header, {"fills": DictOf([str]), "takes": OptionalField([str])})


def _check_parts(manifest: Manifest, records: Iterable[str]) -> None:
    """Raise UnsafeFile where the archive has code of other models than the parts, or a part has an unknown input."""
    model_by_record = {name: name.split("/")[2] for name in records if name.startswith("data/aotinductor/")}
    expected_models = set(manifest.parts) or {SINGLE_MODEL}
    if strange := sorted(name for name, model in model_by_record.items() if model not in expected_models):
        raise UnsafeFile(f"record {strange[0]!r} is none that a package has")
    if missing := sorted(expected_models - set(model_by_record.values())):
        raise UnsafeFile(f"it has no code of {missing[0]!r}")
    names = {i.name for i in manifest.inputs}
    for part in manifest.parts.values():
        if strange := sorted({i.name for i in part.inputs} - names):
            raise UnsafeFile(f"a part takes {strange[0]!r}, which is no input of the whole")


def _check_records(archive: Archive, hashes: Mapping[str, str]) -> None:
    others = archive.records.keys() - {MANIFEST}
    for name in sorted(others ^ hashes.keys()):
        raise UnsafeFile(f"record {name!r} is {'not in its manifest' if name in others else 'missing'}")
    for name in sorted(others):
        if not _RECORD_PATTERN.fullmatch(name):
            raise UnsafeFile(f"record {name!r} is none that a package has")
        if archive.sha256(name) != hashes[name]:
            raise UnsafeFile(f"record {name!r} does not have the hash of the manifest: it was changed or is damaged")


def _manifest_data(m: Manifest) -> dict[str, Any]:
    """Return a manifest as plain JSON values; :func:`_parse_manifest` is the inverse."""
    plain = {f.name: getattr(m, f.name) for f in dataclasses.fields(m)}
    return plain | {
        **_signature_data(m),
        "sites": [site_data(s) for s in m.sites],
        "rooms": {k: _capacity_data(r) for k, r in m.rooms.items()},
        "bases": list(m.bases),
        "parts": {name: {**_signature_data(p), "outputs": list(p.outputs)} for name, p in m.parts.items()},
    }


def _signature_data(m: PackagedPart | Manifest) -> dict[str, Any]:
    return {
        "inputs": [_dtypes_to_strings(dataclasses.asdict(i)) for i in m.inputs],
        "ranges": {k: [None if isinf(v) else int(v) for v in bounds] for k, bounds in m.ranges.items()},
        "guards": list(m.guards),
    }


def _capacity_data(room: SlotCapacity) -> dict[str, Any]:
    """Return a capacity as plain JSON values. ``unread`` is written only where it is True, so older files stay the
    same."""
    plain = _dtypes_to_strings(dataclasses.asdict(room))
    return plain if room.unread else {k: v for k, v in plain.items() if k != "unread"}


def _dtypes_to_strings(value: Any) -> Any:
    if is_dict(value):
        return {k: _dtypes_to_strings(v) for k, v in value.items()}
    return str(value) if isinstance(value, torch.dtype) else value


def _parse_manifest(data: Mapping[str, Any]) -> Manifest:
    return Manifest(
        device=data["device"],
        header=data["header"],
        **_parse_signature(data),
        parts={
            name: PackagedPart(**_parse_signature(p), outputs=p["outputs"]) for name, p in data.get("parts", {}).items()
        },
        sites=[parse_site(s) for s in data["sites"]],
        rooms={k: _parse_capacity(r) for k, r in data["rooms"].items()},
        bases=data["bases"],
        products=data.get("products", ()),
        bank=data.get("bank"),
        torch=data["torch"],
    )


def _parse_signature(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs, ranges and guards of a model, from its entry in a manifest."""
    ranges = {k: (-inf if low is None else low, inf if up is None else up) for k, (low, up) in data["ranges"].items()}
    return {"inputs": [_parse_input(i) for i in data["inputs"]], "ranges": ranges, "guards": data.get("guards", ())}


def _parse_input(data: Mapping[str, Any]) -> Input:
    t = data["tensor"]
    # torch writes some fixed sizes as expressions, where tracing found out late that they are fixed.
    shape = [] if t is None else [int(n) if isinstance(n, str) and n.isdecimal() else n for n in t["shape"]]
    tensor = None if t is None else TensorInput(parse_dtype(t["dtype"]), tuple(shape))
    bounds = None if data.get("bounds") is None else (int(data["bounds"][0]), int(data["bounds"][1]))
    return Input(data["name"], tensor, data["constant"], tuple(data["order"]), data.get("written", False), bounds)


def _parse_capacity(data: Mapping[str, Any]) -> SlotCapacity:
    padding = None if data["padding"] is None else Padding(**data["padding"])
    return SlotCapacity(
        tuple(data["shape"]), parse_dtype(data["dtype"]), padding, data["identity"], data.get("unread", False)
    )


_SIGNATURE_SCHEMA: dict[str, Any] = {
    "inputs": [
        {
            "name": str,
            "tensor": Nullable({"dtype": str, "shape": [(Size, str)]}),
            "constant": object,
            "order": [Size],
            "written": OptionalField(bool),
            "bounds": OptionalField(Nullable([int])),
        }
    ],
    "ranges": DictOf([Nullable(int)]),
    "guards": OptionalField([str]),
}
#: the form of a manifest; a form is a type, a list of one form, or an object of exactly these fields
MANIFEST_SCHEMA: dict[str, Any] = {
    "format": Size,
    "device": str,
    "torch": str,
    "header": dict,  # see adaptc.state.adaptation
    **_SIGNATURE_SCHEMA,
    "parts": OptionalField(DictOf({**_SIGNATURE_SCHEMA, "outputs": [str]})),
    "sites": [SITE_SCHEMA],
    "rooms": DictOf(
        {
            "shape": [Size],
            "dtype": str,
            "padding": Nullable({"blocks": Size, "fill": (int, float)}),
            "identity": Nullable((int, float, bool)),
            "unread": OptionalField(bool),
        }
    ),
    "bases": [str],
    "products": OptionalField([{"kind": str, "rows": str, "why": str, "count": Size}]),
    "bank": OptionalField(Nullable({"count": Size, "names": [str]})),
    "hashes": DictOf(str),
}
