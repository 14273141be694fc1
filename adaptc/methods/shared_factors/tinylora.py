"""TinyLoRA: W' = W + B R A, where R = sum_i v_i P_i is made of few trained numbers v (arXiv 2602.04118).

A = sqrt(S) V^T and B = U sqrt(S) are the leading terms of the SVD of W, and P are random matrices. All three are
frozen. With ``weight_tying``, runs of layers share one v: the number of vectors is that of the layers times one minus
``weight_tying``.

Slots, in PEFT's shapes: ``tinylora_A`` (r, in), ``tinylora_B`` (out, r), ``tinylora_P`` (u, r, r) and ``tinylora_v``
(u,). An embedding's A is (r, width), and its B (vocabulary, r). A layer with a size below r has a smaller rank. Files
hold each v once, under the number of its run. With ``save_projection`` they hold P. Without, it is drawn with
``projection_seed`` plus the number of the layer, bit for bit as in PEFT. Beyond PEFT's layers, W is the weight as a
matrix, kernels in its columns. The matrices of stacked experts share v and P.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_integers, check_matrix, check_probability, prepare_adapter_input
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.passes.protocol.parts.size_rule import SizeRule
from adaptc.torch_modes import outside_modes

A, B, P, V = "tinylora_A", "tinylora_B", "tinylora_P", "tinylora_v"


@dataclass
class TinyLoraConfig(TargetedConfig):
    """PEFT's ``TinyLoraConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        r: the number of terms of the SVD.
        u: the number of trained values of a run of layers.
        weight_tying: how much layers share, from 0 (each has values of its own) to 1 (all have the same).
        projection_seed: the seed of the random matrices.
        save_projection: whether files hold the random matrices.
        init_v_bound: the bound of the first values with ``init_weights="uniform"``.
        tinylora_dropout: the dropout probability of the adapter's input; at an embedding, of the rows that it looks up
            in B.
        init_weights: True for zeros, "uniform" for values within the bound. False draws them from the normal
            distribution, where PEFT leaves what is in memory.

    Example:
        >>> config = adaptc.TinyLoraConfig(r=2, u=13, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "TINYLORA"
    dropout_field: ClassVar[str] = "tinylora_dropout"

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r, "u": self.u})
        check_probability(self, "weight_tying", allow_one=True)
        check_probability(self, "tinylora_dropout")
        if self.init_weights not in (True, False, "uniform"):
            raise ConfigError(
                f"TinyLoraConfig.init_weights must be True, False or 'uniform', got {self.init_weights!r}"
            )
        if not self.init_v_bound >= 0:
            raise ConfigError(f"TinyLoraConfig.init_v_bound must not be negative, got {self.init_v_bound!r}")

    def method(self, name: str, kind: str) -> TinyLora:
        return TinyLora(
            r=self.r,
            count=self.u,
            tying=self.weight_tying,
            key=self.projection_seed,
            saved=self.save_projection,
            bound=self.init_v_bound,
            dropout=self.tinylora_dropout,
            scheme=self.init_weights,
        )


class TinyLoraFiles(FileFormat):
    method: TinyLora

    def keys(self, op: Op) -> list[str]:
        return [P]  # a file may hold what could be drawn again

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return {**self.method.identity(op, W, dtype), P: self.method.draw_projections(W, dtype)}


class TinyLoraSizes(SizeRule):
    method: TinyLora

    def specialized_for(self, op: Op) -> TinyLora:
        return replace(self.method, r=min(self.method.r, *self.method.sizes_of_matrix(op)))


class TinyLoraSharing(SharedSlots):
    method: TinyLora

    def settle_shared_sizes(self, sites: Sequence[tuple[Method, Op]]) -> list[Method]:
        return [
            replace(method, index=i, group=method.group_of(i, len(sites)), leads=method.leads_group(i, len(sites)))
            for i, (method, _) in enumerate(sites)
            if isinstance(method, TinyLora)
        ]

    def grouped_slots(self, sites: Sequence[tuple[Method, Op]]) -> list[Mapping[str, int]]:
        first: dict[int, int] = {}
        groups = [method.group for method, _ in sites if isinstance(method, TinyLora)]
        return [{V: first.setdefault(group, i)} for i, group in enumerate(groups)]


