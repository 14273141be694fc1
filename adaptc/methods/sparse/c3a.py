"""C3A: W' = W + C / columns, where C is made of circulant blocks (Chen et al., arXiv 2407.19342).

Slot ``c3a_kernel`` (rows/b, columns/b, b), float: block (m, n) has kernel[m, n, (p - k) mod b] in its row k and column
p. Both sizes of the weight as one matrix must be multiples of b, the block size. A circulant block is a convolution, so
at a linear layer its matmul is computed with Fourier transforms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.name_patterns import dotted_pattern_value, matches_dotted_pattern
from adaptc.methods._shared.option_checks import check_matrix
from adaptc.methods.sparse.sparse import check_positive_counts, float32_or_wider
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat

KERNEL = "c3a_kernel"
RANDOM_SCHEMES = ("xavier_uniform", "gaussian", "kaiming_uniform")


@dataclass
class C3AConfig(TargetedConfig):
    """PEFT's ``C3AConfig``: same names, same defaults.

    Raises ConfigError for block sizes that are not positive integers and for other values of ``init_weights``.

    Attributes:
        block_size: the size of a circulant block; it must divide the sizes of the layer.
        block_size_pattern: name or expression -> the block size of these modules.
        init_weights: True starts at zeros. "xavier_uniform" (the default, and the meaning of False), "kaiming_uniform"
            and "gaussian" start at random values, which change the model.

    Example:
        >>> config = adaptc.C3AConfig(block_size=64, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "C3A"

    block_size: int = 256
    bias: str = "none"
    block_size_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool | str | None = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_counts(self, "block_size")
        if not isinstance(self.init_weights, bool) and self.init_weights not in RANDOM_SCHEMES:
            raise ConfigError(
                f"C3AConfig.init_weights must be True, False or one of {', '.join(RANDOM_SCHEMES)}, got "
                f"{self.init_weights!r}"
            )

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        return {"block_size_pattern": self.block_size_pattern or {}}

    def pattern_matches(self, key: str, name: str) -> bool:
        return matches_dotted_pattern(key, name)

    def method(self, name: str, kind: str) -> C3A:
        assert self.init_weights is not None
        return C3A(dotted_pattern_value(self.block_size_pattern, name, self.block_size), self.init_weights)


@dataclass(frozen=True)
class C3A(Method):
    """C3A at one site, with blocks of size ``block``. ``scheme``: the ``init_weights`` of the config."""

    name: ClassVar[str] = "c3a"
    takes_complex: ClassVar[bool] = False
    files = FileFormat(names=(KERNEL,), summed=KERNEL)

    block: int = 256
    scheme: bool | str = "xavier_uniform"

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("C3A", op)
        rows, columns = op.matrix_shape
        if rows % self.block or columns % self.block:
            raise ConfigError(
                f"block_size={self.block} must divide both sizes of a matrix of shape {op.matrix_shape}; the divisors "
                f"of {gcd(rows, columns)} do. block_size_pattern gives this layer another one"
            )
        return {KERNEL: Slot((rows // self.block, columns // self.block, self.block))}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        (slot,) = self.slots(op).values()
        rows, columns = op.matrix_shape
        values = torch.zeros(slot.shape)
        if self.scheme == "gaussian":
            values.normal_(generator=generator)
        elif self.scheme is not True:
            kaiming = self.scheme == "kaiming_uniform"
            bound = sqrt(1 / columns) if kaiming else sqrt(3) * sqrt(2 / (rows + columns))
            values.uniform_(-bound, bound, generator=generator)
        return InitialValues({KERNEL: values.to(W.device, dtype)})

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        rows, columns = op.matrix_shape
        w, b = cast(slots[KERNEL], float32_or_wider(W, slots[KERNEL])), self.block
        # Reading the repeated kernel in rows of b + 1 entries shifts each row by one: a block with its rows in reverse.
        turning = w.unsqueeze(-2).expand(*w.shape[:2], b + 1, b).reshape(*w.shape[:2], b, b + 1)[..., :b]
        blocks = turning.flip(-2).roll(1, -2)
        change = blocks.transpose(1, 2).reshape(rows, columns) / columns
        return cast(W + op.unmatrix(change), W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.kind in ("linear", "addmm")

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        wide = float32_or_wider(x, slots[KERNEL])
        w = _rfft_as_real(cast(slots[KERNEL], wide) / op.in_features)
        x = _rfft_as_real(cast(x, wide).unflatten(-1, (-1, self.block)))
        # Times the conjugate of w, written in real numbers: compilers cannot work with complex ones.
        real, imaginary = w.unbind(-1)
        pairs = torch.stack([torch.stack([real, -imaginary], -1), torch.stack([imaginary, real], -1)], -2)
        out = torch.view_as_complex(torch.einsum("...nfc,mnfcd->...mfd", x, pairs).contiguous())
        return cast(y + torch.fft.irfft(out, self.block).flatten(-2), y.dtype)


def _rfft_as_real(t: Tensor) -> Tensor:
    """Return the Fourier transform of real rows (..., b): (..., b // 2 + 1, 2), real and imaginary parts."""
    return torch.view_as_real(torch.fft.rfft(t))
