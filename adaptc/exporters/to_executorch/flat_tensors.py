"""Write the tensors of an adapter as a ``.ptd`` file of ExecuTorch for one program, and read such files.

ExecuTorch's ``FlatTensorDataMap`` reads them in C++, by the names of the inputs. The entry ``adaptc`` has the
fingerprint of the program's base. A seal at the end of the file tells damage.

Private executorch use: the classes of ``exir._serialize.data_serializer``, which its public ``FlatTensorSerializer``
takes and gives.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import BackendError, CheckpointError
from adaptc.exporters.adapter_feeds import METADATA_KEY
from adaptc.exporters.file_seal import add_seal, check_seal
from adaptc.exporters.runtime_session import runtime_error

_ALIGNMENT = 16
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def import_executorch(module: str) -> Any:
    """Return a module of executorch. Raises BackendError where it is not installed."""
    try:
        return importlib.import_module(f"executorch.{module}")
    except ImportError as error:
        raise BackendError(f"this needs executorch: pip install 'adaptc[executorch]' ({error})") from error


def write_flat_tensors(tensors: Mapping[str, Tensor], path: Path, fingerprint: str) -> None:
    """Write tensors for the program with ``fingerprint``. Raises OSError."""
    entries, layout = import_executorch("exir._serialize.data_serializer"), import_executorch("exir.tensor_layout")
    buffers, named = [fingerprint.encode()], {METADATA_KEY: entries.DataEntry(0, 1, None)}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # Its layout has the order of the axes, which strides do not tell where a size is one.
        standard = torch.empty_strided(plain.shape, _strides(plain.shape), dtype=plain.dtype, device="meta")
        named[name] = entries.DataEntry(len(buffers), _ALIGNMENT, layout.TensorLayout.from_tensor(standard))
        buffers.append(plain.flatten().view(torch.uint8).numpy().tobytes())
    path.write_bytes(bytes(_serializer().serialize(entries.DataPayload(buffers, named))))
    add_seal(path)


def read_flat_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a file that :func:`write_flat_tensors` wrote, and the fingerprint of its program.

    Raises CheckpointError for any other file, and for a damaged one.
    """
    check_seal(path, writer="adaptc.exporters.save_executorch_adapter")
    scalar_type = import_executorch("exir.tensor").scalar_type_enum
    dtypes = {scalar_type(d): d for d in _DTYPES}
    try:
        payload = _serializer().deserialize(import_executorch("exir._serialize._cord").Cord(path.read_bytes()))
        found: dict[str, Tensor] = {}
        for name, entry in payload.named_data.items():
            if entry.tensor_layout is not None:
                layout, data = entry.tensor_layout, bytearray(payload.buffers[entry.buffer_index])
                found[name] = torch.frombuffer(data, dtype=dtypes[layout.scalar_type]).reshape(layout.sizes)
        fingerprint = bytes(payload.buffers[payload.named_data[METADATA_KEY].buffer_index]).decode()
    except Exception as error:
        raise CheckpointError(f"{path} is no adapter file, or is damaged: {runtime_error(error)}") from error
    return found, fingerprint


def _serializer() -> Any:
    return import_executorch("extension.flat_tensor.serialize.serialize").FlatTensorSerializer()


def _strides(shape: torch.Size) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return strides[: len(shape)]
