"""Supertuning: W' = W + D, with D trained where W has its largest entries, and optionally LoRA's (a/r) B A beside it
(arXiv 2607.09287).

Slots: ``supertuning_values`` (n,) and ``supertuning_indices`` (n,), int32, which count the places in the weight as one
matrix, row by row. n is the share 1 - ``sparsity`` of the weight's entries. Without ``save_precomputed_indices`` no
file has the indices, and they are found again in the weight. With ``r`` there are ``supertuning_lora_A.weight`` (r, in)
and ``supertuning_lora_B.weight`` (out, r), too. PEFT adapts linear layers alone; here W is any weight as a matrix,
kernels in its columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptc.errors import CheckpointError, ConfigError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import (
    applies_dropout,
    check_integers,
    check_matrix,
    check_probability,
    prepare_adapter_input,
    warn_unused,
)
from adaptc.methods.sparse.sparse import scatter_dense
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.size_rule import SizeRule

VALUES, INDICES = "supertuning_values", "supertuning_indices"
LORA_A, LORA_B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"
#: the slot with alpha / r. It is not the method's scale, since it is for the low-rank part alone.
LORA_SCALE = "supertuning_lora_scale"
#: the most entries of a weight whose places an int32 can count
MAX_ENTRIES = 2**31


@dataclass
class SupertuningConfig(TargetedConfig):
    """PEFT's ``SupertuningConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        sparsity: the share of the weight's entries that stay as they are.
        select_top: whether the largest entries are trained; False for the smallest.
        r: the rank of the low-rank part; None for none.
        lora_alpha: the numerator of the low-rank part's scale; None for 2 r.
        lora_dropout: the dropout probability of the low-rank part's input.
        save_precomputed_indices: whether files hold the places of the trained entries.

    Example:
        >>> config = adaptc.SupertuningConfig(sparsity=0.99, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "SUPERTUNING"
    dropout_field: ClassVar[str] = "lora_dropout"

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(f"SupertuningConfig.sparsity must lie in [0, 1), got {self.sparsity!r}")
        check_probability(self, "lora_dropout")
        if self.r is None:
            if self.lora_alpha is not None:
                raise ConfigError(
                    f"SupertuningConfig.lora_alpha={self.lora_alpha!r} is the scale of the low-rank part, which there "
                    "is only with a rank: set r, too, or leave lora_alpha out"
                )
            warn_unused(self, ["lora_dropout"], "without r")
            return
        check_integers(self, {"r": self.r})
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r

    def method(self, name: str, kind: str) -> Supertuning:
        return Supertuning(
            r=self.r or 0,
            hybrid=self.r is not None,
            alpha=self.lora_alpha or 0.0,
            sparsity=self.sparsity,
            largest=self.select_top,
            saved=self.save_precomputed_indices,
            dropout=self.lora_dropout if self.r is not None else 0.0,
            scheme=self.init_weights,
        )


class SupertuningFiles(FileFormat):
    method: Supertuning

    def keys(self, op: Op) -> list[str]:
        return [INDICES]  # a file may hold what could be found again

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        indices = found.get(INDICES)
        if indices is None:
            return dict(found)
        outside = indices[(indices < 0) | (indices >= math.prod(op.matrix_shape))]
        if outside.numel():
            raise CheckpointError(
                f"{INDICES} holds {int(outside[0])}, and the matrix of shape {op.matrix_shape} has "
                f"{math.prod(op.matrix_shape)} entries"
            )
        return dict(found)

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        count = found[VALUES].shape[0] if VALUES in found else self.method.entries_at(op)
        values = {**self.method.identity(op, W, dtype), INDICES: self.method.find_indices(op, W, count)}
        if self.method.hybrid:
            values[LORA_SCALE] = torch.full((1,), self.method.alpha / self.method.r, dtype=dtype, device=W.device)
        return values


class SupertuningSizes(SizeRule):
    method: Supertuning

    def rank(self) -> int | None:
        return self.method.r if self.method.hybrid else self.method.entries

    def with_rank(self, op: Op, rank: int) -> Supertuning:
        if not self.method.hybrid:
            return dataclasses.replace(self.method, entries=rank)
        return dataclasses.replace(self.method, r=rank, entries=2)

    def minimal(self, op: Op) -> Supertuning:
        return self.with_rank(op, 2 * op.groups)

    def specialized_for(self, op: Op) -> Supertuning:
        return dataclasses.replace(self.method, entries=self.method.entries_at(op))

    def with_sizes_of(self, op: Op, slots: Slots) -> Supertuning:
        values, a = slots.get(VALUES), slots.get(LORA_A)
        method = self.method if values is None else dataclasses.replace(self.method, entries=values.shape[0])
        return method if a is None else dataclasses.replace(method, r=a.shape[0])


@dataclass(frozen=True)
class Supertuning(Method):
    """Supertuning at one site; with ``hybrid`` it has a low-rank part.

    ``entries``: the number of trained entries, 0 for what ``sparsity`` gives. ``largest``: whether they are the largest
    ones. ``saved``: whether their places are in files. ``dropout`` acts on the input of the low-rank part, in training.
    """

    name: ClassVar[str] = "supertuning"
    takes_complex: ClassVar[bool] = False
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"sparsity", "largest", "saved", "entries"}
    files = SupertuningFiles(names=(VALUES, INDICES, LORA_A, LORA_B))
    sizes = SupertuningSizes()

    r: int = 0
    hybrid: bool = False
    alpha: float = 0.0
    sparsity: float = 0.99
    largest: bool = True
    saved: bool = True
    entries: int = 0
    dropout: float = 0.0
    scheme: bool = True
    training: bool = False

    def entries_at(self, op: Op) -> int:
        """Return how many entries of the weight are trained.

        Raises TargetError where ``sparsity`` leaves none, and for a weight with more entries than an int32 can count.
        """
        total = math.prod(op.matrix_shape)
        if total > MAX_ENTRIES:
            raise TargetError(
                f"Supertuning counts the entries of a weight with int32, and this one of shape {op.shape} has {total}, "
                f"more than {MAX_ENTRIES}: leave this layer out"
            )
        count = self.entries or int(total * (1 - self.sparsity))
        if count < 1:
            raise TargetError(
                f"Supertuning with sparsity={self.sparsity} trains none of the {total} entries of this weight; a "
                f"sparsity below {1 - 1 / total:.6g} trains one or more"
            )
        return count

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("Supertuning", op)
        (rows, columns), n = op.matrix_shape, self.entries_at(op)
        # The number of entries does not follow from the rank of the low-rank part, where there is one.
        size: Any = {"free": (0,), **({"apart": ("entries",), "fills_up": True} if self.hybrid else {})}
        slots = {
            VALUES: Slot((n,), **size),
            INDICES: Slot((n,), dtype=torch.int32, trainable=False, saved=self.saved, **size),
        }
        if self.hybrid:
            slots[LORA_A] = Slot((self.r, columns), free=(0,))
            slots[LORA_B] = Slot((rows, self.r), free=(1,))
            slots[LORA_SCALE] = Slot((1,), trainable=False, saved=False)
        return slots

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        n, source = self.entries_at(op), torch.device("cpu") if generator is None else generator.device
        found = self.files.derived(op, W, dtype, {})
        drawn = {VALUES: torch.zeros(n, device=source)}
        if not self.scheme:
            drawn[VALUES] = torch.randn(n, device=source, generator=generator)
        if self.hybrid:
            specs = self.slots(op)
            a, b = (torch.empty(specs[name].shape, device=source) for name in (LORA_A, LORA_B))
            for t in (a, b, a):  # PEFT makes two linear layers, and then draws the first again
                nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)
            if self.scheme:
                b.zero_()
            else:
                nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=generator)
            drawn |= {LORA_A: a, LORA_B: b}
        return InitialValues({**found, **{name: t.to(W.device, dtype) for name, t in drawn.items()}})

    def find_indices(self, op: Op, W: Tensor, count: int) -> Tensor:
        """Return the places of the ``count`` largest entries of the weight, or of the smallest: (count,), int32."""
        sizes = op.matrix(W).detach().abs().flatten()
        return torch.topk(sizes, count, largest=self.largest).indices.to(torch.int32)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        wide = torch.promote_types(W.dtype, slots[VALUES].dtype)
        change = self._sparse(op, slots)
        if self.hybrid:
            change = change + (slots[LORA_B] @ slots[LORA_A]) * slots[LORA_SCALE]
        return cast(cast(W, wide) + op.unmatrix(cast(change, wide)), W.dtype)

    def has_apply(self, op: Op) -> bool:
        # Only dropout needs a form around the layer: the sparse part would need a second matmul there.
        return op.callable and self.hybrid and applies_dropout(self, op)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        plain = op.cast_input(x, slots[VALUES].dtype)
        dropped = prepare_adapter_input(self, op, x, slots[VALUES].dtype)
        low_rank = op.unmatrix((slots[LORA_B] @ slots[LORA_A]) * slots[LORA_SCALE])
        delta = op(plain, op.unmatrix(self._sparse(op, slots))) + op(dropped, low_rank)
        return cast(y + delta, y.dtype)

    def _sparse(self, op: Op, slots: Slots) -> Tensor:
        """Return D as a matrix, (rows, columns)."""
        rows, columns = op.matrix_shape
        return scatter_dense((rows, columns), slots[INDICES].long(), slots[VALUES])
