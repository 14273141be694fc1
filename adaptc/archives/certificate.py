"""Hold the certificate of a file: what it is made of, and how near it was measured to be to what it stands for.

A certificate is JSON in the archive of a program or a package. ``examples/deploying.md`` lists its fields. It says what
was in the file when it was written. It is no signature: whoever changes a file can write another certificate.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptc.archives.added_files import CERTIFICATE_FILE, read_added_file
from adaptc.archives.archive import MODEL_RECORD, Archive, open_archive
from adaptc.archives.json_schema import DictOf, Nullable, Size, check_json
from adaptc.archives.names import parse_json
from adaptc.archives.refusal import UnsafeFile, printable_path
from adaptc.errors import CheckpointError
from adaptc.public_names import VERSION
from adaptc.tables import Column, Report, Table, format_error_or_dash

FORMAT = 1
_MAX_GRAPH_BYTES = 128 << 20
_CODE_FOLDER = "data/aotinductor/"
_ADAPTER_SCHEMA: dict[str, Any] = {"config": dict, "sha256": str}
_NUMBER = Nullable((int, float))
_CHECK_SCHEMA = {
    "name": str,
    "passed": Nullable(bool),
    **dict.fromkeys(["error", "relative", "limit"], _NUMBER),
    **dict.fromkeys(["where", "note"], str),
}
_SCHEMA: dict[str, Any] = {
    "format": Size,
    "versions": DictOf(Nullable(str)),
    "base": {"sha256": str, "weights": Size, "changed": [str]},
    "graph": {"sha256": str, "of": str},
    "current": DictOf(_ADAPTER_SCHEMA),
    "adapters": DictOf(_ADAPTER_SCHEMA | {"base": Nullable(str)}),
    "measured": Nullable({"seed": int, "shapes": Size, "atol": _NUMBER, "runs": [str], "checks": [_CHECK_SCHEMA]}),
}


@dataclass(frozen=True, repr=False)
class Certificate(Report):
    """The certificate of a file, with the fields of its JSON; :meth:`to_dict` has them all.

    ``versions``: package -> version, None where it was not installed. ``base``: the fingerprint of the base, the number
    of its weights, and the names of weights that the adapter changed. ``graph``: the hash of the graph or of the
    compiled code. ``current`` and ``adapters``: name -> config and hash, of the adapters that act and of those in the
    file. ``measured``: the seed, the shapes and the checks of ``adaptc.verify``; None where nothing was measured.
    """

    ROWS = ("measured", "checks")

    versions: Mapping[str, str | None]
    base: Mapping[str, Any]
    graph: Mapping[str, Any]
    current: Mapping[str, Any]
    adapters: Mapping[str, Any]
    measured: Mapping[str, Any] | None = None
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """Return the JSON of the certificate."""
        return json.dumps(self.to_dict(), indent=1).encode()

    @classmethod
    def parse(cls, data: bytes) -> Certificate:
        """Return the certificate in a JSON text. Raises UnsafeFile where it is none."""
        try:
            found = parse_json(data)
            check_json(found, _SCHEMA)
            if found["format"] != FORMAT:
                raise UnsafeFile(f"expected format {FORMAT}, found {found['format']}")
        except UnsafeFile as error:
            raise error.prepend_location(f"{CERTIFICATE_FILE}, ") from None
        return cls(**found)

    def sections(self) -> list[str | Table]:
        """Return the facts as lines, and the measured checks as a table."""
        versions = ", ".join(f"{name} {version or '(none)'}" for name, version in self.versions.items())
        changed = f", {len(self.base['changed'])} more changed by the adapter" if self.base["changed"] else ""
        lines = [
            f"certificate: base {self.base['sha256'][:16]} ({self.base['weights']} weights{changed})",
            f"{self.graph['of']} {self.graph['sha256'][:16]}",
            f"adapters: {', '.join([*self.current, *(repr(n) for n in self.adapters)]) or 'none'}",
            versions,
        ]
        if self.measured is None:
            return ["\n".join([*lines, "nothing was measured: adaptc certify PATH does"])]
        numbers = ("error", "relative", "limit")
        rows = [
            (c["name"], *(format_error_or_dash(float("nan") if c[n] is None else c[n]) for n in numbers), c["note"])
            for c in self.measured["checks"]
        ]
        columns = [Column("measured", no_wrap=True), *(Column(n, right=True, no_wrap=True) for n in numbers), "note"]
        runs = "\n".join(f"run {i}: {text}" for i, text in enumerate(self.measured["runs"], 1))
        return ["\n".join([*lines, f"measured with seed {self.measured['seed']}", runs]), Table(columns, rows)]

    def values(self) -> dict[str, Any]:
        """Return the fields of the certificate's JSON."""
        return dict(vars(self))


def read_certificate(path: Path) -> Certificate | None:
    """Return the certificate in the archive at ``path``, or None where it has none.

    Raises CheckpointError where the file is no archive, or the certificate is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {printable_path(path)}")
    try:
        with open_archive(path) as archive:
            data = read_added_file(archive, CERTIFICATE_FILE)
            return None if data is None else Certificate.parse(data)
    except (UnsafeFile, OSError) as error:
        raise CheckpointError(
            f"{printable_path(path)}: its certificate cannot be read: {error}. Save the program again, or write "
            "another one with adaptc certify"
        ) from error


def installed_versions() -> dict[str, str | None]:
    """Return the versions that a certificate names, without importing transformers."""
    try:
        transformers = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        transformers = None
    return {"adaptc": VERSION, "torch": str(torch.__version__), "transformers": transformers}


def hash_graph(archive: Archive) -> dict[str, str]:
    """Return the hash of the nodes of the program's graph in an archive: operators, arguments and names.

    What nodes say of their origin and of adapters is left out. Raises UnsafeFile where the graph cannot be read.
    """
    data = parse_json(archive.read_record(MODEL_RECORD, _MAX_GRAPH_BYTES))
    try:
        graph = data["graph_module"]["graph"]
        parts = [_without_metadata(graph[key]) for key in ("inputs", "nodes", "outputs")]
    except (KeyError, TypeError, IndexError) as error:
        raise UnsafeFile(f"record {MODEL_RECORD!r} has no graph") from error
    return {"sha256": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), "of": "graph"}


def hash_code(hashes: Mapping[str, str]) -> dict[str, str]:
    """Return the hash of compiled code, from the sha256 of each record of a package."""
    lines = (f"{name}\n{value}\n" for name, value in sorted(hashes.items()) if name.startswith(_CODE_FOLDER))
    return {"sha256": hashlib.sha256("".join(lines).encode()).hexdigest(), "of": "code"}


def hash_files(files: Mapping[str, bytes]) -> str:
    """Return one hash of files by name."""
    lines = (f"{name}\n{hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _without_metadata(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_metadata(v) for k, v in value.items() if k != "metadata"}
    return [_without_metadata(v) for v in value] if isinstance(value, list) else value
