"""Find one adapter among the files of a directory, and read its config.

Names cannot lead out of the directory, and hidden directories are never adapters. Where there is no adapter, or more
than one, a CheckpointError lists what is there.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from adaptc.adapter_files.atomic_write import OLD_FILES_DIR, is_abandoned, list_stages
from adaptc.adapter_files.format import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from adaptc.adapter_files.stable_read import FileChangedError, OpenedFile, read_json_object
from adaptc.errors import AdaptcWarning, CheckpointError, nearest


def locate_adapter(path: str | os.PathLike[str], adapter_name: str | None, subfolder: str | None) -> Path:
    """Return the directory with the files of one adapter.

    The arguments are those of :func:`adaptc.adapter_files.directory.read_adapter`.
    """
    try:
        root = Path(path)
        if subfolder is not None:
            root = root.joinpath(*(check_plain_name(part, "subfolder") for part in Path(subfolder).parts))
        if root.is_file():
            raise CheckpointError(f"{root} is a file; give the directory that holds it: {root.parent}.")
        if not root.is_dir():
            near = next((p for p in root.parents if p.is_dir()), Path("."))
            raise CheckpointError(
                f"no adapter directory {root}. {describe_directory(near, root.name)} Adapters are read from local "
                "directories only; huggingface_hub.snapshot_download fetches one."
            )

        def has_adapter(directory: Path) -> bool:
            return any((directory / n).is_file() for n in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))

        adapter_names = [
            d.name for d in sorted(root.iterdir()) if not d.name.startswith(".") and d.is_dir() and has_adapter(d)
        ]
        if adapter_name not in (None, "default"):
            if check_plain_name(adapter_name, "adapter_name") in adapter_names:
                return root / adapter_name
            if has_adapter(root) and Path(os.path.abspath(root)).name == adapter_name:
                return root
            have = (
                ", ".join((["'default' (at the root)"] if has_adapter(root) else []) + [repr(n) for n in adapter_names])
                or "none"
            )
            raise FileChangedError(
                f"{root} has no adapter {adapter_name!r}. Adapters there: {have}. {describe_directory(root)}", False
            )
        if has_adapter(root):
            return root
        # A write may have hidden the adapter at the root. Another one must not be taken in its place.
        if hint := _interrupted_hint(root):
            raise CheckpointError(f"{root} holds no adapter.{hint} {describe_directory(root)}")
        if has_adapter(root):  # the write that hid it has ended
            return root
        if (len(adapter_names) == 1 and adapter_name is None) or "default" in adapter_names:
            return root / ("default" if "default" in adapter_names else adapter_names[0])
        if adapter_names:
            raise CheckpointError(
                f"{root} holds no adapter at its root but these in it: {adapter_names}. Give the directory of one, "
                f"{root / adapter_names[0]}, or, to swap and bind, its name as adapter_name."
            )
        raise FileChangedError(
            f"{root} holds no adapter: {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME} are missing. "
            f"{describe_directory(root)}",
            False,
        )
    except OSError as exc:
        raise CheckpointError(
            f"cannot look for an adapter in {os.fspath(path)}: {exc}. Check its permissions."
        ) from exc


def check_plain_name(name: str, description: str) -> str:
    """Return ``name`` where it can only mean an entry of a directory. Raises CheckpointError otherwise."""
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise CheckpointError(f"{description} {name!r} must be a plain name: no path separators, no leading dot.")
    return name


def describe_directory(directory: Path, name: str = "") -> str:
    """Return a sentence for an error: the entries of ``directory``, or those close to ``name`` when there are any."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in directory.iterdir())
    if close := nearest(name, [n.rstrip("/") for n in names]) if name else []:
        return f"Close names in {directory}: {', '.join(close)}."
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{directory} contains: {', '.join(names[:12]) or 'nothing'}{more}."


def open_config(directory: Path) -> OpenedFile:
    """Return the open config file of the adapter in ``directory``. Raises Unsettled where there is none."""
    if not (directory / CONFIG_NAME).is_file():
        hint = _interrupted_hint(directory)
        raise FileChangedError(
            f"{directory} has no {CONFIG_NAME}, so its method is unknown.{hint} {describe_directory(directory)}", False
        )
    return OpenedFile(directory / CONFIG_NAME)


def parse_adapter_config(opened: OpenedFile) -> dict[str, Any]:
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


def _interrupted_hint(directory: Path) -> str:
    """Return a sentence on an interrupted write to ``directory``, or ''. Raises Unsettled while a write is under
    way."""
    left = list_stages(directory)
    if any(not is_abandoned(s) for s in left):
        raise FileChangedError(
            f"{directory} is being written to, and has no complete adapter now. Read it again when that is done."
        )
    if old := [s / OLD_FILES_DIR for s in left if (s / OLD_FILES_DIR).is_dir()]:
        return f" A write was interrupted: the old files are in {old[0]}."
    return ""