@dataclass(frozen=True)
class TinyLora(Method):
    """TinyLoRA at one site.

    ``index`` is the number of the site among those of its adapter, and ``group`` that of its run of layers. ``leads``:
    whether it is the first site of the run. ``dropout`` acts in training only.
    """

    name: ClassVar[str] = "tinylora"
    stacks: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = False  # PEFT's SVD is one of real numbers
    swappable: ClassVar[frozenset[str]] = Method.swappable | {
        "tying",
        "key",
        "saved",
        "bound",
        "index",
        "group",
        "leads",
    }
    files = TinyLoraFiles()
    sizes = TinyLoraSizes(rank_axes={A: -2})
    sharing = TinyLoraSharing()

    r: int = 2
    count: int = 64
    tying: float = 0.0
    key: int = 42
    saved: bool = True
    bound: float = 0.02
    dropout: float = 0.0
    scheme: bool | str = True
    training: bool = False
    index: int = 0
    group: int = 0
    leads: bool = True

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("TinyLoRA", op)
        outputs, inputs = self.sizes_of_matrix(op)
        stack = (op.experts,) if op.experts else ()
        a, b = (*stack, self.r, inputs), (*stack, outputs, self.r)
        return {
            A: Slot(a, free=(len(a) - 2,), trainable=False),
            B: Slot(b, free=(len(b) - 1,), trainable=False),
            P: Slot((self.count, self.r, self.r), free=(1, 2), trainable=False, saved=self.saved),
            V: Slot((self.count,), key=f"{V}.{self.group}"),
        }

    def sizes_of_matrix(self, op: Op) -> tuple[int, int]:
        """Return the rows and columns of the matrix that is decomposed: an embedding's as it is stored."""
        if op.experts:
            return op.shape[1], op.shape[2]
        rows, columns = op.matrix_shape
        return (columns, rows) if op.kind == "embedding" else (rows, columns)

    # -- runs of layers ------------------------------------------------------------------------------------------------

    def group_of(self, index: int, count: int) -> int:
        """Return the number of the run that the site ``index``, of ``count`` sites, belongs to."""
        groups = max(1, round(count * (1.0 - self.tying)))
        return min(index // max(1, count // groups), groups - 1)

    def leads_group(self, index: int, count: int) -> bool:
        """Return whether the site is the first one of its run."""
        return index == 0 or self.group_of(index - 1, count) != self.group_of(index, count)

    # -- values --------------------------------------------------------------------------------------------------------

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        matrix = W if op.experts else W.t() if op.kind == "embedding" else op.matrix(W)
        if not W.is_meta and not bool(torch.isfinite(matrix).all()):
            raise ConfigError(f"TinyLoRA decomposes the weight, but the weight of shape {tuple(W.shape)} is not finite")
        left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
        # PEFT rounds each to the base weight's dtype before it multiplies them.
        left, roots, right = (
            t.to(W.dtype) for t in (left[..., : self.r], values[..., : self.r], right[..., : self.r, :])
        )
        roots = roots.sqrt()
        v = torch.zeros(self.count, dtype=W.dtype)
        if self.leads and self.scheme == "uniform":  # the first site of a run draws for all of it
            v.uniform_(-self.bound, self.bound, generator=generator)
        elif self.leads and not self.scheme:
            v.normal_(generator=generator)
        return InitialValues(
            {
                A: (roots.unsqueeze(-1) * right).to(dtype).contiguous(),
                B: (left * roots.unsqueeze(-2)).to(dtype).contiguous(),
                P: self.draw_projections(W, dtype),
                V: v.to(W.device, dtype),
            }
        )

    def draw_projections(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the random matrices of the site, (u, r, r), as PEFT draws them."""
        with outside_modes(), torch.no_grad():
            generator = torch.Generator().manual_seed(self.key + self.index)
            shape = (self.count, self.r, self.r)
            drawn = torch.normal(0.0, self.r**-0.5, shape, generator=generator)
            return drawn.to(W.dtype).to(W.device, dtype)  # PEFT holds them in the base weight's dtype

    # -- meaning -------------------------------------------------------------------------------------------------------

    def _factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        """Return the down projection (r, columns) and the up projection (rows, r) of the canonical weight."""
        v, a, b = slots[V], slots[A], slots[B]
        mixed = (v.reshape(-1, 1, 1) * cast(slots[P], v.dtype)).sum(0)
        a, b = cast(a, v.dtype), cast(b, v.dtype)
        return (b.t(), a.t() @ mixed.t()) if op.kind == "embedding" else (a, b @ mixed)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        down, up = self._factors(op, slots)
        return cast(W + op.unmatrix(up @ down), W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        down, up = self._factors(op, slots)
        h = op(prepare_adapter_input(self, op, x, down.dtype), down.reshape(-1, *op.shape[1:]))
        if op.kind == "embedding" and self.drops_input():
            h = F.dropout(h, self.dropout, training=True)
        return cast(y + op.up(h, up), y.dtype)
