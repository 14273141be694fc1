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

from adaptc.adapter_files.foreign_file import RawFile, of_peft, read_any
from adaptc.adapter_files.formats.detect import detect
from adaptc.tables import Column, Report, Table, collapse, dtype_name, plain, size, times


@dataclass(frozen=True, repr=False)
class AdapterReport(Report):
    """A report of one adapter's files. ``tensors``: key without PEFT's prefix -> (shape, dtype). ``config``: the fields
    that are set to anything."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    nbytes: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> AdapterReport:
        """Read the adapter at ``path`` and report it.

        Raises CheckpointError as :func:`adaptc.adapter_files.foreign_file.read_any` does.
        """
        file = read_any(path)
        if isinstance(file, RawFile):
            return cls.of_raw(file)
        config = {k: v for k, v in sorted(file.config.items()) if v not in (None, False, {}, [], "")}
        tensors = {k: (tuple(t.shape), t.dtype) for k, t in file.tensors.items()}
        return cls(file.path, config, tensors, file.nbytes)

    @classmethod
    def of_raw(cls, file: RawFile) -> AdapterReport:
        """Report a file in another format, or in PEFT's without its config. Only a model tells its config, so the
        report has the format, and the number of tensors of each component."""
        if any(map(of_peft, file.tensors)):
            form, components = "PEFT, without its config", Counter[str]()
        else:
            found, parts = detect(file.tensors, str(file.path))
            form, components = found.name, Counter(p.component for p in parts)
        config = {"format": form} | {f"tensors of {name}": n for name, n in components.items() if name}
        config |= dict(file.configs or {})
        tensors = {k: (tuple(t.shape), t.dtype) for k, t in file.tensors.items()}
        return cls(file.path, config, tensors, file.nbytes)

    @property
    def params(self) -> int:
        return sum(prod(shape) for shape, _ in self.tensors.values())

    def parts(self) -> list[str | Table]:
        """Return the headline, the config and the tensors. Tensors that differ in a layer's number alone share a
        row."""
        groups: dict[tuple[str, str], list[str]] = {}
        for key, (shape, dtype) in self.tensors.items():
            groups.setdefault(("x".join(map(str, shape)), dtype_name(dtype)), []).append(key)
        rows = [(times(text, n), *how) for how, keys in groups.items() for text, n in collapse(keys)]
        kind = self.config.get("peft_type") or self.config.get("format", "unknown")
        head = f"{kind} adapter in {self.path}: {len(self.tensors)} tensors, {self.params:,d} parameters"
        return [
            f"{head}, {size(self.nbytes)}",
            Table(["field", "value"], [(k, _text(v)) for k, v in self.config.items()]),
            Table(["tensor", Column("shape", keep=True), Column("dtype", keep=True)], rows),
        ]

    def data(self) -> dict[str, Any]:
        """Return ``path``, ``config``, ``tensors`` (key -> shape and dtype), ``parameters`` and ``bytes``."""
        tensors = {k: {"shape": list(shape), "dtype": dtype_name(d)} for k, (shape, d) in self.tensors.items()}
        return {
            "path": str(self.path),
            "config": plain(self.config),
            "tensors": tensors,
            "parameters": self.params,
            "bytes": self.nbytes,
        }


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
