"""Hold the adapters that lie by name in the file of a program or a package, and find an adapter by its name.

In the archive each adapter is the PEFT directory that ``adaptc.save_adapter`` would write, file by file, without the
model card. An index lists the files of each. So the readers and writers of directories read and write these, too.

A text that is the name of an adapter means that adapter, whatever lies on the disk. Any other text is a path, and so is
every ``Path``. Thus a call means the same in every working directory.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptc.adapter_files.adapter_data import LoadedAdapter
from adaptc.adapter_files.directory import check_finite
from adaptc.adapter_files.load import load
from adaptc.archives.added_files import ADAPTERS_FOLDER, ADAPTERS_INDEX, CERTIFICATE_FILE, check_file_name, is_file_name
from adaptc.archives.certificate import Certificate
from adaptc.archives.json_schema import DictOf, Nullable, check_json
from adaptc.archives.names import parse_json
from adaptc.archives.refusal import UnsafeFile, describe_error
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError, SwapError, did_you_mean, listing, short_repr

#: the schema of the index: the files of each adapter, the directory that is the adapter, the fingerprint of its base
_INDEX_SCHEMA = DictOf({"files": [str], "directory": str, "base": Nullable(str)})
_WAY_OUT = "Save the program again, with its adapters"


@dataclass(frozen=True, eq=False)
class StoredAdapters(Mapping[str, LoadedAdapter]):
    """Adapters by name, as they were read from the file of a program; iterating yields the names.

    ``base`` is the fingerprint of the base that the file is for, None where it is not known. With ``is_strict`` an
    adapter of another base is refused, else it is warned of.
    """

    adapters: Mapping[str, LoadedAdapter] = field(default_factory=dict[str, LoadedAdapter])
    base: str | None = None
    is_strict: bool = False

    def __getitem__(self, name: str) -> LoadedAdapter:
        return self.adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    def __repr__(self) -> str:
        return f"StoredAdapters({listing(map(repr, self.adapters))})"

    def find(self, source: Any, options: Mapping[str, Any]) -> LoadedAdapter | None:
        """Return the adapter that ``source`` names; None where it names none, and is a path or something else.

        Raises ConfigError for ``options`` that are for files, by name. Raises SwapError for a text that is neither a
        name nor a path.
        """
        if not isinstance(source, str):
            return None
        if source in self.adapters:
            if said := [name for name, value in options.items() if value is not None]:
                raise ConfigError(
                    f"{said[0]} is for files and state dicts, and {source!r} is an adapter of the program's own file: "
                    f"leave it out, or give Path({source!r}) for what lies there on the disk"
                )
            return self.adapters[source]
        if self.adapters and not os.path.lexists(source) and os.path.basename(source) == source:
            raise SwapError(
                f"there is no adapter {short_repr(source)}: the program's file has "
                f"{listing(map(repr, self.adapters))}{did_you_mean(source, self.adapters)}; nor is there such a path"
            )
        return None

    def check_base(self, adapter: LoadedAdapter) -> None:
        """Warn of an adapter that was stored for another base. Raises CheckpointError for it where that is asked."""
        if self.base is None or adapter.base_fingerprint in (None, self.base):
            return
        message = (
            f"{adapter.source} was stored with the base {adapter.base_fingerprint[:12]}, and the certificate of this "
            f"program is of the base {self.base[:12]}: train it for this base, or use it with its own"
        )
        if self.is_strict:
            raise CheckpointError(message)
        warnings.warn(message, AdaptcWarning, stacklevel=4)


def check_adapter_name(name: Any) -> str:
    """Return the name of an adapter that goes into a file. Raises ConfigError for what can be none."""
    if not isinstance(name, str) or not is_file_name(name):
        raise ConfigError(
            f"{short_repr(name)} cannot be the name of an adapter in a file: expected a short text without slashes, "
            "colons and control characters, which does not begin with a dot"
        )
    return name


def read_stored_adapters(files: Mapping[str, bytes], path: Path, is_strict: bool = False) -> StoredAdapters:
    """Return the adapters in the added ``files`` of the archive at ``path``, in memory of their own.

    The certificate among the files says what their base is. Raises CheckpointError where it is damaged. It does so too,
    with the name of the adapter, where one is damaged, lacks a file, or is for another base and ``is_strict``.
    """
    try:
        data = files.get(CERTIFICATE_FILE)
        base = None if data is None else Certificate.parse(data).base["sha256"]
    except UnsafeFile as error:
        raise CheckpointError(f"{path}: its certificate cannot be read: {error}. {_WAY_OUT}") from error
    own = {n: data for n, data in files.items() if n == ADAPTERS_INDEX or n.startswith(ADAPTERS_FOLDER)}
    if not own:
        return StoredAdapters({}, base, is_strict)
    index = _read_index(own, path)
    known = {f"{ADAPTERS_FOLDER}{name}/{file}" for name, entry in index.items() for file in entry["files"]}
    if strange := sorted(own.keys() - known - {ADAPTERS_INDEX}):
        adapter = strange[0].removeprefix(ADAPTERS_FOLDER).partition("/")[0]
        raise CheckpointError(
            f"{path}: the adapter {adapter!r} has {strange[0]!r}, which {ADAPTERS_INDEX} does not list. {_WAY_OUT}"
        )
    adapters: dict[str, LoadedAdapter] = {}
    with tempfile.TemporaryDirectory(prefix="adaptc-") as folder:
        for name, entry in index.items():
            try:
                adapters[name] = _read_one(own, name, entry, Path(folder), path)
            except CheckpointError as error:
                problem = str(error).replace(folder, "")
                raise CheckpointError(f"{path}: the adapter {name!r} cannot be read: {problem}") from error
            except (UnsafeFile, OSError, ConfigError) as error:
                problem = str(error) if isinstance(error, (UnsafeFile, ConfigError)) else describe_error(error)
                raise CheckpointError(f"{path}: the adapter {name!r} cannot be read: {problem}. {_WAY_OUT}") from error
    stored = StoredAdapters(adapters, base, is_strict)
    for adapter in adapters.values():
        stored.check_base(adapter)
    return stored


def _read_index(files: Mapping[str, bytes], path: Path) -> Mapping[str, Any]:
    try:
        if ADAPTERS_INDEX not in files:
            named = sorted({n.removeprefix(ADAPTERS_FOLDER).partition("/")[0] for n in files})
            raise UnsafeFile(f"there is no {ADAPTERS_INDEX}, which lists the adapters {listing(map(repr, named))}")
        index = parse_json(files[ADAPTERS_INDEX])
        check_json(index, _INDEX_SCHEMA)
        for name, entry in index.items():
            check_file_name(name, "the adapter")
            for part in (part for file in entry["files"] for part in file.split("/")):
                check_file_name(part, f"the adapter {name!r} has a file that")
            if entry["directory"]:
                check_file_name(entry["directory"], f"the adapter {name!r} has a directory that")
        return index
    except UnsafeFile as error:
        raise CheckpointError(f"{path}: its adapters cannot be read: {ADAPTERS_INDEX}: {error}. {_WAY_OUT}") from error


def _read_one(
    files: Mapping[str, bytes], name: str, entry: Mapping[str, Any], folder: Path, path: Path
) -> LoadedAdapter:
    root = folder / str(len(list(folder.iterdir())))  # a name may be none that this disk takes
    root.mkdir()
    for file in entry["files"]:
        data = files.get(f"{ADAPTERS_FOLDER}{name}/{file}")
        if data is None:
            raise UnsafeFile(f"the file has no {file!r} of it")
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(data)
    found = load(root / entry["directory"])
    check_finite(found.tensors, f"the adapter {name!r}")
    source = f"{name} ({path.name})"
    return replace(found, source=source, path=None, is_shared=True, base_fingerprint=entry["base"])
