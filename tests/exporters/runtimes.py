"""The runtimes that have adapters as inputs, for tests that run in each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import adaptc

#: how many damaged files a test makes
COUNTS = pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.long)])


@dataclass(frozen=True)
class RuntimeUnderTest:
    """A runtime: its functions, the ends of the names of its files, and the options that the models of tests need."""

    name: str
    export: Callable[..., Path]
    open_model: Callable[..., Any]
    save_adapter: Callable[..., Path]
    suffix: str
    adapter_suffix: str
    options: dict[str, Any]

    def exported(self, program: Any, folder: Path, name: str = "model", **options: Any) -> Path:
        return self.export(program, folder / f"{name}{self.suffix}", **self.options, **options)

    def files(self, model: Path) -> list[Path]:
        """Return the files that make a model."""
        return sorted(p for p in model.parent.iterdir() if p.name.partition(".")[0] == model.stem)


RUNTIMES = {
    r.name: r
    for r in (
        RuntimeUnderTest(
            "openvino",
            adaptc.exporters.export_openvino,
            adaptc.exporters.openvino_model,
            adaptc.exporters.save_openvino_adapter,
            ".xml",
            ".safetensors",
            {},
        ),
        RuntimeUnderTest(
            "executorch",
            adaptc.exporters.export_executorch,
            adaptc.exporters.executorch_model,
            adaptc.exporters.save_executorch_adapter,
            ".pte",
            ".ptd",
            {"max_size": 20},
        ),
    )
}


def run(model: Any, given: dict[str, Tensor], adapter: str | None = None, output: str = "output") -> Tensor:
    """Return an output of a call as a tensor."""
    found = model.run({n: t.numpy() for n, t in given.items()}, adapter, [output])[output]
    return torch.from_numpy(found) if isinstance(found, np.ndarray) else found


def damaged(data: bytes, seed: int) -> bytes:
    """Return bytes with a part cut off, zeroed, added or changed."""
    dice = random.Random(seed)
    at = dice.randrange(len(data))
    kind = dice.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(min(16, len(data) - at)).replace(b"\0", b"\xa5") + data[at + 16 :]
    if kind == 2:
        return data[:at] + b"\x01\x02\x03" + data[at:]
    if kind == 3:
        return data[:at] + data[at + 7 :]
    return data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :]


#: the beginning of a script that cannot import adaptc or torch, and opens model.onnx in ONNX Runtime alone
OPEN_WITHOUT_ADAPTC = """\
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("adaptc", "torch"):
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 3
session = ort.InferenceSession("model.onnx", options)
"""
