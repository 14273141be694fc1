"""MiSS: one block of rows, repeated along the inputs, is added to the weight (Kang and Yin, arXiv 2409.15371).

    W'[o, i] = W[o, i] + M[i mod r, o]                                      the default
    W'[o, i] = W[o, i] + M[i mod r, o mod mini_r]                           init_weights="mini"
    W'[o]    = W[o] + W[o] M[o] + M[o], in blocks of r by r                 init_weights="bat", o a block of rows

W is the weight as a matrix: kernels in its columns, embeddings (width, vocabulary). Slot ``miss_block``: (r, out); for
mini (r, mini_r); for bat (out/r, r, r).

Slot ``fold`` (r, columns), which is in no file, has a one where a column of W takes a row of M. With it no rank is part
of the code: W' = W + M^T fold, and the layer adds M^T (fold x). PEFT's older Bone is the same method with
``bone_block`` for ``miss_block``; its files are read, and written as MiSS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import (
    applies_dropout,
    check_integers,
    check_matrix,
    check_probability,
    prepare_adapter_input,
)
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.size_rule import SizeRule

BLOCK, FOLD, BONE = "miss_block", "fold", "bone_block"
MODES = (True, False, "bat", "mini")


@dataclass
class MissConfig(TargetedConfig):
    """PEFT's ``MissConfig``: same names, same defaults. Files of peft_type BONE give this config, too.

    Attributes:
        miss_dropout: the dropout probability of the adapter's input.
        mini_r: the rank along the outputs, for ``init_weights="mini"``.
        init_weights: True starts as the identity; "bat" and "mini" choose variants.

    Example:
        >>> config = adaptc.MissConfig(r=8, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "MISS"
    dropout_field: ClassVar[str] = "miss_dropout"

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r, "mini_r": self.mini_r})
        check_probability(self, "miss_dropout")
        if self.init_weights not in MODES:
            raise ConfigError(
                f"MissConfig.init_weights must be True, False, 'bat' or 'mini', got {self.init_weights!r}"
            )

    def method(self, name: str, kind: str) -> Miss:
        mode = self.init_weights if isinstance(self.init_weights, str) else ""
        return Miss(self.r, mode, self.mini_r, self.miss_dropout, self.init_weights is not False)


class MissFiles(FileFormat):
    method: Miss

    def summed(self) -> str:
        return "" if self.method.mode == "bat" else BLOCK

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        if self.method.mode == "bat":
            return {}
        row = torch.arange(op.matrix_shape[1], device=W.device) % self.method.r
        return {FOLD: (row == torch.arange(self.method.r, device=W.device).unsqueeze(1)).to(dtype)}

    def keys(self, op: Op) -> list[str]:
        return [BONE]

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if BONE in found and BLOCK in found:
            raise CheckpointError(f"the file has both {BLOCK!r} and {BONE!r} at one site, which are the same tensor")
        return {BLOCK if n == BONE else n: t for n, t in found.items()}


class MissSizes(SizeRule):
    method: Miss

    def minimal(self, op: Op) -> Miss:
        return self.method if self.method.mode == "bat" else dataclasses.replace(self.method, r=2)

    def with_sizes_of(self, op: Op, slots: Slots) -> Miss:
        block = slots.get(BLOCK, slots.get(BONE))
        if block is None or block.ndim != (3 if self.method.mode == "bat" else 2):
            return self.method
        return dataclasses.replace(self.method, r=block.shape[-1] if self.method.mode == "bat" else block.shape[0])


