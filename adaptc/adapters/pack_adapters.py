"""Make of adapters by name the files that a program's own file holds them in.

Each adapter is bound to the program first, so one that does not fit is refused before anything is written. What is
written is the adapter as its source has it: its own rank, dtype and config. Adapters of other formats than PEFT's, and
adapters in programs, are written as ``adaptc.save_adapter`` writes them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptc.adapter_files.adapter_data import PEFT_KEYS, LoadedAdapter
from adaptc.adapter_files.directory import read_config
from adaptc.adapter_files.format import MODEL_CARD_NAME
from adaptc.adapter_files.load import has_tensors, load
from adaptc.adapters.adapter import Adapter, adapter_of_data
from adaptc.adapters.from_program import adapter_of_program
from adaptc.archives.added_files import ADAPTERS_FOLDER, ADAPTERS_INDEX
from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding
from adaptc.binding.sources.configs import loaded_config
from adaptc.binding.stored_adapters import check_adapter_name
from adaptc.errors import ConfigError, errors_name, short_repr
from adaptc.methods import AdapterConfig
from adaptc.state.core import ProgramCore


@dataclass(frozen=True)
class PackedAdapters:
    """The files that hold adapters by name, and each adapter bound to the program that they are for."""

    files: Mapping[str, bytes]
    bindings: Mapping[str, Binding]


def pack_adapters(program: ProgramCore, adapters: Any, base: str | None) -> PackedAdapters:
    """Return the added files for ``adapters`` by name, which may be anything that ``program`` can be swapped to.

    None stands for the adapters that the program has from its own file. ``base`` is the fingerprint of the program's
    base. Raises ConfigError for names and adapters that no file can hold. Raises what a swap raises for an adapter that
    does not fit, with its name.
    """
    if adapters is None:
        adapters = {name: name for name in program.adapters}
    if not isinstance(adapters, Mapping):
        raise ConfigError(f"adapters={short_repr(adapters)} must be a dict of adapters by name")
    if not adapters:
        return PackedAdapters({}, {})
    if program.current is None:
        raise ConfigError("the program has no adapter sites: adapters= is for programs with an adapter, before a merge")
    if program.current.joint_adapters:
        raise ConfigError(
            f"several adapters act together in this program, {list(program.current.joint_adapters)}, and those of a "
            "file act one at a time: compile the model for one of them, or leave them out of the file, adapters={}"
        )
    files: dict[str, dict[str, bytes]] = {}
    facts: dict[str, dict[str, Any]] = {}
    bindings: dict[str, Binding] = {}
    with tempfile.TemporaryDirectory(prefix="adaptc-") as folder:
        for number, (name, source) in enumerate(adapters.items()):
            check_adapter_name(name)
            with errors_name(name):
                adapter, bindings[name], of_base = _as_written(program, source)
                _check_complete(adapter.config)
                written = adapter.write(Path(folder) / str(number))
                _check_complete(loaded_config(read_config(written)))
            root = Path(folder) / str(number)
            paths = [p for p in sorted(root.rglob("*")) if p.is_file() and p.name != MODEL_CARD_NAME]
            files[name] = {p.relative_to(root).as_posix(): p.read_bytes() for p in paths}
            directory = "" if written == root else written.name
            facts[name] = {"directory": directory, "base": of_base or base}
    packed = {f"{ADAPTERS_FOLDER}{name}/{file}": data for name, own in files.items() for file, data in own.items()}
    index = {name: {"files": sorted(contents), **facts[name]} for name, contents in files.items()}
    return PackedAdapters({ADAPTERS_INDEX: json.dumps(index).encode(), **packed}, bindings)


def _as_written(program: ProgramCore, source: Any) -> tuple[Adapter, Binding, str | None]:
    """Return the adapter that ``source`` is, bound too, and the fingerprint of the base it was stored for, if known."""
    data: LoadedAdapter | None = program.adapters.find(source, {})
    if data is None and has_tensors(source):
        data = load(source)
    bound = bind_adapter(program, source if data is None else data)
    base = None if data is None else data.base_fingerprint
    if data is not None and data.format == PEFT_KEYS:
        return adapter_of_data(data), bound, base
    return adapter_of_program(program, bound), bound, base


def _check_complete(config: AdapterConfig) -> None:
    """Raise ConfigError for an adapter whose config refers to other directories by their paths."""
    if config.expert_paths():
        raise ConfigError(
            "an X-LoRA adapter is several directories, which a program's file does not hold by name. Compile the "
            "program for it, and save that"
        )
