"""Write the tensors of an adapter as a safetensors file for one model, and read such files.

The tensors have the names of the model's inputs, so that any program can feed them. The header names the model by its
fingerprint, and has a hash of the tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from adaptc.errors import CheckpointError
from adaptc.exporters.adapter_feeds import METADATA_KEY

_HASH_KEY = "sha256"


def write_tensors(tensors: Mapping[str, Tensor], path: Path, fingerprint: str) -> None:
    """Write tensors for the model with ``fingerprint``. Raises OSError."""
    plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    try:
        save_file(plain, str(path), {METADATA_KEY: fingerprint, _HASH_KEY: _hash(plain)})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def fingerprint_of(path: Path) -> str | None:
    """Return the fingerprint of the model that a file was written for; None for another file."""
    try:
        return _metadata(path).get(METADATA_KEY)
    except Exception:  # the reader of the file's own format says what is wrong with it
        return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that :func:`write_tensors` wrote. Raises CheckpointError for a damaged one."""
    try:
        expected = _metadata(path).get(_HASH_KEY)
        tensors = load(path.read_bytes())
    except Exception as error:
        raise CheckpointError(f"{path} is no adapter file, or is damaged: {error}") from error
    if _hash(tensors) != expected:
        raise CheckpointError(f"{path} is damaged: its tensors are not those that were written. Write it again")
    return tensors


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        found: Any = file.metadata()
    return found or {}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        hashed.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
