"""Read files from strangers safely, and write files that survive a crash: the byte level of ``adaptc.adapter_files``.

The content of a file may be cut short, forged or hostile. Reading gives tensors in memory of adaptc's own, or a
:class:`CheckpointError` that names the file. It never executes anything. Writing makes a complete file inside a stage
(``atomic_write``).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from adaptc.adapter_files.safe_torch_save import open_for_torch_save
from adaptc.adapter_files.stable_read import OpenedFile, lfs_hint
from adaptc.errors import CheckpointError
from adaptc.torch_typing import is_dict


def load_safetensors(path: Path, file_bytes: Any) -> dict[str, Tensor]:
    """Return every tensor in ``file_bytes``, the bytes of ``path`` as an array. Raises CheckpointError for a damaged
    file."""
    try:
        return load(file_bytes.tobytes())
    except Exception as exc:  # the parser and torch raise many types on forged input; all mean the same here
        head = file_bytes[:40].tobytes()
        raise CheckpointError(
            f"{path} is not a readable safetensors file: "
            f"{_header_problem(head, file_bytes.size) or exc}.{lfs_hint(head)} Download or save it again."
        ) from exc


def load_pickle(file: OpenedFile) -> dict[str, Tensor]:
    """Return every tensor of a ``torch.save`` file, loaded with ``weights_only=True`` into memory of its own.

    Raises CheckpointError for a file that would run code, is damaged, or holds anything but a flat dict of dense
    tensors. It does so too for a compressed file: ``torch.save`` never compresses, so it can only be a decompression
    bomb.
    """
    remedy = "Ask for adapter_model.safetensors, or convert the file in a sandbox if you trust its author."
    path = file.path
    try:
        with open(file.fd, "rb", closefd=False) as f:
            if zipfile.is_zipfile(f):
                with zipfile.ZipFile(f) as z:
                    if any(i.compress_type != zipfile.ZIP_STORED for i in z.infolist()):
                        raise CheckpointError(
                            f"{path} is a compressed archive, which torch.save never writes. {remedy}"
                        )
            f.seek(0)
            # Not mapped: a file that is cut short during the read then raises, and later changes to it do not matter.
            value = torch.load(f, map_location="cpu", weights_only=True, mmap=False)
    except CheckpointError:
        raise
    except Exception as exc:  # unpickling forged bytes raises anything
        # torch's own message advises weights_only=False, which must not be used for a file from a stranger
        call = re.search(r"GLOBAL ([\w.]+)", str(exc))
        why = f"it would call {call[1]}" if call else f"it is damaged or no file of tensors ({type(exc).__name__})"
        raise CheckpointError(
            f"{path} was refused: {why}. A .bin file is a pickle, which can run code when loaded; only tensors are "
            f"accepted.{lfs_hint(_first_bytes(file))} {remedy}"
        ) from exc
    if not is_dict(value):
        raise CheckpointError(f"{path} must hold a dict of tensors, but holds a {type(value).__name__}. {remedy}")
    for key, t in value.items():
        if not isinstance(key, str) or not isinstance(t, Tensor):
            found = f"{type(key).__name__} -> {type(t).__name__}"
            raise CheckpointError(f"{path}: entry {key!r} is {found}, expected a name and a tensor. {remedy}")
        odd = t.layout != torch.strided or t.is_quantized or t.is_nested or t.is_meta
        if odd or t.nbytes > t.untyped_storage().nbytes():
            # an expanded tensor takes no memory here, and terabytes at the first clone
            raise CheckpointError(f"{path}: {key!r} {tuple(t.shape)} is not a plain dense tensor. {remedy}")
    return {key: t.detach() for key, t in value.items()}


def to_dense(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the values as contiguous CPU tensors that each own their storage, as both file formats need."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, t in tensors.items():
        if not isinstance(t, Tensor) or t.layout != torch.strided or t.is_meta:
            what = f"a tensor on {t.device} with layout {t.layout}" if isinstance(t, Tensor) else type(t).__name__
            raise CheckpointError(f"{key!r} cannot be written: it is {what}, expected a dense tensor with values.")
        t = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
        storage = t.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != t.nbytes:
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        out[key] = t
    return out


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, safe_serialization: bool, metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` (from :func:`to_dense`) to ``path``, as safetensors where ``safe_serialization`` and with
    ``torch.save`` otherwise.

    ``metadata`` has more texts for the header of a safetensors file. The libraries' own exceptions are not converted.
    """
    if safe_serialization:
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
        # safetensors makes its file readable for the owner only; an adapter must follow the umask like any other file
        umask_probe = path.with_name(f"{path.name}.mode")
        umask_probe.touch()
        path.chmod(umask_probe.stat().st_mode & 0o777)
        umask_probe.unlink()
    else:
        with open_for_torch_save(path) as f:
            torch.save(dict(tensors), f)


def _first_bytes(file: OpenedFile) -> bytes:
    start = bytearray(min(file.size, 40))
    with suppress(CheckpointError):
        file.read_into(start)
    return bytes(start)


def _header_problem(start: bytes, size: int) -> str:
    """Return in words what is wrong with a safetensors header's length, or '' when nothing is."""
    if size < 8:
        return f"it is {size} bytes long, too short to hold a header"
    if (n := int.from_bytes(start[:8], "little")) > size - 8:
        return f"its header claims {n} bytes but the file has {size}; it was cut short or is another format"
    return ""
