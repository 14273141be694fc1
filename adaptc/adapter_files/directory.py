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
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from adaptc.adapter_files import atomic_write as _atomic_write
from adaptc.adapter_files import safe_load as _safe_load
from adaptc.adapter_files import safetensors_reader as _reader
from adaptc.adapter_files.adapter_data import AdapterData
from adaptc.adapter_files.format import (
    CONFIG_NAME,
    MODEL_CARD_NAME,
    MODEL_LEVEL_KEYS,
    MODEL_PREFIX,
    MODULE_PREFIX,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    bare_key,
    check_no_model,
    file_key,
    stored_config,
    to_json_value,
    write_model_card,
)
from adaptc.adapter_files.key_mapping import rename_bare_keys
from adaptc.adapter_files.locate import (
    check_plain_name,
    describe_directory,
    locate_adapter,
    open_config,
    parse_adapter_config,
)
from adaptc.adapter_files.stable_read import FileChangedError, OpenedFile, retry_while_changing
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError, short_repr
from adaptc.torch_typing import to_python

__all__ = [
    "bare_key",
    "check_finite",
    "read_checked",
    "file_key",
    "read_adapter",
    "read_config",
    "write_adapter",
]


T = TypeVar("T")


def read_config(
    path: str | os.PathLike[str], *, adapter_name: str | None = None, subfolder: str | None = None
) -> dict[str, Any]:
    """Return the content of one adapter's ``adapter_config.json``. The arguments are those of :func:`read_adapter`.

    A ``runtime_config`` is dropped with a warning, as PEFT does, since it is not part of an adapter. Raises
    CheckpointError when there is no config, it is no JSON object, or it has no ``peft_type``.
    """

    def read() -> dict[str, Any]:
        with open_config(locate_adapter(path, adapter_name, subfolder)) as file:
            return read_checked(parse_adapter_config, file)

    return retry_while_changing(read)


def read_adapter(
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    subfolder: str | None = None,
    device: str | torch.device = "cpu",
) -> AdapterData[dict[str, Any]]:
    """Read a PEFT adapter directory into memory, in one pass over its bytes.

    ``path`` is the directory PEFT saved to, or the sub-directory of a named adapter. ``adapter_name`` picks one of
    several; None takes the one at the root, or the only one there is. safetensors is preferred to ``.bin``. No file
    stays mapped or open.

    Config and weights are of one moment. While :func:`write_adapter` replaces them the read waits, for half a second at
    most. Where a file changes during the read, the read starts again. ``stable_read`` says what programs that write in
    place can still break.

    Raises CheckpointError for missing, damaged or unsafe files, unknown key prefixes, and files that kept changing.
    Raises ConfigError for a bad device. Values are not checked: see :func:`check_finite`.
    """
    try:
        target_device = torch.device(device)
    except (TypeError, RuntimeError) as exc:
        raise ConfigError(f"cannot read {short_repr(path)}: bad device: {exc}") from exc
    config, directory, weights_name, raw, flat_tensors = retry_while_changing(
        lambda: _read_once(path, adapter_name, subfolder)
    )
    file = directory / weights_name
    if not raw:
        raise CheckpointError(f"{file} holds no tensors at all. Was it saved before the weights were gathered?")
    tensors = _with_bare_keys(raw, config["peft_type"], file)
    if target_device.type != "cpu":
        try:
            tensors, flat_tensors = {k: t.to(target_device) for k, t in tensors.items()}, ()
        except (RuntimeError, AssertionError, NotImplementedError) as exc:
            raise ConfigError(f"cannot move the tensors of {file} to device {str(device)!r}: {exc}") from exc
    return AdapterData(config, MappingProxyType(tensors), os.fspath(path), directory, flat_tensors=flat_tensors)


def _read_once(
    path: str | os.PathLike[str], adapter_name: str | None, subfolder: str | None
) -> tuple[dict[str, Any], Path, str, dict[str, Tensor], Sequence[Tensor]]:
    """Return config, directory, name of the weights file, tensors and runs of one adapter.

    Raises Unsettled where they may not belong together.
    """
    directory = locate_adapter(path, adapter_name, subfolder)
    with open_config(directory) as config_file:
        config = read_checked(parse_adapter_config, config_file)
        weights_name = next((n for n in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (directory / n).is_file()), None)
        if weights_name is None:
            config_file.check_unchanged()
            raise FileChangedError(
                f"{directory} has {CONFIG_NAME} but neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}. "
                f"{describe_directory(directory)}",
                False,
            )
        with OpenedFile(directory / weights_name) as body:
            if weights_name == SAFETENSORS_WEIGHTS_NAME:
                raw, runs = read_checked(_reader.load_tensors, body)
            else:
                raw, runs = read_checked(_safe_load.load_pickle, body), ()
            body.check_unchanged()
        config_file.check_unchanged()
    if locate_adapter(path, adapter_name, subfolder) != directory:  # a write had hidden the adapter that was asked for
        raise FileChangedError(f"{os.fspath(path)} kept changing while it was read. Read it again when that is done.")
    return config, directory, weights_name, raw, runs


