"""Read and write PEFT adapter directories: config and tensors in, config and tensors out. No model is involved.

Format (PEFT 0.21): ``adapter_config.json``, ``adapter_model.safetensors`` or ``adapter_model.bin``, ``README.md``. The
adapter ``default`` lies at the root of the directory, any other in a sub-directory of its name. The model card is
always at the root.

Keys here are *bare*: without the file's prefix ``base_model.model.``, which writing restores exactly (``format`` has
the rule). The keys of a file without any prefix count as bare. A file in which only some keys have a prefix is refused.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from adaptc.adapter_files import atomic_write as _atomic_write
from adaptc.adapter_files import safe_load as _safe_load
from adaptc.adapter_files import safetensors_reader as _reader
from adaptc.adapter_files.format import (
    BIN_NAME,
    CARD_NAME,
    CONFIG_NAME,
    SAFE_NAME,
    bare_key,
    bare_keys,
    check_no_model,
    file_key,
    jsonable,
    stored_config,
    write_card,
)
from adaptc.adapter_files.key_mapping import renamed, rules_of
from adaptc.adapter_files.locate import config_in, listing, locate, open_config, plain_name
from adaptc.adapter_files.origin import PEFT, FileOrigin
from adaptc.adapter_files.stable_read import OpenedFile, Unsettled, settled
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError, shown

__all__ = [
    "AdapterFile",
    "bare_key",
    "check_finite",
    "checked",
    "file_key",
    "read_adapter",
    "read_config",
    "write_adapter",
]


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter as it was on disk at one moment.

    ``tensors`` maps bare keys to tensors in the file's own dtypes. They have memory of their own, so later changes to
    the file do not reach them.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    #: the directory that holds the files (the sub-directory, for a named adapter)
    path: Path
    weights: str = SAFE_NAME
    #: all floating-point data of the file in as few tensors as possible, where that is known
    runs: Sequence[Tensor] = field(default=(), repr=False)
    #: the format that the file had before it was converted to this one
    origin: FileOrigin = PEFT
    #: whether the adapter is new, made from files of other adapters
    fresh: bool = False

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of tensor data."""
        return sum(t.nbytes for t in self.tensors.values())


def read_config(
    path: str | os.PathLike[str], *, adapter_name: str | None = None, subfolder: str | None = None
) -> dict[str, Any]:
    """Return the content of one adapter's ``adapter_config.json``. The arguments are those of :func:`read_adapter`.

    A ``runtime_config`` is dropped with a warning, as PEFT does, since it is not part of an adapter. Raises
    CheckpointError when there is no config, it is no JSON object, or it has no ``peft_type``.
    """

    def read() -> dict[str, Any]:
        with open_config(locate(path, adapter_name, subfolder)) as file:
            return checked(config_in, file)

    return settled(read)


def read_adapter(
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    subfolder: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
) -> AdapterFile:
    """Read a PEFT adapter directory into memory, in one pass over its bytes.

    ``path`` is the directory PEFT saved to, or the sub-directory of a named adapter. ``adapter_name`` picks one of
    several; None takes the one at the root, or the only one there is. ``key_mapping`` maps regular expressions to
    replacements; the module ``key_mapping`` has the rule. safetensors is preferred to ``.bin``. No file stays mapped or
    open.

    Config and weights are of one moment. While :func:`write_adapter` replaces them the read waits, for half a second at
    most. Where a file changes during the read, the read starts again. ``snapshot`` says what programs that write in
    place can still break.

    Raises CheckpointError for missing, damaged or unsafe files, unknown key prefixes, and files that kept changing. It
    does so too for keys that coincide after the mapping. Raises ConfigError for a bad expression or device. Values are
    not checked: see :func:`check_finite`.
    """
    rules = rules_of(key_mapping)
    try:
        to = torch.device(device)
    except (TypeError, RuntimeError) as exc:
        raise ConfigError(f"cannot read {shown(path)}: bad device: {exc}") from exc
    config, where, name, raw, runs = settled(lambda: _read(path, adapter_name, subfolder))
    file = where / name
    if not raw:
        raise CheckpointError(f"{file} holds no tensors at all. Was it saved before the weights were gathered?")

    names = renamed(bare_keys(file, list(raw), config["peft_type"]), rules, file)
    tensors = {bare: raw[key] for bare, key in names.items()}
    if to.type != "cpu":
        try:
            tensors, runs = {k: t.to(to) for k, t in tensors.items()}, ()
        except (RuntimeError, AssertionError, NotImplementedError) as exc:
            raise ConfigError(f"cannot move the tensors of {file} to device {str(device)!r}: {exc}") from exc
    return AdapterFile(config, MappingProxyType(tensors), where, name, runs)


def _read(
    path: str | os.PathLike[str], adapter_name: str | None, subfolder: str | None
) -> tuple[dict[str, Any], Path, str, dict[str, Tensor], Sequence[Tensor]]:
    """Return config, directory, name of the weights file, tensors and runs of one adapter.

    Raises Unsettled where they may not belong together.
    """
    where = locate(path, adapter_name, subfolder)
    with open_config(where) as head:
        config = checked(config_in, head)
        name = next((n for n in (SAFE_NAME, BIN_NAME) if (where / n).is_file()), None)
        if name is None:
            head.check()
            raise Unsettled(
                f"{where} has {CONFIG_NAME} but neither {SAFE_NAME} nor {BIN_NAME}. {listing(where)}", False
            )
        with OpenedFile(where / name) as body:
            if name == SAFE_NAME:
                raw, runs = checked(_reader.load, body)
            else:
                raw, runs = checked(_safe_load.load_pickle, body), ()
            body.check()
        head.check()
    if locate(path, adapter_name, subfolder) != where:  # a write had hidden the adapter that was asked for
        raise Unsettled(f"{os.fspath(path)} kept changing while it was read. Read it again when that is done.")
    return config, where, name, raw, runs


