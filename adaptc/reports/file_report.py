"""Report what a file or directory of tensors holds, such as an adapter or a model. Values are not shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from adaptc.tables import Column, Report, Table, collapse_paths, format_bytes, with_count


@dataclass(frozen=True, repr=False)
class FileReport(Report):
    """A report of a file or directory.

    ``kind``: what it is, such as "LORA adapter". ``config``: the fields that are set to anything. ``tensors``: key ->
    (shape, name of the dtype); of adapters, keys are without PEFT's prefix.
    """

    ROWS = ("tensors",)
    ROW_NAME = "tensor"

    path: Path
    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    nbytes: int

    @property
    def params(self) -> int:
        return sum(prod(shape) for shape, _ in self.tensors.values())

    def sections(self) -> list[str | Table]:
        """Return the headline, the config and the tensors. Tensors that differ in a layer's number alone share a
        row."""
        groups: dict[tuple[str, str], list[str]] = {}
        for key, (shape, dtype) in self.tensors.items():
            groups.setdefault(("x".join(map(str, shape)), dtype), []).append(key)
        rows = [(with_count(text, n), *how) for how, keys in groups.items() for text, n in collapse_paths(keys)]
        head = f"{self.kind} in {self.path}: {len(self.tensors)} tensors, {self.params:,d} parameters"
        return [
            f"{head}, {format_bytes(self.nbytes)}",
            Table(["field", "value"], [(k, _format_value(v)) for k, v in self.config.items()]),
            Table(["tensor", Column("shape", no_wrap=True), Column("dtype", no_wrap=True)], rows),
        ]

    def values(self) -> dict[str, Any]:
        """Return ``path``, ``kind``, ``config``, ``tensors`` (key -> shape and dtype), ``parameters`` and ``bytes``."""
        tensors = {k: {"shape": list(shape), "dtype": d} for k, (shape, d) in self.tensors.items()}
        return {
            "path": str(self.path),
            "kind": self.kind,
            "config": self.config,
            "tensors": tensors,
            "parameters": self.params,
            "bytes": self.nbytes,
        }


def _format_value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
