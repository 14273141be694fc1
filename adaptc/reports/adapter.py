"""What a PEFT adapter directory holds, without a model: its config and its tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from adaptc.peft_files.directory import read_adapter
from adaptc.tables import Column, Report, Table, collapse, dtype_name, plain, size, times


@dataclass(frozen=True, repr=False)
class AdapterReport(Report):
    """``tensors``: key without PEFT's prefix -> (shape, dtype). ``config``: the fields that are set to anything."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    nbytes: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> AdapterReport:
        """Raises CheckpointError as :func:`adaptc.peft_files.directory.read_adapter` does."""
        file = read_adapter(path)
        config = {k: v for k, v in sorted(file.config.items()) if v not in (None, False, {}, [], "")}
        tensors = {k: (tuple(t.shape), t.dtype) for k, t in file.tensors.items()}
        return cls(file.path, config, tensors, file.nbytes)

    @property
    def params(self) -> int:
        return sum(prod(shape) for shape, _ in self.tensors.values())

    def parts(self) -> list[str | Table]:
        """Tensors that differ in a layer's number alone share a row."""
        groups: dict[tuple[str, str], list[str]] = {}
        for key, (shape, dtype) in self.tensors.items():
            groups.setdefault(("x".join(map(str, shape)), dtype_name(dtype)), []).append(key)
        rows = [(times(text, n), *how) for how, keys in groups.items() for text, n in collapse(keys)]
        kind = self.config.get("peft_type", "unknown")
        head = f"{kind} adapter in {self.path}: {len(self.tensors)} tensors, {self.params:,d} parameters"
        return [
            f"{head}, {size(self.nbytes)}",
            Table(["field", "value"], [(k, _text(v)) for k, v in self.config.items()]),
            Table(["tensor", Column("shape", keep=True), Column("dtype", keep=True)], rows),
        ]

    def data(self) -> dict[str, Any]:
        """``path``, ``config``, ``tensors`` (key -> shape and dtype), ``parameters``, ``bytes``."""
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
