"""Find the weights of a model among the matrices of the GGUF file that it was loaded from.

transformers dequantises a GGUF file when it loads one, renames its tensors and puts rows of some in another order. A
weight is found by its values, so names and orders of no architecture are written here. The values of a matrix of blocks
are made, and each of its rows has a hash. A weight of the same hashes is that matrix, in the order that they tell. It
takes the blocks over only where every value is equal.

File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.gguf_blocks import BLOCK_TYPES, block_type, rewrite_blocks

#: types of a file's tensors that hold plain numbers: float32, float16, float64, bfloat16, integers
_PLAIN_TYPES = frozenset({0, 1, 24, 25, 26, 27, 28, 30})
#: how many values are hashed at once
_HASHED_VALUES = 1 << 22


@dataclass(frozen=True)
class GgufMatrix:
    """A matrix of a GGUF file that is stored in blocks.

    Attributes:
        name: its name in the file, such as "blk.0.attn_q.weight".
        quant_type: the number of the type of its blocks.
        data: uint8 (rows, bytes of a row), in the file's memory.
    """

    name: str
    quant_type: int
    data: Tensor

    @property
    def type_name(self) -> str:
        """Return the name of the type of the blocks."""
        return str(getattr(self.quant_type, "name", self.quant_type))

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, columns). Raises CaptureError for blocks of a type that is not read."""
        kind = block_type(self.quant_type)
        return self.data.shape[0], self.data.shape[1] // kind.nbytes * kind.elements

    def quantized(
        self, dtype: torch.dtype, order: Tensor | None = None, is_transposed: bool = False
    ) -> QuantizedTensor:
        """Return the weight of ``dtype`` that the blocks store, with its rows in ``order`` (rows,)."""
        data = self.data if order is None else self.data[order]
        scheme, stored = rewrite_blocks(data, self.quant_type)
        shape = self.shape[::-1] if is_transposed else self.shape
        return QuantizedTensor(scheme, stored, shape, dtype, is_transposed)


def read_gguf_matrices(path: str | PathLike[str]) -> list[GgufMatrix]:
    """Return the matrices of a GGUF file that are stored in blocks.

    Raises ConfigError without the package ``gguf``, and CheckpointError for a file that is missing or damaged.
    """
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:
        raise ConfigError(
            "GGUF files are read with the package gguf, which is not installed: pip install gguf"
        ) from None
    name = fspath(path)
    try:
        # "c" maps the file's memory so that torch takes it without a copy; nothing is ever written to it.
        tensors = gguf.GGUFReader(name, "c").tensors
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {name!r}; gguf_file is the one that the model was read from") from None
    except Exception as error:  # a damaged file raises whatever numpy and the reader meet in it
        raise CheckpointError(f"{name!r} is no GGUF file that can be read: {type(error).__name__}: {error}") from error
    return [
        GgufMatrix(t.name, t.tensor_type, torch.from_numpy(t.data))
        for t in tensors
        if int(t.tensor_type) not in _PLAIN_TYPES and t.data.ndim == 2
    ]


@dataclass(frozen=True)
class WeightInMatrix:
    """A weight that a matrix of a file stores, with its rows in ``order`` (rows,); None for the order of the file."""

    matrix: GgufMatrix
    order: Tensor | None

    def quantized(self, weight: Tensor, is_transposed: bool = False) -> QuantizedTensor:
        """Return ``weight`` as the file stores it."""
        return self.matrix.quantized(weight.dtype, self.order, is_transposed)


def find_weights(
    matrices: Sequence[GgufMatrix], weights: Mapping[str, tuple[Tensor, bool]]
) -> dict[str, WeightInMatrix]:
    """Return the weights, by name, that ``matrices`` store, value for value.

    ``weights`` maps a name to a tensor, and to whether the tensor is stored as (in, out). Matrices in blocks of a type
    that is not read store no weight.
    """
    shapes = {tuple(_as_rows(*w).shape) for w in weights.values()}
    dtypes = {w.dtype for w, _ in weights.values()}
    hashed: dict[tuple[object, ...], tuple[GgufMatrix, Tensor]] = {}
    for matrix in matrices:
        if int(matrix.quant_type) not in BLOCK_TYPES or matrix.shape not in shapes:
            continue
        values = matrix.quantized(torch.float32).dequantize()
        for dtype in dtypes:
            hashes = _row_hashes(values.to(dtype))
            hashed.setdefault((*matrix.shape, dtype, int(hashes.sum())), (matrix, hashes))
    found: dict[str, WeightInMatrix] = {}
    for name, (tensor, is_transposed) in weights.items():
        rows = _as_rows(tensor, is_transposed)
        if not any(m.shape == tuple(rows.shape) for m, _ in hashed.values()):
            continue
        hashes = _row_hashes(rows)
        same = hashed.get((*rows.shape, rows.dtype, int(hashes.sum())))
        if same is None:
            continue
        order = None if torch.equal(same[1], hashes) else _order_of(same[1], hashes)
        if torch.equal(same[0].quantized(rows.dtype, order).dequantize(), rows):
            found[name] = WeightInMatrix(same[0], order)
    return found


def describe_unfound(matrices: Sequence[GgufMatrix], found: Mapping[str, WeightInMatrix]) -> str:
    """Return what to say of matrices that no weight of the model was found for, or "" where there are none."""
    used = {w.matrix.name for w in found.values()}
    rest = [m for m in matrices if m.name not in used]
    if not rest:
        return ""
    types = ", ".join(f"{n} of {t}" for t, n in sorted(Counter(m.type_name for m in rest).items()))
    return (
        f"{len(rest)} of the {len(matrices)} matrices in blocks ({types}), such as {rest[0].name!r}, are no weight of "
        f"the model value for value (blocks of {', '.join(b.name for b in BLOCK_TYPES.values())} are read)"
    )


def _as_rows(tensor: Tensor, is_transposed: bool) -> Tensor:
    return tensor.detach().t() if is_transposed else tensor.detach()


def _row_hashes(matrix: Tensor) -> Tensor:
    """Return a hash (rows,), int64, of the bits of each row of ``matrix`` (rows, columns).

    Zeros of both signs have one hash.
    """
    columns = matrix.shape[1]
    draw = torch.Generator().manual_seed(columns)
    keys = torch.randint(-(2**62), 2**62, (columns,), generator=draw) | 1
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.itemsize]
    step = max(1, _HASHED_VALUES // max(columns, 1))
    return torch.cat([((part + 0.0).view(bits).long() * keys).sum(1) for part in _row_blocks(matrix, step)])


def _row_blocks(matrix: Tensor, step: int) -> Iterator[Tensor]:
    for start in range(0, matrix.shape[0], step):
        yield matrix[start : start + step].contiguous()


def _order_of(hashes: Tensor, wanted: Tensor) -> Tensor:
    """Return indices (n,) with ``hashes[indices] == wanted`` where the two hold the same numbers."""
    order = torch.empty_like(hashes)
    order[wanted.argsort(stable=True)] = hashes.argsort(stable=True)
    return order
