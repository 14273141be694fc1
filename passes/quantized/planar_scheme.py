"""Store a matrix of integers so that a compiled loop reads its codes, and the input, with vector loads.

A byte of ``integer_scheme`` holds the codes of neighbouring columns, so a loop over the bytes would read the input with
a stride. In planes a byte holds columns that lie a part of a row apart, and each plane meets its own run of the input:

    codes        8 bits: int8 (rows, columns), one plane; else uint8 (rows, columns / 2), the low 4 bits of columns c
                 and c + columns / 2, the first in the low half
    high_codes   6 bits: uint8 (rows, columns / 4), the high 2 bits of columns c + i * columns / 4, i = 0 lowest
    scales       float32 (rows, groups)
    zeros        float32 (rows, groups), where there are any
    minimums     float32 (rows, groups), where there are any

The value of an element is (code - offset - zero) * scale - minimum. No file has this scheme: :func:`in_planes` makes it
of an :class:`IntegerScheme`, for code that is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.scheme import Scheme, StoredTensor

#: bits of a code -> the number of planes
_PLANES = {8: 1, 4: 2, 6: 4}


@dataclass(frozen=True)
class PlanarScheme(Scheme):
    """Integers of ``bits`` bits in planes, with float32 scales; the module says what each option stores.

    Attributes:
        bits: 8, 6 or 4.
        groups: the number of scales in a row.
        offset: a number taken off every code.
        has_zeros: whether a zero is taken off the codes of each group.
        has_minimums: whether a minimum is taken off each group.
    """

    name: ClassVar[str] = "planar"

    bits: int = 8
    groups: int = 1
    offset: int = 0
    has_zeros: bool = False
    has_minimums: bool = False

    def __str__(self) -> str:
        return f"int{self.bits} in planes, {self.groups} scales in a row"

    @property
    def plane_count(self) -> int:
        """Return the number of planes."""
        return _PLANES[self.bits]

    @property
    def has_row_scales(self) -> bool:
        """Return whether a value is its code times one scale for the row, and nothing else."""
        return self.groups == 1 and not (self.offset or self.has_zeros or self.has_minimums)

    def layout(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        if columns % self.plane_count or columns % self.groups or (self.groups > 1 and self.groups % self.plane_count):
            raise ConfigError(f"{self} does not store {columns} columns")
        stored = {"codes": StoredTensor((rows, columns), torch.int8)}
        if self.bits < 8:
            stored["codes"] = StoredTensor((rows, columns // 2), torch.uint8)
        if self.bits == 6:
            stored["high_codes"] = StoredTensor((rows, columns // 4), torch.uint8)
        of_groups = StoredTensor((rows, self.groups), torch.float32)
        stored["scales"] = of_groups
        return stored | {r: of_groups for r, has in self._parts_of_groups() if has}

    def _parts_of_groups(self) -> tuple[tuple[str, bool], ...]:
        return ("zeros", self.has_zeros), ("minimums", self.has_minimums)

    def quantize(self, matrix: Tensor) -> dict[str, Tensor]:
        raise ConfigError("planes are made of integers: quantise with 'int8' or 'int4'")

    def dequantize(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return torch.cat(self.planes(stored), 1)

    def select_rows(
        self, stored: Mapping[str, Tensor], shape: Sequence[int], rows: slice | Tensor
    ) -> tuple[Scheme, dict[str, Tensor]]:
        return self, {role: t[rows] for role, t in stored.items()}

    def planes(self, stored: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the values of each plane (rows, columns / planes), float32; side by side they are the matrix."""
        codes = self.plane_codes(stored)
        roles = ["scales", *(r for r, has in self._parts_of_groups() if has)]
        count = len(codes)
        parts = {r: [stored[r]] * count if self.groups == 1 else list(stored[r].chunk(count, 1)) for r in roles}
        out: list[Tensor] = []
        for index, code in enumerate(codes):
            own = {role: parts[role][index].unsqueeze(-1) for role in roles}
            values = code.float().reshape(code.shape[0], own["scales"].shape[1], -1)
            if self.offset:
                values = values - self.offset
            if self.has_zeros:
                values = values - own["zeros"]
            values = values * own["scales"]
            if self.has_minimums:
                values = values - own["minimums"]
            out.append(values.reshape(code.shape))
        return out

    def plane_codes(self, stored: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the codes of each plane (rows, columns / planes), integers."""
        if self.bits == 8:
            return [stored["codes"]]
        # Compilers turn integers of 32 bits into floats with vector code, and bytes with none.
        packed = stored["codes"].int()
        if self.bits == 4:
            return [packed & 15, packed >> 4]
        high = stored["high_codes"].int()
        first, second = packed.chunk(2, 1)
        low = [first & 15, second & 15, first >> 4, second >> 4]
        return [code | (((high >> (2 * i)) & 3) << 4) for i, code in enumerate(low)]


def in_planes(
    scheme: Scheme, stored: Mapping[str, Tensor], shape: tuple[int, int]
) -> tuple[PlanarScheme, dict[str, Tensor]] | None:
    """Return the scheme and the tensors by role that store in planes what ``scheme`` stores as a matrix of ``shape``.

    ``shape`` is (rows, columns). Codes of 8 bits are shared. None for other schemes than integers, and where a group
    would lie in two planes. None, too, where inputs are rounded or groups are no runs of columns.
    """
    if not isinstance(scheme, IntegerScheme) or scheme.has_group_index or scheme.rounds_inputs:
        return None
    columns, groups = shape[1], stored["scales"].shape[1]
    planar = PlanarScheme(scheme.bits, groups, scheme.offset, bool(scheme.zero_dtype), scheme.has_minimums)
    if not columns or columns % planar.plane_count or (groups > 1 and groups % planar.plane_count):
        return None
    scales = scheme.group_scales(stored, columns)
    made = {"codes": stored["codes"], "scales": scales if scheme.step == 1.0 else scales * scheme.step}
    if scheme.zero_dtype:
        made["zeros"] = stored["zeros"].float()
    if scheme.has_minimums:
        made["minimums"] = scheme.group_minimums(stored, columns)
    if scheme.bits < 8:
        codes = scheme.unpack_codes(stored, columns)
        low, half = codes & 15, columns // 2
        made["codes"] = low[:, :half] | (low[:, half:] << 4)
        if scheme.bits == 6:
            parts = (codes >> 4).chunk(4, 1)
            made["high_codes"] = parts[0] | (parts[1] << 2) | (parts[2] << 4) | (parts[3] << 6)
    return planar, {role: made[role].contiguous() for role in planar.layout(*shape)}