@dataclass(frozen=True)
class Miss(Method):
    """MiSS at one site; ``mode`` is "", "bat" or "mini".

    ``dropout`` acts on the input of the part added to the layer's output, in training only. PEFT has no dropout in bat.
    """

    name: ClassVar[str] = "miss"
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"mini_r"}
    files = MissFiles(names=(BLOCK,))
    sizes = MissSizes()

    r: int = 64
    mode: str = ""
    mini_r: int = 1
    dropout: float = 0.0
    scheme: bool = True
    training: bool = False

    def structure(self) -> dict[str, Any]:
        sizes = {"bat": {"r": self.r}, "mini": {"mini_r": self.mini_r}}
        return super().structure() | sizes.get(self.mode, {})

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("MiSS", op)
        (rows, columns), r = op.matrix_shape, self.r
        if self.mode == "bat":
            if rows % r or columns % r:
                valid_sizes = [n for n in range(1, gcd(rows, columns) + 1) if gcd(rows, columns) % n == 0]
                raise TargetError(
                    f"MiSS with init_weights='bat' cuts the weight ({rows}, {columns}) into blocks of r by r, and "
                    f"r={r} does not divide both; r may be {', '.join(map(str, valid_sizes))}"
                )
            return {BLOCK: Slot((rows // r, r, r))}
        if r > max(columns, 2):
            raise TargetError(f"MiSS needs r of at most {columns}, the inputs of this weight, got r={r}")
        if self.mode == "mini" and rows % self.mini_r:
            valid_sizes = [n for n in range(1, rows + 1) if rows % n == 0]
            raise TargetError(
                f"MiSS with init_weights='mini' repeats mini_r={self.mini_r} numbers along {rows} outputs, which it "
                f"does not divide; mini_r may be {', '.join(map(str, valid_sizes))}"
            )
        return {
            BLOCK: Slot((r, self.mini_r if self.mode == "mini" else rows), free=(0,)),
            FOLD: Slot((r, columns), free=(0,), trainable=False, saved=False),
        }

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        source = torch.device("cpu") if generator is None else generator.device
        block = torch.zeros(self.slots(op)[BLOCK].shape, device=source)
        if not self.scheme:
            torch.nn.init.kaiming_uniform_(block, a=math.sqrt(5), generator=generator)
        return InitialValues({BLOCK: block.to(W.device, dtype), **self.files.derived(op, W, dtype, {})})

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        small = self.sizes.minimal(op)
        block = torch.zeros(small.slots(op)[BLOCK].shape, dtype=dtype, device=W.device)
        return {BLOCK: block, **small.files.derived(op, W, dtype, {})}

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return cast(W + self._delta(op, W, slots), W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and (self._is_low_rank(op) or applies_dropout(self, op))

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        x = prepare_adapter_input(self, op, x, slots[BLOCK].dtype)
        if not self._is_low_rank(op):
            return cast(y + op(x, cast(self._delta(op, W, slots), x.dtype)), y.dtype)
        up, down = self._full_block(op, slots).t(), slots[FOLD]
        if op.is_conv:
            up, down = up.reshape(op.out_features, -1, *(1 for _ in op.kernel)), down.reshape(-1, *op.shape[1:])
        return cast(y + op.down_up(x, down, up), y.dtype)

    def _is_low_rank(self, op: Op) -> bool:
        """Return whether the change of the weight is a matmul of two matrices of rank r."""
        return self.mode != "bat" and op.groups == 1

    def _full_block(self, op: Op, slots: Slots) -> Tensor:
        """Return M (r, out), with a column for every output."""
        block = slots[BLOCK]
        return block.repeat(1, op.matrix_shape[0] // self.mini_r) if self.mode == "mini" else block

    def _delta(self, op: Op, W: Tensor, slots: Slots) -> Tensor:
        """Return W' - W, in the wider dtype of weight and block for bat, else in the block's."""
        if self.mode != "bat":
            return op.unmatrix(self._full_block(op, slots).t() @ slots[FOLD])
        block, r = slots[BLOCK], self.r
        wide = torch.promote_types(W.dtype, block.dtype)
        M, parts = cast(block, wide), cast(op.matrix(W), wide).reshape(op.matrix_shape[0] // r, -1, r)
        # (blocks of rows, rows, blocks of columns, columns)
        made = (parts @ M).unflatten(1, (r, -1)) + M.unsqueeze(2)
        return op.unmatrix(made.reshape(op.matrix_shape))
