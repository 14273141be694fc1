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
from adaptc.tables import WIDTH, Column, collapse, dtype_name, join, size, table, times


@dataclass(frozen=True)
class AdapterReport:
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

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int = WIDTH) -> str:
        """The report as text. Tensors that differ in a layer's number alone share a row."""
        groups: dict[tuple[str, str], list[str]] = {}
        for key, (shape, dtype) in self.tensors.items():
            groups.setdefault(("x".join(map(str, shape)), dtype_name(dtype)), []).append(key)
        rows = [(times(text, n), *how) for how, keys in groups.items() for text, n in collapse(keys)]
        kind = self.config.get("peft_type", "unknown")
        head = f"{kind} adapter in {self.path}: {len(self.tensors)} tensors, {self.params:,d} parameters"
        return join(
            f"{head}, {size(self.nbytes)}",
            table(["field", "value"], [(k, _text(v)) for k, v in self.config.items()], width=width),
            table(["tensor", Column("shape", keep=True), Column("dtype", keep=True)], rows, width=width),
        )


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
