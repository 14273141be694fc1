"""Rewrite blocks of GGUF files to the layout of ``IntegerScheme``, with every code and scale kept.

A row of a matrix is a run of blocks. Of these types of blocks, with the bytes of each in order:

    Q8_0   32 elements, 34 bytes: float16 scale, int8 codes
    Q4_0   32 elements, 18 bytes: float16 scale, codes of element i and i + 16 in the halves of byte i, plus 8
    Q4_1   32 elements, 20 bytes: float16 scale, float16 value of code 0, codes as in Q4_0
    Q4_K   256 elements, 144 bytes: float16 units of scales and minimums, 8 scales and 8 minimums of 6 bits in 12 bytes,
           then codes: bytes of 64 elements, of which the first 32 are in the low halves
    Q6_K   256 elements, 210 bytes: the low 4 bits of the codes, their high 2 bits, 16 int8 scales, the scales' float16
           unit; codes are plus 32

Source: the structs ``block_q8_0``, ``block_q4_0``, ``block_q4_1``, ``block_q4_K`` and ``block_q6_K`` of ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adaptc.errors import CaptureError
from adaptc.passes.quantized.integer_scheme import IntegerScheme, pack_nibbles


class BlockType(NamedTuple):
    """A type of blocks: its name, how many elements and bytes a block has, its scheme, and how blocks are rewritten.

    ``rewrite`` takes blocks (rows, blocks, bytes), uint8, and returns the tensors that the scheme stores, by role.
    """

    name: str
    elements: int
    nbytes: int
    scheme: IntegerScheme
    rewrite: Callable[[Tensor], dict[str, Tensor]]


def block_type(quant_type: int) -> BlockType:
    """Return the type of blocks with the number ``quant_type``. Raises CaptureError for a type that is not read."""
    known = BLOCK_TYPES.get(int(quant_type))
    if known is None:
        name = getattr(quant_type, "name", f"number {int(quant_type)}")
        raise CaptureError(
            f"its blocks are of the GGUF type {name}, and {', '.join(b.name for b in BLOCK_TYPES.values())} are read"
        )
    return known


def rewrite_blocks(data: Tensor, quant_type: int) -> tuple[IntegerScheme, dict[str, Tensor]]:
    """Return the scheme of a matrix of blocks, and the tensors that it stores by role.

    ``data`` is uint8 (rows, bytes of a row). Raises CaptureError for a type that is not read, and where a row is no
    whole number of blocks.
    """
    kind = block_type(quant_type)
    if data.ndim != 2 or data.dtype != torch.uint8 or data.shape[1] % kind.nbytes:
        raise CaptureError(
            f"its blocks must be uint8 (rows, a multiple of {kind.nbytes}) for {kind.name}, and are {data.dtype} "
            f"{tuple(data.shape)}"
        )
    return kind.scheme, kind.rewrite(data.reshape(data.shape[0], -1, kind.nbytes))


def _half(blocks: Tensor, start: int) -> Tensor:
    """Return the float16 number at byte ``start`` of each block, (rows, blocks)."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16)[..., 0]


def _rows(values: Tensor) -> Tensor:
    """Return values (rows, blocks, ...) as (rows, values of a row)."""
    return values.reshape(values.shape[0], -1).contiguous()


def _q8_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": _rows(blocks[..., 2:].view(torch.int8)), "scales": _half(blocks, 0).contiguous()}


def _q4_0(blocks: Tensor) -> dict[str, Tensor]:
    codes = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)
    return {"codes": pack_nibbles(_rows(codes)), "scales": _half(blocks, 0).contiguous()}


def _q4_1(blocks: Tensor) -> dict[str, Tensor]:
    codes = torch.cat([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)
    scales, lowest = _half(blocks, 0).contiguous(), _half(blocks, 2).contiguous()
    return {"codes": pack_nibbles(_rows(codes)), "scales": scales, "minimums": -lowest}


def _q4_k(blocks: Tensor) -> dict[str, Tensor]:
    first, second, last = (blocks[..., i : i + 4] for i in (4, 8, 12))
    scales = torch.cat([first & 63, (last & 15) | ((first >> 6) << 4)], -1)
    minimums = torch.cat([second & 63, (last >> 4) | ((second >> 6) << 4)], -1)
    chunks = blocks[..., 16:].unflatten(-1, (4, 32))
    codes = torch.stack([chunks & 15, chunks >> 4], -2)
    return {
        "codes": pack_nibbles(_rows(codes)),
        "scales": _rows(scales),
        "minimums": _rows(minimums),
        "super_scales": _half(blocks, 0).contiguous(),
        "super_minimums": _half(blocks, 2).contiguous(),
    }


def _q6_k(blocks: Tensor) -> dict[str, Tensor]:
    low = blocks[..., :128].unflatten(-1, (2, 64))  # each half of a block has 128 elements
    high = blocks[..., 128:192].unflatten(-1, (2, 32))
    low = _rows(torch.cat([low & 15, low >> 4], -1))
    high = _rows(torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -1))
    return {
        "codes": pack_nibbles(low),
        "high_codes": high[:, 0::4] | (high[:, 1::4] << 2) | (high[:, 2::4] << 4) | (high[:, 3::4] << 6),
        "scales": _rows(blocks[..., 192:208].view(torch.int8)),
        "super_scales": _half(blocks, 208).contiguous(),
    }


#: number of a type in GGUF files -> the type
BLOCK_TYPES: dict[int, BlockType] = {
    8: BlockType("Q8_0", 32, 34, IntegerScheme(group_size=32, scale_dtype="float16"), _q8_0),
    2: BlockType("Q4_0", 32, 18, IntegerScheme(bits=4, group_size=32, offset=8, scale_dtype="float16"), _q4_0),
    3: BlockType("Q4_1", 32, 20, IntegerScheme(bits=4, group_size=32, scale_dtype="float16", has_minimums=True), _q4_1),
    12: BlockType(
        "Q4_K",
        256,
        144,
        IntegerScheme(bits=4, group_size=32, scale_dtype="uint8", has_minimums=True, super_group=256),
        _q4_k,
    ),
    14: BlockType(
        "Q6_K", 256, 210, IntegerScheme(bits=6, group_size=16, offset=32, scale_dtype="int8", super_group=256), _q6_k
    ),
}
