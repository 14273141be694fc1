"""Store a matrix as indices into a table of sixteen values, scaled by blocks: NF4 and FP4, as bitsandbytes does.

Blocks run over the flattened matrix, so they may go on in the next row. An element's value is its table entry times the
largest magnitude of its block. The tensors, for a matrix of n elements:

    codes            uint8 (n / 2,), two indices each, the first in the high half
    table            float32 (16,), the values
    scales           float32 (blocks,), the largest magnitudes; with ``scale_block`` they are uint8, indices into:
    scale_table      float32 (256,), multiplied by super_scales, float32 (blocks / scale_block,), and added to
                     scale_offset, float32 ()

Source: Dettmers et al., QLoRA (2023), section 3; the layout is that of bitsandbytes' ``QuantState``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import ConfigError
from adaptc.passes.quantized.scheme import Scheme, StoredTensor, require_matrix

#: table name -> its values, by code
TABLES: dict[str, tuple[float, ...]] = {
    # The quantiles of a normal distribution, with zero among them.
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # A sign, two bits of exponent and one of mantissa, divided by the largest value.
    "fp4": tuple(sign * v for sign in (1, -1) for v in (0, 0.0052083333, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25)),
}


@dataclass(frozen=True)
class TableScheme(Scheme):
    """Indices into a table with a scale per block of the flattened matrix.

    Attributes:
        table: "nf4" or "fp4".
        block_size: the number of elements that share a scale.
        scale_block: the number of scales that share a unit (double quantisation); 0 for scales that are stored plain.
    """

    name: ClassVar[str] = "table"

    table: str = "nf4"
    block_size: int = 64
    scale_block: int = 0

    def __post_init__(self) -> None:
        if self.table not in TABLES:
            raise ConfigError(f"table={self.table!r} is not one of {', '.join(TABLES)}")
        if self.block_size < 1 or self.scale_block < 0:
            raise ConfigError(f"block_size={self.block_size}: the number of elements that share a scale")

    def __str__(self) -> str:
        return f"{self.table} in blocks of {self.block_size}{', quantised scales' if self.scale_block else ''}"

    def layout(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        count = rows * columns
        blocks = -(-count // self.block_size)
        stored = {
            "codes": StoredTensor((-(-count // 2),), torch.uint8),
            "table": StoredTensor((16,), torch.float32),
            "scales": StoredTensor((blocks,), torch.uint8 if self.scale_block else torch.float32),
        }
        if self.scale_block:
            stored["scale_table"] = StoredTensor((256,), torch.float32)
            stored["super_scales"] = StoredTensor((-(-blocks // self.scale_block),), torch.float32)
            stored["scale_offset"] = StoredTensor((), torch.float32)
        return stored

    def dequantize(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        count, codes = rows * columns, stored["codes"]
        # A byte's two values at once: looking up bytes is many times faster than taking them apart.
        table = stored["table"]
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)
        values = pairs.index_select(0, codes.int()).reshape(-1)[:count]
        return _by_blocks(values, self.block_scales(stored), self.block_size).reshape(rows, columns)

    def has_codes_of(self, other: Scheme) -> bool:
        return isinstance(other, TableScheme) and replace(self, scale_block=0) == replace(other, scale_block=0)

    def with_plain_scales(self, stored: Mapping[str, Tensor]) -> tuple[Scheme, Mapping[str, Tensor]]:
        if not self.scale_block:
            return self, stored
        plain = {"codes": stored["codes"], "table": stored["table"], "scales": self.block_scales(stored)}
        return replace(self, scale_block=0), plain

    def select_rows(
        self, stored: Mapping[str, Tensor], shape: Sequence[int], rows: slice | Tensor
    ) -> tuple[Scheme, dict[str, Tensor]] | None:
        count, columns = shape
        unit = self.block_size if self.block_size % 2 == 0 else 2 * self.block_size
        device = stored["codes"].device
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(count)
            first, last = start * columns, stop * columns
            if first % unit or (last % unit and stop != count):
                return None
            codes = stored["codes"][first // 2 : -(-last // 2)]
            blocks = torch.arange(first // self.block_size, -(-last // self.block_size), device=device)
        elif columns % unit:
            return None
        else:
            codes = stored["codes"].reshape(count, -1)[rows].reshape(-1)
            per_row = columns // self.block_size
            blocks = (rows[:, None] * per_row + torch.arange(per_row, device=device)).reshape(-1)
        scales = stored["scales"][blocks]
        if self.scale_block:
            units = stored["super_scales"][blocks // self.scale_block]
            scales = stored["scale_table"][scales.int()] * units + stored["scale_offset"]
        return replace(self, scale_block=0), {"codes": codes, "scales": scales, "table": stored["table"]}

    def block_scales(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the scales (blocks,), float32."""
        scales = stored["scales"]
        if not self.scale_block:
            return scales
        values = stored["scale_table"][scales.int()]
        return _by_blocks(values, stored["super_scales"], self.scale_block) + stored["scale_offset"]

    def quantize(self, matrix: Tensor) -> dict[str, Tensor]:
        values = require_matrix(matrix).reshape(-1)
        blocks = F.pad(values, (0, -len(values) % self.block_size)).reshape(-1, self.block_size)
        scales = blocks.abs().amax(1)
        stored: dict[str, Tensor] = {"scales": scales}
        if self.scale_block:
            stored = _quantize_scales(scales, self.scale_block)
        used = self.block_scales(stored)
        table = torch.tensor(TABLES[self.table], dtype=torch.float32, device=values.device)
        codes = nearest_codes(blocks / torch.where(used == 0, 1.0, used)[:, None], table).reshape(-1)[: len(values)]
        codes = F.pad(codes, (0, len(values) % 2))
        stored["table"] = table
        stored["codes"] = (codes[0::2] << 4) | codes[1::2]
        return stored


def nearest_codes(values: Tensor, table: Tensor) -> Tensor:
    """Return, for each of ``values``, the index of the nearest entry of ``table``, uint8."""
    ordered, order = table.sort()
    middles = (ordered[1:] + ordered[:-1]) / 2
    return order[torch.bucketize(values, middles)].to(torch.uint8)


def _by_blocks(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Return ``values`` (n,) times ``scales`` (n / size,), each for a run of ``size`` values; the last may be short."""
    count = values.shape[0]
    padded = F.pad(values, (0, scales.shape[0] * size - count))
    return (padded.reshape(-1, size) * scales[:, None]).reshape(-1)[:count]


def _quantize_scales(scales: Tensor, size: int) -> dict[str, Tensor]:
    """Return ``scales`` (blocks,) as uint8, with their table, units and offset, by role."""
    offset = scales.mean()
    centred = F.pad(scales - offset, (0, -len(scales) % size)).reshape(-1, size)
    units = centred.abs().amax(1)
    table = torch.linspace(-1, 1, 256, device=scales.device)
    codes = nearest_codes(centred / torch.where(units == 0, 1.0, units)[:, None], table)
    return {
        "scales": codes.reshape(-1)[: len(scales)],
        "scale_table": table,
        "super_scales": units,
        "scale_offset": offset,
    }
