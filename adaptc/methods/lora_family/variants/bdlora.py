"""BD-LoRA: LoRA with A or B block-diagonal, for weights that are sharded over devices.

W' = W + s B A. With A block-diagonal, block i of its n blocks reads the i-th part of the inputs. With B block-diagonal,
block i writes the i-th part of the outputs. A weight that is sharded along these needs no exchange between its A and B.

Slots: LoRA's, with an axis of blocks. ``lora_A.weight`` is (n, r/n, in/n) or, where B has the blocks, (n, r/n, in).
``lora_B.weight`` is (n, out/n, r/n) or, where A has them, (out, n, r/n). In PEFT's files the axes of sizes n and r/n,
or n and out/n, are one. Sites are matrices that multiply features, and each of stacked experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import gcd, prod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from adaptc.errors import CheckpointError, ConfigError, TargetError
from adaptc.methods._shared.option_checks import OptionGroup, check_integers
from adaptc.methods.lora_family.lora import LORA_NAMES, Lora, LoraBank, LoraFiles, LoraKernels
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import InitialValues, Scale, Slot, Slots
from adaptc.passes.protocol.parts.low_rank import LowRank
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.passes.protocol.parts.size_rule import SizeRule

DOWN, UP = "lora_A.weight", "lora_B.weight"


@dataclass
class BdLoraConfig(OptionGroup):
    """PEFT's ``BdLoraConfig``: same names, same defaults, for ``LoraConfig(use_bdlora=...)``.

    Layers that a server shards by rows (output projections) take a block-diagonal A. Those that it shards by columns
    (query, key, value, up and gate projections) take a block-diagonal B. Raises ConfigError for values without a
    meaning.

    Attributes:
        target_modules_bd_a: parts of the names of layers whose A is block-diagonal.
        target_modules_bd_b: parts of the names of layers whose B is block-diagonal.
        nblocks: the number of blocks, which is the number of shards.
        match_strict: whether a layer whose name has none of these parts is an error; else it takes plain LoRA.

    Example:
        >>> blocks = adaptc.BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
        >>> config = adaptc.LoraConfig(r=8, use_bdlora=blocks, target_modules=["q_proj", "o_proj"])
    """

    option: ClassVar[str] = "use_bdlora"

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"nblocks": self.nblocks})
        if both := sorted({*(self.target_modules_bd_a or [])} & {*(self.target_modules_bd_b or [])}):
            raise ConfigError(f"BdLoraConfig has {both[0]!r} in target_modules_bd_a and in target_modules_bd_b")

    def factor_at(self, name: str) -> Literal["A", "B"] | None:
        """Return which factor is block-diagonal at the layer ``name``; None for plain LoRA."""
        lists = {"A": self.target_modules_bd_a, "B": self.target_modules_bd_b}
        return next((f for f, parts in lists.items() if any(p in name for p in parts or [])), None)  # type: ignore[return-value]

    def check_layer(self, name: str) -> None:
        """Raise ConfigError for a layer in both lists, or with ``match_strict`` in none."""
        found = [any(p in name for p in parts or []) for parts in (self.target_modules_bd_a, self.target_modules_bd_b)]
        if all(found):
            raise ConfigError(
                f"the layer {name!r} matches target_modules_bd_a and target_modules_bd_b of use_bdlora: name longer "
                "parts of names there"
            )
        if self.match_strict and not any(found):
            raise ConfigError(
                f"the layer {name!r} matches neither target_modules_bd_a nor target_modules_bd_b of use_bdlora: name "
                "it in one of them, or set match_strict=False for plain LoRA there"
            )


class BdLoraFiles(LoraFiles):
    method: BdLora

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values, n = dict(found), self.method.blocks
        for name, axis in ((DOWN, 0), (UP, self.method.up_block_axis)):
            if (t := found.get(name)) is None:
                continue
            if t.ndim != 2 or t.shape[axis] % n:
                raise CheckpointError(
                    f"{name!r} has shape {tuple(t.shape)}; expected a matrix whose axis {axis} is a multiple of "
                    f"nblocks={n}"
                )
            values[name] = t.unflatten(axis, (n, -1))
        return values

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        first = {DOWN: 0, UP: self.method.up_block_axis}
        return {n: t.flatten(first[n], first[n] + 1) if n in first else t for n, t in slots.items()}

    def low_rank(self, found: Slots) -> LowRank | None:
        self._factor_pair(found)
        return super().low_rank(self.method.with_whole_factors(self.read(None, found)))  # type: ignore[arg-type]

    def with_low_rank(self, change: LowRank, like: Slots) -> dict[str, Tensor]:
        # A combination of adapters is plain LoRA, whose A has a column for each feature.
        A = like[DOWN].new_empty((change.rank, change.down.shape[-1]), device="meta")
        return super().with_low_rank(change, {**like, DOWN: A})


class BdLoraSizes(SizeRule):
    method: BdLora

    def with_rank(self, op: Op, rank: int) -> BdLora:
        n = self.method.blocks
        return replace(self.method, r=-(-rank // n) * n)

    def minimal(self, op: Op) -> BdLora:
        return replace(self.method, r=2 * self.method.blocks)

    def with_sizes_of(self, op: Op, slots: Slots) -> BdLora:
        A = slots.get(DOWN)
        return self.method if A is None or A.ndim < 2 else replace(self.method, r=prod(A.shape[:-1]))


class BdLoraBank(LoraBank):
    method: BdLora

    def apply(
        self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale, mix: Tensor
    ) -> Tensor | None:
        return super().apply(op, x, y, W, b, self.method.with_whole_factors(slots), scale, mix)

    def apply_fused(self, op: Op, x: Tensor, y: Tensor, slots: Slots, scale: Scale, c: Tensor) -> Tensor | None:
        return super().apply_fused(op, x, y, self.method.with_whole_factors(slots), scale, c)

    def has_kernel(self, op: Op) -> bool:
        return False  # it counts the ranks of all adapters in one row, and here those of a block lie together


class BdLoraKernels(LoraKernels):
    method: BdLora

    def why_missing(self, op: Op) -> str:
        return "the kernels read whole factors, and one of this adapter's is block-diagonal"


@dataclass(frozen=True)
class BdLora(Lora):
    """BD-LoRA at one site. ``blocks``: their number. ``factor``: which of A and B is block-diagonal."""

    name: ClassVar[str] = "bdlora"
    stacks: ClassVar[bool] = False
    files = BdLoraFiles(names=LORA_NAMES)
    sizes = BdLoraSizes()
    bank = BdLoraBank()
    kernels = BdLoraKernels()
    sharing = SharedSlots()

    blocks: int = 1
    factor: Literal["A", "B"] = "A"

    @property
    def up_block_axis(self) -> int:
        """Return the axis of the blocks in the slot of B."""
        return 1 if self.factor == "A" else 0

    def slots(self, op: Op) -> dict[str, Slot]:
        self._check_site(op)
        slots, n, ranks = super().slots(op), self.blocks, self.r // self.blocks
        (rows, columns), a = op.shape, self.factor == "A"
        up = (rows, n, ranks) if a else (n, rows // n, ranks)
        return {
            **slots,
            DOWN: Slot((n, ranks, columns // n if a else columns), free=(1,)),
            UP: Slot(up, free=(2,)),
        }

    def _check_site(self, op: Op) -> None:
        if op.kind == "embedding" or len(op.shape) != 2:
            raise TargetError(
                f"BD-LoRA has blocks of the features that a matrix multiplies, and a consumer of kind {op.kind!r} with "
                f"a weight of shape {op.shape} has none: leave it out, or use LoRA (use_bdlora=None)"
            )
        features, what = (op.shape[1], "inputs") if self.factor == "A" else (op.shape[0], "outputs")
        if features % self.blocks:
            raise TargetError(
                f"BD-LoRA divides the {what} of a layer into nblocks={self.blocks} parts, and this one has {features}; "
                f"nblocks={gcd(features, self.blocks)} fits"
            )
        if self.r % self.blocks:
            raise TargetError(
                f"BD-LoRA divides the rank among nblocks={self.blocks} blocks, got r={self.r}; "
                f"r={-(-self.r // self.blocks) * self.blocks} fits"
            )

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        # PEFT draws LoRA's tensors first, and then another A where that has the blocks.
        plain = Lora(**{f.name: getattr(self, f.name) for f in fields(Lora)})
        values, n = plain.init(op, W, dtype, generator).slots, self.blocks
        if self.factor == "A":
            device = torch.device("cpu") if generator is None else generator.device
            # In the dtype of the weight, as in PEFT: another dtype draws other numbers.
            A = torch.empty((self.r, W.shape[1] // n), dtype=W.dtype, device=device)
            if self.scheme == "gaussian":
                nn.init.normal_(A, std=1.0 / self.r, generator=generator)
            else:
                nn.init.kaiming_uniform_(A, generator=generator)
            values = {**values, DOWN: A.to(W.device, dtype)}
        else:  # the blocks on the diagonal of LoRA's B, which has random values for the scheme False alone
            blocks = values[UP].reshape(n, W.shape[0] // n, n, -1).diagonal(dim1=0, dim2=2)
            values = {**values, UP: blocks.movedim(-1, 0).flatten(0, 1).contiguous()}
        return InitialValues(self.files.read(op, values))

    def inside_multihead_attention(self) -> BdLora:
        return self  # PEFT has no BD-LoRA in MultiheadAttention, and so no files in which it is applied twice

    def with_whole_factors(self, slots: Slots) -> dict[str, Tensor]:
        """Return the slots with A (..., r, in) and B (..., out, r), whose blocks lie between zeros."""
        A, B = slots[DOWN], slots[UP]
        if self.factor == "A":
            A, B = _block_diagonal(A), B.flatten(-2)
        else:
            A, B = A.flatten(-3, -2), _block_diagonal(B)
        return {**slots, DOWN: A, UP: B}

    def _factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        return super()._factors(op, self.with_whole_factors(slots))


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Return the matrices (..., n p, n q) with these n blocks (..., n, p, q) on the diagonal."""
    return torch.diag_embed(blocks.movedim(-3, -1), dim1=-4, dim2=-2).flatten(-4, -3).flatten(-2)
