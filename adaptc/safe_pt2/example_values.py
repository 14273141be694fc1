"""Read the example inputs of a program from the pickle in its file.

Only tensors and plain values are read, in containers that torch knows (see :mod:`adaptc.archives.containers`).
"""

from __future__ import annotations

import io
import pickle
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.archives.archive import Archive
from adaptc.archives.names import check_plain
from adaptc.archives.refusal import UnsafeFile, describe_error, short_repr
from adaptc.passes.graph.pytree import pytree

_MAX_VALUES = 100_000
_MAX_DEPTH = 100
_MAX_PICKLE_BYTES = 16 << 20
_MAX_EXPANDED_BYTES = 1 << 30
_REMEDY = "save the program again with example inputs that are tensors, numbers and texts"


def read_example_inputs(data: bytes) -> Any:
    """Return (positional inputs, keyword inputs), or None where the record is empty.

    Raises UnsafeFile for what could run code, for anything but tensors and plain values, and for decompression bombs.
    It changes a global table of torch while it runs: hold :data:`~adaptc.passes.graph.graph_lock.GRAPH_LOCK`.
    """
    if not data:
        return None
    inner = Archive(io.BytesIO(data))
    for name, record in inner.records.items():
        if name.endswith(".pkl") and record.size > _MAX_PICKLE_BYTES:
            raise UnsafeFile(f"its pickle has {record.size} bytes; those of example inputs have a few hundred")
        inner.read_record(name, record.size)  # compares the checksum
    try:
        with torch.serialization.safe_globals(list(_allowed_classes())):
            value = torch.load(io.BytesIO(data), weights_only=True)
    except (pickle.UnpicklingError, AttributeError) as error:
        call = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it would call {call[1]}" if call else f"it is no pickle of plain values ({describe_error(error)})"
        raise UnsafeFile(f"{why}. A pickle can run code: {_REMEDY}") from error
    except Exception as error:  # unpickling forged bytes raises anything
        raise UnsafeFile(describe_error(error)) from error
    args_kwargs = isinstance(value, tuple) and len(value) == 2
    if not args_kwargs or not isinstance(value[0], tuple) or not isinstance(value[1], dict):
        raise UnsafeFile(f"expected positional and keyword inputs, found a {type(value).__name__}")
    _ValueChecker().check(value, 0)
    return value


def _allowed_classes() -> set[type]:
    """Return the classes of containers of tensors that inputs may have.

    These are the classes that somebody registered with torch in this process, and those of transformers' caches.
    """
    found = {cls for cls in pytree.SUPPORTED_SERIALIZED_TYPES if isinstance(cls, type) and cls.__module__ != "builtins"}
    caches: Any = sys.modules.get("transformers.cache_utils")
    if caches is not None:
        kinds = (caches.Cache, caches.CacheLayerMixin)
        found |= {c for c in vars(caches).values() if isinstance(c, type) and issubclass(c, kinds)}
    return found


class _ValueChecker:
    """A check of nested containers with limits, since a pickle may nest them, or use one in many places, without
    end."""

    def __init__(self) -> None:
        self.value_count = 0
        self.classes = _allowed_classes()

    def check(self, value: Any, depth: int) -> None:
        self.value_count += 1
        if self.value_count > _MAX_VALUES or depth > _MAX_DEPTH:
            raise UnsafeFile(f"it holds more than {_MAX_VALUES} values, or {_MAX_DEPTH} containers inside one another")
        if isinstance(value, Tensor):
            _check_tensor(value)
        elif isinstance(value, dict):
            for key, v in value.items():
                self._check_key(key)
                self.check(v, depth + 1)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for v in value:
                self.check(v, depth + 1)
        elif isinstance(value, str):
            check_plain(value)
        elif type(value) in self.classes:
            self.check(vars(value), depth + 1)
        elif isinstance(value, type) and value in self.classes:
            pass
        elif not isinstance(value, (type(None), bool, int, float, complex, torch.dtype, torch.device, torch.layout)):
            raise UnsafeFile(f"it holds a {type(value).__name__}; {_REMEDY}")

    @staticmethod
    def _check_key(key: Any) -> None:
        # torch prints keys into the source of a module's guards.
        if isinstance(key, str):
            check_plain(key)
        elif not isinstance(key, (type(None), bool, int, float)):
            raise UnsafeFile(f"expected keys that are texts or numbers, found {short_repr(key)}")


def _check_tensor(t: Tensor) -> None:
    if type(t) not in (Tensor, nn.Parameter):
        raise UnsafeFile(f"it holds a {type(t).__name__}; {_REMEDY}")
    if t.layout == torch.strided and not t.is_meta and t.nbytes > t.untyped_storage().nbytes() + _MAX_EXPANDED_BYTES:
        raise UnsafeFile(f"it holds a tensor of sizes {list(t.shape)} that has {t.untyped_storage().nbytes()} bytes")
