"""Files from strangers in, files that survive a crash out: the byte level under :mod:`adaptc.peft_files.directory`.

Before: a path somebody gave us; its content may be cut short, forged or hostile.
After reading: tensors whose data is still on disk (memory-mapped, private, so writing to one never reaches the file),
or a :class:`CheckpointError` that names the file, and nothing was executed.
After writing: the new files, or the old ones untouched. :func:`commit` is the only function that changes a directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adaptc.errors import CheckpointError

STAGE_PREFIX = ".adaptc-write-"
_MAX_JSON = 16 << 20  # the largest real adapter configs are a few hundred KiB


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises CheckpointError when it is unreadable, no JSON, or no object."""
    try:
        if (size := path.stat().st_size) > _MAX_JSON:
            raise CheckpointError(f"{path} is {size} bytes long; a config is never that large. Was it overwritten?")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as exc:
        lfs = _lfs_hint(path)
        reason = f"{type(exc).__name__}: {exc}"
        raise CheckpointError(f"{path} is not valid JSON ({reason}).{lfs} Save or download it again.") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object of config fields, but holds a {type(value).__name__}.")
    return value


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of ``path``, memory-mapped on the CPU. Raises CheckpointError for a damaged file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not iterable itself)
    except Exception as exc:  # the parser and torch raise many types on forged input; all mean the same here
        raise CheckpointError(
            f"{path} is not a readable safetensors file: {_header_fault(path) or exc}.{_lfs_hint(path)} "
            f"Download or save it again."
        ) from exc


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Every tensor of a ``torch.save`` file, loaded with ``weights_only=True`` and mapped when the format allows it.

    Raises CheckpointError for a file that would run code, is damaged, is compressed (``torch.save`` never does that,
    so it can only be a decompression bomb), or holds anything but a flat dict of dense tensors.
    """
    way_out = "Ask for adapter_model.safetensors, or convert the file in a sandbox if you trust its author."
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as z:
                if any(i.compress_type != zipfile.ZIP_STORED for i in z.infolist()):
                    raise CheckpointError(f"{path} is a compressed archive, which torch.save never writes. {way_out}")
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as exc:  # unpickling forged bytes raises anything
        # torch's own message advises weights_only=False: the one thing not to do with a file from a stranger
        call = re.search(r"GLOBAL ([\w.]+)", str(exc))
        why = f"it would call {call[1]}" if call else f"it is damaged or no file of tensors ({type(exc).__name__})"
        raise CheckpointError(
            f"{path} was refused: {why}. A .bin file is a pickle, which can run code when loaded; only tensors are "
            f"accepted.{_lfs_hint(path)} {way_out}"
        ) from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a dict of tensors, but holds a {type(value).__name__}. {way_out}")
    for key, t in value.items():
        if not isinstance(key, str) or not isinstance(t, Tensor):
            found = f"{type(key).__name__} -> {type(t).__name__}"
            raise CheckpointError(f"{path}: entry {key!r} is {found}, expected a name and a tensor. {way_out}")
        if t.layout != torch.strided or t.is_quantized or t.nbytes > t.untyped_storage().nbytes():
            # an expanded tensor costs nothing here and terabytes at the first clone
            raise CheckpointError(f"{path}: {key!r} {tuple(t.shape)} is not a plain dense tensor. {way_out}")
    return {key: t.detach() for key, t in value.items()}


def dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values as contiguous CPU tensors that each own their storage, as both file formats need."""
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


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, safe: bool) -> None:
    """Write ``tensors`` (from :func:`dense`) to ``path``. Lets the library's own exceptions through."""
    if safe:
        save_file(dict(tensors), path, metadata={"format": "pt"})
        # safetensors creates its file for the owner alone; a shared adapter follows the umask like any other file
        umask_probe = path.with_name(f"{path.name}.mode")
        umask_probe.touch()
        path.chmod(umask_probe.stat().st_mode & 0o777)
        umask_probe.unlink()
    else:
        torch.save(dict(tensors), path)


@contextmanager
def staging(near: Path) -> Iterator[Path]:
    """A hidden directory inside ``near`` (so renames out of it stay on one filesystem), gone afterwards.

    ``near`` itself is used, not its parent: an adapter directory may be a mount point. Missing directories down to
    ``near`` are made, and removed again when the block raises.
    """
    made: list[Path] = []
    stage = near / f"{STAGE_PREFIX}{uuid.uuid4().hex}"
    try:
        for p in reversed([near, *near.parents]):
            if not p.exists():
                p.mkdir(exist_ok=True)
                made.append(p)
        stage.mkdir()
        yield stage
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for p in reversed(made):
            with suppress(OSError):
                p.rmdir()
        raise
    shutil.rmtree(stage, ignore_errors=True)


def sync(path: Path) -> None:
    """Push a file's or directory's content to the disk, so a rename never becomes durable before what it renames."""
    if path.is_dir() and os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def commit(stage: Path, target: Path, *, body: str, head: str, stale: str) -> None:
    """Move ``stage/body`` (weights) and ``stage/head`` (config) into ``target`` as one change; drop ``target/stale``.

    ``head`` makes the directory readable, so a head and a body of different writes must never be seen together. When
    the head does not change and nothing is stale the whole change is one rename. Otherwise the old head leaves first
    and the new one arrives last: an exception puts everything back, and a process killed in between leaves a directory
    without a head, which every reader refuses.
    """
    new_head, old_head = stage / head, target / head
    same = old_head.is_file() and old_head.read_bytes() == new_head.read_bytes()
    if same and not (target / stale).exists():
        os.replace(stage / body, target / body)
    else:
        old = stage / "old"
        old.mkdir()
        hidden: list[str] = []
        placed: list[str] = []
        try:
            for name in (head, body, stale):
                if (target / name).exists():
                    os.replace(target / name, old / name)
                    hidden.append(name)
            for name in (body, head):
                os.replace(stage / name, target / name)
                placed.append(name)
        except BaseException:
            for name in reversed(placed):
                os.replace(target / name, stage / name)
            for name in reversed(hidden):
                os.replace(old / name, target / name)
            raise
    sync(target)


def _lfs_hint(path: Path) -> str:
    with suppress(OSError), path.open("rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):
            return " It is a Git LFS pointer, not the file itself: run `git lfs pull`."
    return ""


def _header_fault(path: Path) -> str:
    """What is wrong with a safetensors header length, in words; empty when that is not the fault."""
    with suppress(OSError), path.open("rb") as f:
        size, head = path.stat().st_size, f.read(8)
        if len(head) < 8:
            return f"it is {size} bytes long, too short to hold a header"
        if (n := int.from_bytes(head, "little")) > size - 8:
            return f"its header claims {n} bytes but the file has {size}; it was cut short or is another format"
    return ""
