"""Store a matrix as integers with a scale per row, or per group of columns: int8, int4, GPTQ, AWQ, HQQ and GGUF.

The value of an element is (code - offset - zero) * scale * step - minimum. Codes of 4 and of 6 bits are packed:

    codes        8 bits: int8 (rows, columns); else uint8 (rows, columns / 2), the low 4 bits of two columns, the first
                 column in the low half
    high_codes   6 bits: uint8 (rows, columns / 4), the high 2 bits of four columns, the first in the lowest
    scales       (rows, groups) of ``scale_dtype``
    zeros        (rows, groups) of ``zero_dtype``, where there are any
    minimums     (rows, groups) of ``scale_dtype``, where there are any
    super_scales, super_minimums   float16 (rows, columns / super_group), with ``super_group``: the units of the scales
                 and of the minimums, which are integers then
    group_index  int32 (columns,) the group of each column, where groups are not runs of columns (GPTQ's act order)

Source: the layouts of GPTQ, AWQ and HQQ checkpoints, and of GGUF's Q8_0, Q4_0, Q4_1, Q4_K and Q6_K. They are rewritten
to this one without a change of any code or scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.passes.quantized.scheme import Scheme, StoredTensor, require_matrix


@dataclass(frozen=True)
class IntegerScheme(Scheme):
    """Integers of ``bits`` bits with scales; the module says what each option stores.

    Attributes:
        bits: 8, 6 or 4.
        group_size: the number of columns that share a scale; 0 for one scale per row.
        offset: a number taken off every code.
        scale_dtype: the name of the scales' dtype.
        zero_dtype: the name of the zeros' dtype; "" for none.
        has_minimums: whether a minimum is taken off each group.
        super_group: the number of columns whose scales share a unit; 0 for scales without units.
        step: a factor of all scales.
        has_group_index: whether groups are listed column by column.
        activations: "float", or "int8" where inputs of the layer are rounded to int8, row by row, in each call.
    """

    name: ClassVar[str] = "integer"

    bits: int = 8
    group_size: int = 0
    offset: int = 0
    scale_dtype: str = "float32"
    zero_dtype: str = ""
    has_minimums: bool = False
    super_group: int = 0
    step: float = 1.0
    has_group_index: bool = False
    activations: str = "float"

    def __post_init__(self) -> None:
        if self.bits not in (4, 6, 8):
            raise ConfigError(f"bits={self.bits}: integers of 8, 6 or 4 bits are stored")
        if self.group_size < 0 or self.super_group < 0:
            raise ConfigError(f"group_size={self.group_size}: the number of columns that share a scale; 0 for a row")
        if self.activations not in ("float", "int8"):
            raise ConfigError(f"activations={self.activations!r} is neither 'float' nor 'int8'")

    def __str__(self) -> str:
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        return f"int{self.bits}{groups}{', int8 activations' if self.activations == 'int8' else ''}"

    def layout(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        group = self.group_size or columns
        if columns % group or (self.super_group and columns % self.super_group):
            found = group if columns % group else self.super_group
            divisors = [d for d in range(min(columns, found), 0, -1) if columns % d == 0]
            raise ConfigError(
                f"group_size={found} does not divide the {columns} columns of the weight; {divisors[0]} would"
            )
        groups = columns // group
        stored = {"codes": StoredTensor((rows, columns), torch.int8)}
        if self.bits < 8:
            stored["codes"] = StoredTensor((rows, -(-columns // 2)), torch.uint8)
        if self.bits == 6:
            stored["high_codes"] = StoredTensor((rows, -(-columns // 4)), torch.uint8)
        stored["scales"] = StoredTensor((rows, groups), getattr(torch, self.scale_dtype))
        if self.zero_dtype:
            stored["zeros"] = StoredTensor((rows, groups), getattr(torch, self.zero_dtype))
        if self.has_minimums:
            stored["minimums"] = StoredTensor((rows, groups), getattr(torch, self.scale_dtype))
        if self.super_group:
            units = StoredTensor((rows, columns // self.super_group), torch.float16)
            stored |= {"super_scales": units} | ({"super_minimums": units} if self.has_minimums else {})
        if self.has_group_index:
            stored["group_index"] = StoredTensor((columns,), torch.int32)
        return stored

    def dequantize(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        values = self.unpack_codes(stored, columns).float()
        if not self.has_group_index:
            size = self.group_size or max(columns, 1)
            values = values.reshape(rows, columns // size, size)
        if self.offset:
            values = values - self.offset
        if self.zero_dtype:
            values = values - self._for_groups(stored["zeros"].float(), stored)
        values = values * self._for_groups(self.group_scales(stored, columns), stored)
        if self.step != 1.0:
            values = values * self.step
        if self.has_minimums:
            values = values - self._for_groups(self.group_minimums(stored, columns), stored)
        return values.reshape(rows, columns)

    def check(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> None:
        super().check(stored, rows, columns)
        if self.has_group_index:
            index, groups = stored["group_index"], columns // (self.group_size or columns)
            if bool(((index < 0) | (index >= groups)).any()):
                raise ConfigError(
                    f"'group_index' of {self.name} must be of groups 0 to {groups - 1}, and is from {index.min()} to "
                    f"{index.max()}"
                )

    @property
    def has_row_scales(self) -> bool:
        """Return whether a value is its code of 8 bits times one scale for the row, and nothing else."""
        plain = not (self.group_size or self.offset or self.zero_dtype or self.has_minimums or self.has_group_index)
        return self.bits == 8 and plain

    @property
    def rounds_inputs(self) -> bool:
        return self.activations == "int8"

    def round_input(self, x: Tensor) -> Tensor:
        """Return each row of ``x`` (..., columns) rounded to 127 steps of its largest magnitude on either side."""
        if not self.rounds_inputs:
            return x
        values = x.float()
        step = values.abs().amax(-1, keepdim=True) / 127
        return ((values / torch.where(step == 0, 1.0, step)).round() * step).to(x.dtype)

    def select_rows(
        self, stored: Mapping[str, Tensor], shape: Sequence[int], rows: slice | Tensor
    ) -> tuple[Scheme, dict[str, Tensor]]:
        return self, {role: t if role == "group_index" else t[rows] for role, t in stored.items()}

    def unpack_codes(self, stored: Mapping[str, Tensor], columns: int) -> Tensor:
        """Return the codes (rows, columns) as int8 where they have 8 bits, else as uint8."""
        codes = stored["codes"]
        if self.bits == 8:
            return codes
        # In this spelling of the shift other runtimes have the op.
        codes = _interleave([codes & 15, torch.bitwise_right_shift(codes, 4)], columns)
        if self.bits == 6:
            high = stored["high_codes"]
            parts = [torch.bitwise_right_shift(high, shift) & 3 for shift in (0, 2, 4, 6)]
            codes = codes | (_interleave(parts, columns) << 4)
        return codes

    def group_scales(self, stored: Mapping[str, Tensor], columns: int) -> Tensor:
        """Return the scales (rows, groups), float32, without the factor ``step``."""
        return self._in_units(stored, "scales", "super_scales", columns)

    def group_minimums(self, stored: Mapping[str, Tensor], columns: int) -> Tensor:
        """Return the minimums (rows, groups), float32, of a scheme that has them."""
        return self._in_units(stored, "minimums", "super_minimums", columns)

    def _in_units(self, stored: Mapping[str, Tensor], role: str, unit_role: str, columns: int) -> Tensor:
        """Return the tensor ``role`` (rows, groups), float32, times its units where the scheme has any."""
        values = stored[role].float()
        if not self.super_group:
            return values
        units = stored[unit_role].float()
        grouped = values.reshape(values.shape[0], units.shape[1], -1) * units.unsqueeze(-1)
        return grouped.reshape(values.shape)

    def _for_groups(self, values: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """Return ``values`` (rows, groups) so that they broadcast over the columns of each group."""
        if self.has_group_index:
            return values.index_select(1, stored["group_index"])
        return values.unsqueeze(-1)

    def quantize(self, matrix: Tensor) -> dict[str, Tensor]:
        if self.super_group or self.has_group_index or self.bits == 6 or self.has_minimums:
            raise ConfigError("a checkpoint of this layout is read as it is; quantise with 'int8', 'int4' or 'nf4'")
        values = require_matrix(matrix)
        rows, columns = values.shape
        layout = self.layout(rows, columns)
        grouped = values.reshape(rows, -1, self.group_size or columns)
        dtype = getattr(torch, self.scale_dtype)
        if self.zero_dtype:
            low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
            scales = _nonzero((high - low) / (2**self.bits - 1)).to(dtype)
            zeros = (-low / scales.float()).round().clamp(0, 2**self.bits - 1)
            codes = (grouped / scales.float()[..., None]).round() + zeros[..., None]
            codes = codes.clamp(0, 2**self.bits - 1)
        else:
            most = 2 ** (self.bits - 1) - 1
            scales = _nonzero(grouped.abs().amax(2) / (most * self.step)).to(dtype)
            zeros = None
            codes = (grouped / (scales.float()[..., None] * self.step)).round().clamp(-most, most) + self.offset
        flat = codes.reshape(rows, columns)
        stored = {"codes": pack_nibbles(flat.to(torch.uint8)) if self.bits == 4 else flat.to(torch.int8)}
        stored["scales"] = scales
        if zeros is not None:
            stored["zeros"] = zeros.to(layout["zeros"].dtype)
        return stored


def pack_nibbles(codes: Tensor) -> Tensor:
    """Return codes (rows, columns) below 16 packed as uint8 (rows, columns / 2), the first column in the low half."""
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def _interleave(parts: list[Tensor], columns: int) -> Tensor:
    """Return (rows, columns) whose columns are taken from the ``parts`` in turn."""
    rows = parts[0].shape[0]
    return torch.stack(parts, 2).reshape(rows, -1)[:, :columns]


def _nonzero(scales: Tensor) -> Tensor:
    """Return ``scales`` with ones in place of zeros, as groups of zeros have them."""
    return torch.where(scales == 0, 1.0, scales)