def checked(read: Callable[[OpenedFile], T], file: OpenedFile) -> T:
    """Return what ``read`` returns for ``file``.

    Where it raises CheckpointError and the file has changed meanwhile, raises Unsettled instead.
    """
    try:
        return read(file)
    except CheckpointError:
        file.check()
        raise


def write_adapter(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    safe_serialization: bool = True,
    base_model: str | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Write an adapter that PEFT loads, and return the directory that holds it.

    ``config`` needs ``peft_type``. It is stored as PEFT stores it: ``inference_mode`` true, no ``runtime_config``, sets
    as lists, sorted keys, ``peft_version`` filled in. ``tensors`` has bare keys, any shapes, dtypes and strides; shared
    and strided tensors are copied. ``base_model`` fills in ``base_model_name_or_path``. ``tags`` are more tags for the
    model card. An existing model card keeps its body and its own metadata. Weights of the other format, which PEFT
    might prefer, are removed.

    Everything is written aside and renamed into place. Links stay links, and existing files keep their permissions.
    Leftovers of killed writes in the directory are removed. Raises CheckpointError, and leaves the directory as it was.
    """
    root = Path(path)
    out = root if adapter_name == "default" else root / plain_name(adapter_name, "adapter_name")
    for p in (root, out):
        if p.exists() and not p.is_dir():
            raise CheckpointError(f"cannot write an adapter to {p}: it is a file. Choose a directory.")
    check_no_model(out)
    stored = stored_config(config, base_model)
    if not tensors:
        raise CheckpointError(f"cannot write an adapter to {out}: it has no tensors, so it would do nothing.")
    body, stale = (SAFE_NAME, BIN_NAME) if safe_serialization else (BIN_NAME, SAFE_NAME)
    try:
        # Sorted for readers, but not inside: of several keys of rank_pattern that match a module, PEFT takes the first.
        text = json.dumps(dict(sorted(stored.items())), indent=2, default=jsonable)
    except (TypeError, ValueError) as exc:
        raise CheckpointError(f"cannot write {out / CONFIG_NAME}: {exc}. Config values must fit in JSON.") from exc
    try:
        data = _safe_load.dense({file_key(k, stored["peft_type"]): t for k, t in tensors.items()})
        with _atomic_write.staging(out) as stage:
            (stage / CONFIG_NAME).write_text(text, encoding="utf-8")
            _safe_load.save_tensors(data, stage / body, safe=safe_serialization)
            card = write_card(root / CARD_NAME, stage / CARD_NAME, stored, tags)
            for file in stage.iterdir():
                _atomic_write.sync(file)
            _atomic_write.commit(stage, out, bodies=[body], head=CONFIG_NAME, stale=[stale])
            if card:  # last and by itself, since no adapter depends on it
                try:
                    _atomic_write.place(stage / CARD_NAME, root / CARD_NAME)
                except (OSError, CheckpointError) as exc:
                    warnings.warn(f"{root / CARD_NAME} could not be updated: {exc}", AdaptcWarning, stacklevel=2)
        _atomic_write.remove_abandoned(out, with_old_files=True)
    except CheckpointError:
        raise
    except Exception as exc:  # safetensors, torch and the OS each have their own types for a full disk
        reason = f"{type(exc).__name__}: {exc}"
        raise CheckpointError(f"could not write {out / body} ({reason}). What was there before is unchanged.") from exc
    return out


def check_finite(tensors: Mapping[str, Tensor], source: str | os.PathLike[str] = "the adapter") -> None:
    """Raise CheckpointError, naming the first key, when a floating tensor holds NaN or infinity. Reads all data."""
    if all_finite(tensors.values()):
        return
    for key, t in tensors.items():
        if not (t.is_floating_point() or t.is_complex()):
            continue
        bad = ~torch.isfinite(t.float() if t.is_floating_point() and t.itemsize == 1 else t)
        if count := int(bad.sum()):
            first = tuple(bad.nonzero()[0].tolist())
            raise CheckpointError(
                f"{os.fspath(source)}: {key!r} {tuple(t.shape)} holds {count} values that are NaN or infinite, first "
                f"at {first}. The training run diverged or the file is damaged; use an earlier checkpoint."
            )


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no floating tensor holds NaN or infinity, in one pass with one wait per device and dtype.

    NaN or infinity makes the sum of its tensor NaN or infinite. An overflow of finite values does so, too, so False
    means not known.
    """
    sums: dict[Any, list[Tensor]] = {}
    for t in tensors:
        if not (t.is_floating_point() or t.is_complex()):
            continue
        if t.itemsize == 1 or t.layout is not torch.strided or t.is_meta:
            return False
        sums.setdefault((t.device, t.dtype), []).append(t.sum())
    return all(bool(torch.stack(s).isfinite().all()) for s in sums.values())
