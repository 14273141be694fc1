"""Find the weights of a model among the matrices of the GGUF file that it was loaded from.

transformers dequantises a GGUF file when it loads one, renames its tensors and puts rows of some in another order. A
weight is found by its values, so names and orders of no architecture are written here. The values of a matrix of blocks
are made, and each of its rows has a hash. A weight of the same hashes is that matrix, in the order that they tell. It
takes the blocks over only where every value is equal.

A file stores the experts of a layer as stacks of matrices. transformers joins those of two projections in one
parameter, so the rows of a weight may also be those of two matrices.

File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, NamedTuple

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
    """A matrix of a GGUF file that is stored in blocks, or a stack of matrices with the rows of one after another.

    Attributes:
        name: its name in the file, such as "blk.0.attn_q.weight".
        quant_type: the number of the type of its blocks.
        data: uint8 (rows, bytes of a row), in the file's memory.
        is_stack: whether the file stores it as a stack.
    """

    name: str
    quant_type: int
    data: Tensor
    is_stack: bool = False

    @property
    def type_name(self) -> str:
        """Return the name of the type of the blocks."""
        return str(getattr(self.quant_type, "name", self.quant_type))

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, columns). Raises CaptureError for blocks of a type that is not read."""
        kind = block_type(self.quant_type)
        return self.data.shape[0], self.data.shape[1] // kind.nbytes * kind.elements

    def quantized(self, dtype: torch.dtype) -> QuantizedTensor:
        """Return the weight (rows, columns) of ``dtype`` that the blocks store."""
        return QuantizedTensor(*rewrite_blocks(self.data, self.quant_type), self.shape, dtype)


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
        GgufMatrix(t.name, t.tensor_type, torch.from_numpy(t.data).flatten(0, -2), t.data.ndim == 3)
        for t in tensors
        if int(t.tensor_type) not in _PLAIN_TYPES and t.data.ndim in (2, 3)
    ]


class WeightLayout(NamedTuple):
    """A weight of a model, with the options of a :class:`QuantizedTensor`."""

    tensor: Tensor
    is_transposed: bool = False
    row_axes: int = 1

    @property
    def rows(self) -> Tensor:
        """Return the matrix (rows, columns) that is stored."""
        weight = self.tensor.detach()
        return (weight.transpose(-2, -1) if self.is_transposed else weight).flatten(0, self.row_axes - 1)


@dataclass(frozen=True)
class WeightInFile:
    """A weight whose rows are those of some matrices of a file, all of one type.

    ``order`` (rows,) has the number of each row among those of the matrices, one after another; None for their order.
    """

    matrices: tuple[GgufMatrix, ...]
    order: Tensor | None
    layout: WeightLayout

    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return ``weight`` as the file stores it."""
        data = self.matrices[0].data if len(self.matrices) == 1 else torch.cat([m.data for m in self.matrices])
        data = data if self.order is None else data[self.order]
        stored = rewrite_blocks(data, self.matrices[0].quant_type)
        return QuantizedTensor(*stored, weight.shape, weight.dtype, *self.layout[1:])


class _HashedMatrix(NamedTuple):
    """A matrix and the hashes (rows,) of its rows, as values of some dtype.

    ``total``, their sum, tells matrices apart whatever the order of their rows.
    """

    matrix: GgufMatrix
    hashes: Tensor
    total: int


def find_weights(matrices: Sequence[GgufMatrix], weights: Mapping[str, WeightLayout]) -> dict[str, WeightInFile]:
    """Return the weights, by name, that ``matrices`` store, value for value.

    Matrices in blocks of a type that is not read store no weight.
    """
    shapes = {tuple(w.rows.shape) for w in weights.values()}
    # Half of the rows of a stack of experts may be those of another projection.
    shapes |= {(w.rows.shape[0] // 2, w.rows.shape[1]) for w in weights.values() if w.row_axes == 2}
    dtypes = {w.tensor.dtype for w in weights.values()}
    hashed: dict[tuple[int, torch.dtype], list[_HashedMatrix]] = {}
    for matrix in matrices:
        if int(matrix.quant_type) not in BLOCK_TYPES or matrix.shape not in shapes:
            continue
        values = matrix.quantized(torch.float32).dequantize()
        for dtype in dtypes:
            hashes = _row_hashes(values.to(dtype))
            known = hashed.setdefault((matrix.shape[1], dtype), [])
            known.append(_HashedMatrix(matrix, hashes, int(hashes.sum())))
    found: dict[str, WeightInFile] = {}
    for name, layout in weights.items():
        rows = layout.rows
        if not (known := hashed.get((rows.shape[1], rows.dtype))):
            continue
        hashes = _row_hashes(rows)
        if not (parts := _parts_with(hashes, known, layout.row_axes == 2)):
            continue
        own = torch.cat([p.hashes for p in parts])
        order = None if torch.equal(own, hashes) else _order_of(own, hashes)
        stored = WeightInFile(tuple(p.matrix for p in parts), order, layout)
        if torch.equal(stored.quantized(layout.tensor).dequantize(), layout.tensor):
            found[name] = stored
    return found


def _parts_with(hashes: Tensor, known: Sequence[_HashedMatrix], is_stack: bool) -> list[_HashedMatrix]:
    """Return the matrix that seems to have rows of these hashes, or two stacks that have them, or nothing."""
    count, total = hashes.shape[0], int(hashes.sum())
    by_total = {(len(k.hashes), k.total): k for k in reversed(known)}
    if (one := by_total.get((count, total))) is not None:
        return [one]
    for first in known if is_stack else ():
        # Sums of hashes wrap around at 64 bits.
        rest = (total - first.total + 2**63) % 2**64 - 2**63
        second = by_total.get((count - len(first.hashes), rest))
        pair = [k.matrix for k in (first, second) if k is not None and k.matrix.is_stack]
        if second is not None and len(pair) == 2 and pair[0].quant_type == pair[1].quant_type:
            return [first, second]
    return []


def describe_unfound(matrices: Sequence[GgufMatrix], found: Mapping[str, WeightInFile]) -> str:
    """Return what to say of matrices that no weight of the model was found for, or "" where there are none."""
    used = {m.name for w in found.values() for m in w.matrices}
    rest = [m for m in matrices if m.name not in used]
    if not rest:
        return ""
    types = ", ".join(f"{n} of {t}" for t, n in sorted(Counter(m.type_name for m in rest).items()))
    return (
        f"{len(rest)} of the {len(matrices)} matrices in blocks ({types}), such as {rest[0].name!r}, are no weight of "
        f"the model value for value (blocks of {', '.join(b.name for b in BLOCK_TYPES.values())} are read)"
    )


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