def _with_bare_keys(tensors: Mapping[str, Tensor], peft_type: str, file: Path) -> dict[str, Tensor]:
    """Return ``tensors`` of a file with bare keys.

    Raises CheckpointError where only some keys have a known prefix, and where two name one tensor.
    """
    bare = {key: bare_key(key, peft_type) for key in tensors}
    if not any(key.startswith(MODEL_PREFIX) for key in tensors):
        return dict(tensors)
    if odd := [k for k, b in bare.items() if not b]:
        raise CheckpointError(
            f"{file}: {len(odd)} of {len(tensors)} keys do not have the prefix a {peft_type} file uses "
            f"('{MODULE_PREFIX}', or '{MODEL_PREFIX}' for "
            f"{sorted(MODEL_LEVEL_KEYS.get(peft_type, ())) or 'nothing else'}): {odd[:3]}. Rename them, or drop the "
            "prefix from all keys."
        )
    names = {k: b for k, b in bare.items() if b}
    renamed = {names[k]: t for k, t in tensors.items()}
    if len(renamed) != len(tensors):
        rename_bare_keys(names, (), file)  # raises, and names the two keys
    return renamed


def read_checked(read: Callable[[OpenedFile], T], file: OpenedFile) -> T:
    """Return what ``read`` returns for ``file``.

    Where it raises CheckpointError and the file has changed meanwhile, raises Unsettled instead.
    """
    try:
        return read(file)
    except CheckpointError:
        file.check_unchanged()
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
    directory = root if adapter_name == "default" else root / check_plain_name(adapter_name, "adapter_name")
    for p in (root, directory):
        if p.exists() and not p.is_dir():
            raise CheckpointError(f"cannot write an adapter to {p}: it is a file. Choose a directory.")
    check_no_model(directory)
    stored = stored_config(config, base_model)
    if not tensors:
        raise CheckpointError(f"cannot write an adapter to {directory}: it has no tensors, so it would do nothing.")
    weights_name, stale_name = (
        (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if safe_serialization else (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME)
    )
    try:
        # Sorted for readers, but not inside: of several keys of rank_pattern that match a module, PEFT takes the first.
        text = json.dumps(dict(sorted(stored.items())), indent=2, default=to_json_value)
    except (TypeError, ValueError) as exc:
        raise CheckpointError(
            f"cannot write {directory / CONFIG_NAME}: {exc}. Config values must fit in JSON."
        ) from exc
    try:
        data = _safe_load.to_dense({file_key(k, stored["peft_type"]): t for k, t in tensors.items()})
        with _atomic_write.open_stage(directory) as stage:
            (stage / CONFIG_NAME).write_text(text, encoding="utf-8")
            _safe_load.save_tensors(data, stage / weights_name, safe_serialization=safe_serialization)
            card = write_model_card(root / MODEL_CARD_NAME, stage / MODEL_CARD_NAME, stored, tags)
            for file in stage.iterdir():
                _atomic_write.fsync_file(file)
            _atomic_write.commit(
                stage, directory, weights_files=[weights_name], config_file=CONFIG_NAME, stale_files=[stale_name]
            )
            if card:  # last and by itself, since no adapter depends on it
                try:
                    _atomic_write.move_keeping_mode(stage / MODEL_CARD_NAME, root / MODEL_CARD_NAME)
                except (OSError, CheckpointError) as exc:
                    warnings.warn(f"{root / MODEL_CARD_NAME} could not be updated: {exc}", AdaptcWarning, stacklevel=2)
        _atomic_write.remove_abandoned(directory, with_old_files=True)
    except CheckpointError:
        raise
    except Exception as exc:  # safetensors, torch and the OS each have their own types for a full disk
        reason = f"{type(exc).__name__}: {exc}"
        raise CheckpointError(
            f"could not write {directory / weights_name} ({reason}). What was there before is unchanged."
        ) from exc
    return directory


def check_finite(tensors: Mapping[str, Tensor], source: str | os.PathLike[str] = "the adapter") -> None:
    """Raise CheckpointError, naming the first key, when a floating tensor holds NaN or infinity. Reads all data."""
    if all_finite(tensors.values()):
        return
    for key, t in tensors.items():
        if not (t.is_floating_point() or t.is_complex()):
            continue
        bad = ~torch.isfinite(t.float() if t.is_floating_point() and t.itemsize == 1 else t)
        if count := int(bad.sum()):
            first = tuple(to_python(bad.nonzero()[0]))
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
