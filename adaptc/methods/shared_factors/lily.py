"""Lily: y' = y + s sum_i p_i B_i A x, p the mean of softmax(R A x) over all tokens (Zhong et al., 2407.09946).

All layers with the same target entry and weight shape share their factors B; each run of ``stride_A`` of these layers
shares one A. Only the router R is a layer's own. As in PEFT, the mean is over the whole batch, padding included. So the
result of a row depends on the other rows of its batch, and a step of generation averages over its own tokens only. No
weight does the same, and per-row adapters are not possible.

Slots: ``lily_A.weight`` (r, in), ``lily_router.weight`` (n, r) and ``lily_B.weight``, here (n, r, out), and in PEFT's
files (n r, out). Files repeat shared tensors under each layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import CheckpointError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.name_patterns import proper_suffixes
from adaptc.methods._shared.option_checks import check_integers
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.bank_form import BankForm
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.passes.protocol.parts.size_rule import SizeRule

A, B, ROUTER = "lily_A.weight", "lily_B.weight", "lily_router.weight"
_ALL_LINEAR = "all-linear"


@dataclass
class LilyConfig(TargetedConfig):
    """PEFT's ``LilyConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        stride_A: how many layers in succession share one A.
        num_B: the number of B that all layers share.
        scaling: the factor on the change.

    Example:
        >>> config = adaptc.LilyConfig(r=8, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "LILY"

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r, "stride_A": self.stride_A})
        check_integers(self, {"num_B": self.num_B}, 2)  # or there is nothing to choose

    def method(self, name: str, kind: str) -> Lily:
        return Lily(self.r, self.num_B, self.scaling, self.stride_A, self._target_entry(name), self.init_weights)

    def _target_entry(self, name: str) -> str:
        """Return the target entry of the module ``name``, by which modules share factors: the longest that ends it.

        A regular expression is one entry. For "all-linear" the entry is the last part of the name.
        """
        if isinstance(self.target_modules, str):
            return name.rpartition(".")[2] if self.target_modules.lower() == _ALL_LINEAR else self.target_modules
        entries = {*(self.target_modules or ()), *(self.target_parameters or ())}
        return next((e for e in (name, *proper_suffixes(name)) if e in entries), name)


class LilyFiles(FileFormat):
    method: Lily

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = dict(found)
        if B in values:
            b = values[B]
            if b.ndim != 2 or b.shape[0] % self.method.count:
                raise CheckpointError(
                    f"{B!r} has shape {tuple(b.shape)}; expected a matrix with a multiple of "
                    f"num_B={self.method.count} rows"
                )
            values[B] = b.unflatten(0, (self.method.count, -1))
        return values

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        return {n: t.flatten(0, 1) if n == B else t for n, t in slots.items()}


class LilySizes(SizeRule):
    method: Lily

    def minimal(self, op: Op) -> Lily:
        return replace(self.method, r=2)


class LilySharing(SharedSlots):
    method: Lily

    def grouped_slots(self, sites: Sequence[tuple[Method, Op]]) -> list[Mapping[str, int]]:
        members: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        out: list[Mapping[str, int]] = []
        for i, (method, op) in enumerate(sites):
            assert isinstance(method, Lily)
            group = members.setdefault((method.entry, op.shape), [])
            group.append(i)
            last = len(group) - 1
            out.append({A: group[last - last % method.stride], B: group[0]})
        return out


@dataclass(frozen=True)
class Lily(Method):
    """Lily at one site. ``entry`` and ``stride``: which sites share factors. ``scheme`` False: B is random, too."""

    name: ClassVar[str] = "lily"
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"scaling", "stride", "entry"}
    takes_complex: ClassVar[bool] = False  # a softmax has no meaning for complex numbers
    files = LilyFiles(names=(A, B, ROUTER))
    sizes = LilySizes(rank_axes={A: 0})
    bank = BankForm(row_wise=False)
    sharing = LilySharing()

    r: int = 32
    count: int = 2
    scaling: float = 1.0
    stride: int = 1
    entry: str = ""
    scheme: bool = True

    def slots(self, op: Op) -> dict[str, Slot]:
        if op.kind not in ("linear", "addmm") or not op.callable:
            raise TargetError(
                f"Lily chooses by what a linear layer reads, and this weight is one of kind {op.kind!r}; leave it out"
            )
        out, inputs = op.matrix_shape
        return {
            A: Slot((self.r, inputs), free=(0,)),
            B: Slot((self.count, self.r, out), free=(1,)),
            ROUTER: Slot((self.count, self.r), free=(1,)),
        }

    def scale(self, op: Op) -> float:
        return self.scaling

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        out, inputs = op.matrix_shape
        source = torch.device("cpu") if generator is None else generator.device

        def draw(*shape: int) -> Tensor:
            t = torch.empty(shape, dtype=torch.get_default_dtype(), device=source)
            return torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)

        shapes = {A: (self.r, inputs), B: (self.count * self.r, out), ROUTER: (self.count, self.r)}
        # PEFT makes layers, which draw values, and then draws again: without this, one seed would give other values.
        for shape in shapes.values():
            draw(*shape)
        values = {name: draw(*shapes[name]) for name in (A, ROUTER)}
        values[B] = torch.zeros(shapes[B]) if self.scheme else draw(*shapes[B])
        return InitialValues({n: t.to(W.device, dtype) for n, t in self.files.read(op, values).items()})

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        factors = slots[B]
        h = F.linear(cast(x, slots[A].dtype), slots[A])
        p = F.softmax(F.linear(h, slots[ROUTER]), dim=-1).reshape(-1, self.count).mean(0)
        mixed = (p @ factors.flatten(1)).unflatten(0, (-1, op.out_features))
        return cast(y + (h @ mixed) * scale, y.dtype)

    def check_merge(self, op: Op) -> str | None:
        return "Lily chooses its factors by what a call reads, which no weight can hold"
