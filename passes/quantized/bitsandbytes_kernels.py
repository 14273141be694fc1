"""Read NF4 and FP4 weights with bitsandbytes' kernels for a CPU, where it is installed.

    dequantize_matrix   any float dtype: the values of ``TableScheme``, bit for bit, and about ten times as fast
    multiply_few_rows   bfloat16 on CPUs with AVX-512 BF16: on the codes, in another order, with scales in bfloat16

A library that is missing, or whose kernels compute anything else, is not used. The first kernel takes wrong scales
where a row is no whole number of blocks, so it is not asked then.

Private use of bitsandbytes: ``functional._convert_weight_packed_for_cpu`` puts codes in the order of the second kernel.
Public: none; its layer calls it in its forward.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from adaptc.passes.quantized.scheme import Scheme
from adaptc.passes.quantized.table_scheme import TABLES, TableScheme
from adaptc.torch_modes import in_dispatch_mode, in_transform
from adaptc.torch_typing import vector_norm

_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: the number of rows of an input up to which the second kernel is faster than a matmul of dequantised values
MAX_ROWS = 64
#: the library's function that puts codes in the order of the second kernel
_PACKER = "_convert_weight_packed_for_cpu"
#: the rows of a weight that the second kernel takes at once
_ROW_BLOCK = 32
#: the block size from which the library's own dequantisation avoids its kernel
_TOO_LARGE = 2048


def dequantize_matrix(
    scheme: Scheme, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the matrix (rows, columns) that ``stored`` has, in ``dtype``: by a kernel, or as ``scheme`` says."""
    if isinstance(scheme, TableScheme) and not (is_compiling() or in_transform() or in_dispatch_mode()):
        plain, tensors = scheme.with_plain_scales(stored)
        if isinstance(plain, TableScheme) and all(type(t) in _PLAIN for t in tensors.values()):
            values = dequantize_blocks(plain, tensors, rows * columns, dtype)
            if values is not None:
                return values.reshape(rows, columns)
    return scheme.dequantize(stored, rows, columns).to(dtype)


def dequantize_blocks(
    scheme: TableScheme, stored: Mapping[str, Tensor], count: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the ``count`` values (count,) that ``stored`` has, in ``dtype``; None where no kernel has them.

    The scales must not be quantised.
    """
    codes, scales = stored["codes"], stored["scales"]
    if codes.device.type != "cpu" or scheme.scale_block or count % scheme.block_size or scheme.block_size % 2:
        return None
    if scheme.block_size >= _TOO_LARGE or dtype not in _DTYPES or not count:
        return None
    if _library() is None or not _has_own_table(scheme, stored["table"]):
        return None
    shape = (count // scheme.block_size, scheme.block_size)
    ops: Any = torch.ops.bitsandbytes
    values: Tensor = ops.dequantize_4bit(
        codes.contiguous(), scales.contiguous(), scheme.block_size, scheme.table, shape, dtype
    )
    return values.reshape(-1)


def pack_weight(scheme: TableScheme, stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the copy of a weight's codes and scales that :func:`multiply_few_rows` reads, or () where there is none.

    ``shape`` is (rows, columns). The scales must not be quantised.
    """
    rows, columns = shape
    if rows % _ROW_BLOCK or columns % scheme.block_size or columns % 2 or stored["codes"].device.type != "cpu":
        return ()
    if not _multiplies(scheme.table) or not _has_own_table(scheme, stored["table"]):
        return ()
    return _pack(scheme, stored, (rows, columns))


def multiply_few_rows(x: Tensor, scheme: TableScheme, packed: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return x W^T (n, rows), bfloat16, of the weight that was ``packed``, for ``x`` (n, columns), bfloat16."""
    codes, scales = packed
    ops: Any = torch.ops.bitsandbytes
    found: Tensor = ops.gemv_4bit(x, codes, tuple(shape), scales, _table(scheme.table), scheme.block_size)
    return found


@lru_cache(maxsize=1)
def _library() -> Any:
    """Return bitsandbytes' module of functions, or None where it is missing or fails to load."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its import recommends packages, to users who need not know that it is there
    try:
        return importlib.import_module("bitsandbytes.functional")
    except Exception:  # a library that is built for another torch raises whatever its loader meets
        return None
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=8)
def _table(name: str) -> Tensor:
    return torch.tensor(TABLES[name], dtype=torch.float32)


def _has_own_table(scheme: TableScheme, table: Tensor) -> bool:
    """Return whether the weight's table is the one that is built into the kernels."""
    return torch.equal(table, _table(scheme.table))


@lru_cache(maxsize=8)
def _multiplies(table: str) -> bool:
    """Return whether the second kernel is there, and computes what it should."""
    library = _library()
    if not hasattr(library, _PACKER) or not getattr(library, "has_avx512bf16", lambda: False)():
        return False
    scheme = TableScheme(table, block_size=64)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 128, generator=draw).bfloat16()
    stored = scheme.quantize(torch.randn(2 * _ROW_BLOCK, 128, generator=draw))
    values = scheme.dequantize(stored, 2 * _ROW_BLOCK, 128)
    expected = F.linear(x.float(), values)
    try:
        packed = _pack(scheme, stored, (2 * _ROW_BLOCK, 128))
        found = multiply_few_rows(x, scheme, packed, (2 * _ROW_BLOCK, 128))
    except Exception:  # another release may have another packing
        return False
    return float(vector_norm(found.float() - expected)) < 0.02 * float(vector_norm(expected))


def _pack(scheme: TableScheme, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, ...]:
    library = _library()
    state = library.QuantState(
        absmax=stored["scales"],
        shape=torch.Size(shape),
        code=_table(scheme.table),
        blocksize=scheme.block_size,
        quant_type=scheme.table,
        dtype=torch.bfloat16,
    )
    codes, state = getattr(library, _PACKER)(stored["codes"], state)
    return codes, state.absmax
