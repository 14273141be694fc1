"""Find one adapter among the files of a directory, and read its config.

Names cannot lead out of the directory, and hidden directories are never adapters. Where there is no adapter, or more
than one, a CheckpointError lists what is there.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from adaptc.adapter_files.atomic_write import OLD, abandoned, stages
from adaptc.adapter_files.format import BIN_NAME, CONFIG_NAME, SAFE_NAME
from adaptc.adapter_files.safe_load import read_json_object
from adaptc.adapter_files.stable_read import OpenedFile, Unsettled
from adaptc.errors import AdaptcWarning, CheckpointError, nearest


def locate(path: str | os.PathLike[str], adapter_name: str | None, subfolder: str | None) -> Path:
    """Return the directory with the files of one adapter.

    The arguments are those of :func:`adaptc.adapter_files.directory.read_adapter`.
    """
    try:
        return _locate(path, adapter_name, subfolder)
    except OSError as exc:
        raise CheckpointError(
            f"cannot look for an adapter in {os.fspath(path)}: {exc}. Check its permissions."
        ) from exc


def _locate(path: str | os.PathLike[str], adapter_name: str | None, subfolder: str | None) -> Path:
    root = Path(path)
    if subfolder is not None:
        root = root.joinpath(*(plain_name(part, "subfolder") for part in Path(subfolder).parts))
    if root.is_file():
        raise CheckpointError(f"{root} is a file; give the directory that holds it: {root.parent}.")
    if not root.is_dir():
        near = next((p for p in root.parents if p.is_dir()), Path("."))
        raise CheckpointError(
            f"no adapter directory {root}. {listing(near, root.name)} Adapters are read from local directories only; "
            f"huggingface_hub.snapshot_download fetches one."
        )

    def holds(d: Path) -> bool:
        return any((d / n).is_file() for n in (CONFIG_NAME, SAFE_NAME, BIN_NAME))

    named = [d.name for d in sorted(root.iterdir()) if not d.name.startswith(".") and d.is_dir() and holds(d)]
    if adapter_name not in (None, "default"):
        if plain_name(adapter_name, "adapter_name") in named:
            return root / adapter_name
        if holds(root) and Path(os.path.abspath(root)).name == adapter_name:
            return root
        have = ", ".join((["'default' (at the root)"] if holds(root) else []) + [repr(n) for n in named]) or "none"
        raise Unsettled(f"{root} has no adapter {adapter_name!r}. Adapters there: {have}. {listing(root)}", False)
    if holds(root):
        return root
    # A write may have hidden the adapter at the root. Another one must not be taken in its place.
    if hint := _interrupted(root):
        raise CheckpointError(f"{root} holds no adapter.{hint} {listing(root)}")
    if holds(root):  # the write that hid it has ended
        return root
    if (len(named) == 1 and adapter_name is None) or "default" in named:
        return root / ("default" if "default" in named else named[0])
    if named:
        raise CheckpointError(
            f"{root} holds no adapter at its root but these in it: {named}. Give the directory of one, "
            f"{root / named[0]}, or, to swap and bind, its name as adapter_name."
        )
    raise Unsettled(f"{root} holds no adapter: {CONFIG_NAME} and {SAFE_NAME} are missing. {listing(root)}", False)


def plain_name(name: str, what: str) -> str:
    """Return ``name`` where it can only mean an entry of a directory. Raises CheckpointError otherwise."""
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise CheckpointError(f"{what} {name!r} must be a plain name: no path separators, no leading dot.")
    return name


def listing(where: Path, wanted: str = "") -> str:
    """Return a sentence for an error: the entries of ``where``, or those close to ``wanted`` when there are any."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in where.iterdir())
    if close := nearest(wanted, [n.rstrip("/") for n in names]) if wanted else []:
        return f"Close names in {where}: {', '.join(close)}."
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{where} contains: {', '.join(names[:12]) or 'nothing'}{more}."


def open_config(where: Path) -> OpenedFile:
    """Return the open config file of the adapter in ``where``. Raises Unsettled where there is none."""
    if not (where / CONFIG_NAME).is_file():
        hint = _interrupted(where)
        raise Unsettled(f"{where} has no {CONFIG_NAME}, so its method is unknown.{hint} {listing(where)}", False)
    return OpenedFile(where / CONFIG_NAME)


def config_in(opened: OpenedFile) -> dict[str, Any]:
    """Return the config in a file, which has a ``peft_type`` string, without its ``runtime_config``.

    Raises CheckpointError where it has no such string.
    """
    file = opened.path
    config = read_json_object(opened)
    if not isinstance(config.get("peft_type"), str):
        close = nearest("peft_type", config, 1)
        raise CheckpointError(
            f"{file}: 'peft_type' must name the method (such as \"LORA\"), found {config.get('peft_type')!r}."
            + (f" Is {close[0]!r} a misspelling of it?" if close else " Is it an adapter config?")
        )
    if config.pop("runtime_config", None) is not None:
        warnings.warn(f"{file}: ignoring runtime_config, which is not part of an adapter", AdaptcWarning, stacklevel=3)
    return config


def _interrupted(where: Path) -> str:
    """Return a sentence on an interrupted write to ``where``, or ''. Raises Unsettled while a write is under way."""
    left = stages(where)
    if any(not abandoned(s) for s in left):
        raise Unsettled(
            f"{where} is being written to, and has no complete adapter now. Read it again when that is done."
        )
    if old := [s / OLD for s in left if (s / OLD).is_dir()]:
        return f" A write was interrupted: the old files are in {old[0]}."
    return ""
