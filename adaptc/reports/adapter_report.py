"""Report what an adapter directory or file holds, without a model: its config and its tensors."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from adaptc.adapter_files.adapter_data import PEFT_KEYS, LoadedAdapter
from adaptc.adapter_files.foreign_file import has_peft_prefix
from adaptc.adapter_files.formats.detect import detect_format
from adaptc.adapter_files.load import load
from adaptc.tables import Column, Report, Table, collapse_paths, dtype_name, format_bytes, with_count


@dataclass(frozen=True, repr=False)
class AdapterReport(Report):
    """A report of one adapter's files. ``tensors``: key without PEFT's prefix -> (shape, dtype). ``config``: the fields
    that are set to anything."""

    ROWS = ("tensors",)
    ROW_NAME = "tensor"

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    nbytes: int

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> AdapterReport:
        """Read the adapter at ``path`` and report it.

        Of a file in another format, or in PEFT's without its config, only a model tells the config. Its report has the
        format, and the number of tensors of each component. Raises CheckpointError as
        :func:`adaptc.adapter_files.load.load` does.
        """
        file = load(path, with_experts=False)
        if file.format == PEFT_KEYS:
            config = {k: v for k, v in sorted((file.config or {}).items()) if v not in (None, False, {}, [], "")}
        else:
            config = _describe_format(file)
        tensors = {k: (tuple(t.shape), t.dtype) for k, t in file.tensors.items()}
        return cls(file.path or Path(path), config, tensors, file.nbytes)

    @property
    def params(self) -> int:
        return sum(prod(shape) for shape, _ in self.tensors.values())

    def sections(self) -> list[str | Table]:
        """Return the headline, the config and the tensors. Tensors that differ in a layer's number alone share a
        row."""
        groups: dict[tuple[str, str], list[str]] = {}
        for key, (shape, dtype) in self.tensors.items():
            groups.setdefault(("x".join(map(str, shape)), dtype_name(dtype)), []).append(key)
        rows = [(with_count(text, n), *how) for how, keys in groups.items() for text, n in collapse_paths(keys)]
        kind = self.config.get("peft_type") or self.config.get("format", "unknown")
        head = f"{kind} adapter in {self.path}: {len(self.tensors)} tensors, {self.params:,d} parameters"
        return [
            f"{head}, {format_bytes(self.nbytes)}",
            Table(["field", "value"], [(k, _format_value(v)) for k, v in self.config.items()]),
            Table(["tensor", Column("shape", no_wrap=True), Column("dtype", no_wrap=True)], rows),
        ]

    def values(self) -> dict[str, Any]:
        """Return ``path``, ``config``, ``tensors`` (key -> shape and dtype), ``parameters`` and ``bytes``."""
        tensors = {k: {"shape": list(shape), "dtype": dtype_name(d)} for k, (shape, d) in self.tensors.items()}
        return {
            "path": str(self.path),
            "config": self.config,
            "tensors": tensors,
            "parameters": self.params,
            "bytes": self.nbytes,
        }


def _format_value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _describe_format(file: LoadedAdapter) -> dict[str, Any]:
    """Return the format of a file, and the number of tensors of each component, as fields of a config."""
    if any(map(has_peft_prefix, file.tensors)):
        format_name, components = "PEFT, without its config", Counter[str]()
    else:
        found, parts = detect_format(file.tensors, file.source)
        format_name, components = found.name, Counter(p.component for p in parts)
    config = {"format": format_name} | {f"tensors of {name}": n for name, n in components.items() if name}
    return config | dict(file.component_configs or {})
