"""Arrow: y' = y + sum_e c_e s_e B_e A_e x, where each token chooses among LoRA adapters (Ostapenko et al., 2405.11157).

The prototype of an adapter is the first right singular vector p_e of B_e A_e. A token x gets the ``top_k`` adapters
with the largest abs(x p_e); of equal ones the first. c is the softmax of their abs(x p_e) over ``router_temperature``,
and zero for the others. So the routing at a site follows from its adapters, and nothing is trained.

Slots: ``lora_A.weight`` (R, in) and ``lora_B.weight`` (out, R) hold the ranks of all adapters one after the other.
``lora_owner`` (R,) has the number of each rank's adapter, and ``lora_scaling`` (R,) its s. Two slots follow from these
and the config: ``lora_arrow.prototypes`` (adapters, in), divided by the temperature, and ``lora_arrow.counts`` (2,),
the number of adapters and ``top_k``. A swap may change all of them. No file has these slots: PEFT's files hold the
single adapters, and beside them a config that names them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import CheckpointError, ConfigError, TargetError, short_repr
from adaptc.methods._shared.option_checks import OptionGroup, check_integers
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.size_rule import SizeRule

A, B, OWNER, SCALES = "lora_A.weight", "lora_B.weight", "lora_owner", "lora_scaling"
PROTOTYPES, COUNTS = "lora_arrow.prototypes", "lora_arrow.counts"


@dataclass
class ArrowConfig(OptionGroup):
    """PEFT's ``ArrowConfig``: same names, same defaults, for :func:`adaptc.methods.create_arrow_model`.

    Raises ConfigError for values without a meaning.

    Attributes:
        top_k: how many adapters act on a token; all of them where there are fewer.
        router_temperature: the divisor of the scores before the softmax.
        use_gks: whether the mean A and B of general adapters are subtracted from those of the task adapters
            (GenKnowSub).
        task_adapter_names: the names of the task adapters, filled in when they are known.
        gks_adapter_names: the names of the general adapters, filled in when they are known.
        rng_seed: kept for PEFT, which finds prototypes from a random vector. Here they are exact, and nothing is drawn.

    Example:
        >>> config = adaptc.ArrowConfig(top_k=2, router_temperature=1.0)
    """

    option: ClassVar[str] = "arrow_config"

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"top_k": self.top_k})
        if not self.router_temperature > 0:
            raise ConfigError(f"ArrowConfig.router_temperature must be above zero, got {self.router_temperature!r}")

    @classmethod
    def _of_fields(cls, values: dict[str, Any]) -> Self:
        taken = {f.name for f in dataclasses.fields(cls) if f.init}
        new = cls(**{n: v for n, v in values.items() if n in taken})
        return new.with_names(values.get("task_adapter_names"), values.get("gks_adapter_names"))

    def with_names(self, tasks: list[str] | None, general: list[str] | None = None) -> Self:
        """Return this config for adapters with these names: ``tasks`` to route between, ``general`` to subtract."""
        new = copy.copy(self)
        new.task_adapter_names, new.gks_adapter_names = tasks, general
        new.__post_init__()
        return new


class ArrowFiles(FileFormat):
    method: Arrow

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        owner = found.get(OWNER)
        known = owner is None or owner.is_floating_point() or owner.ndim != 1
        if not known and sorted(set(owner.tolist())) != list(range(self.method.count)):  # type: ignore[union-attr]
            raise CheckpointError(
                f"{OWNER!r} says whose each rank is, and is to hold the numbers from 0 to {self.method.count - 1}, of "
                f"the {self.method.count} adapters of the config; found {short_repr(sorted(set(owner.tolist())))}"  # type: ignore[union-attr]
            )
        return dict(found)

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        a, b, owner = found[A].to(dtype), found[B].to(dtype), found[OWNER]
        ranks = [(owner == e).nonzero().flatten() for e in range(self.method.count)]
        p = torch.stack([top_right_singular_vector(a[own], b[:, own]) for own in ranks])
        counts = torch.tensor([self.method.count, min(self.method.top_k, torch.iinfo(torch.int32).max)])
        return {PROTOTYPES: (p / self.method.temperature).to(dtype), COUNTS: counts}


class ArrowSizes(SizeRule):
    method: Arrow

    def minimal(self, op: Op) -> Arrow:
        return dataclasses.replace(self.method, r=2, count=2)

    def with_sizes_of(self, op: Op, slots: Slots) -> Arrow:
        a, p = slots.get(A), slots.get(PROTOTYPES)
        new = self.method if a is None or a.ndim != 2 else dataclasses.replace(self.method, r=a.shape[0])
        return new if p is None or p.ndim != 2 else dataclasses.replace(new, count=p.shape[0])


@dataclass(frozen=True)
class Arrow(Method):
    """Arrow at one site. ``r``: the sum of the ranks of its ``count`` adapters."""

    name: ClassVar[str] = "arrow"
    slot_family: ClassVar[str] = "lora"
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"count", "top_k", "temperature"}
    takes_complex: ClassVar[bool] = False  # scores have an order
    files = ArrowFiles(names=(A, B, OWNER, SCALES))
    sizes = ArrowSizes()

    r: int = 8
    count: int = 1
    top_k: int = 3
    temperature: float = 1.0

    def slots(self, op: Op) -> dict[str, Slot]:
        if op.kind not in ("linear", "addmm") or not op.callable:
            raise TargetError(
                f"Arrow chooses by what a linear layer reads, and this weight is one of kind {op.kind!r}; leave it out"
            )
        out, inputs = op.matrix_shape
        whose = Slot((self.r,), free=(0,), dtype=torch.int64, trainable=False)
        return {
            A: Slot((self.r, inputs), free=(0,), trainable=False),
            B: Slot((out, self.r), free=(1,), trainable=False),
            OWNER: whose,
            SCALES: Slot((self.r,), free=(0,), trainable=False),
            PROTOTYPES: Slot((self.count, inputs), free=(0,), trainable=False, saved=False, apart=True),
            COUNTS: Slot((2,), 1, dtype=torch.int64, trainable=False, saved=False),
        }

    def scale(self, op: Op) -> float:
        return 1.0

    def inside_multihead_attention(self) -> Arrow:
        raise TargetError("Arrow has no meaning in MultiheadAttention, as in PEFT; leave it out")

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        raise ConfigError(
            "arrow_config routes between adapters that there are already: give them to "
            "adaptc.methods.create_arrow_model"
        )

    def untrainable(self, slots: Slots) -> str:
        return "Arrow routes between adapters that are trained already, and has nothing to train, as in PEFT"

    def check_merge(self, op: Op) -> str:
        return "Arrow chooses its adapters by what a call reads, which no weight can hold"

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        x = cast(x, slots[A].dtype)
        prototypes = slots[PROTOTYPES]
        # Counted by cumsum: arange over the size would record the number of adapters, which a swap may change.
        number = torch.ones_like(prototypes.select(1, 0), dtype=torch.int64).cumsum(0)
        c = routing_weights(F.linear(x, prototypes).abs(), number, slots[COUNTS])
        h = F.linear(x, slots[A]) * (c.index_select(-1, slots[OWNER]) * slots[SCALES])
        return cast(y + F.linear(h, slots[B]) * scale, y.dtype)


def routing_weights(scores: Tensor, adapter_numbers: Tensor, counts: Tensor) -> Tensor:
    """Return the weight of each adapter: the softmax of the ``counts[1]`` largest ``scores``, zero for the others.

    ``scores``: (..., adapters). ``number`` (adapters,): 1, 2, and so on. ``counts`` (2,): the number of adapters and
    ``top_k``; entries of ``scores`` beyond the number of adapters are padding.
    """
    lowest = torch.finfo(scores.dtype).min
    scores = torch.where(adapter_numbers <= counts[0], scores, lowest)
    # Not topk, which needs its k as a constant: a swap may change top_k. The pairs are few.
    mine, other = scores.unsqueeze(-1), scores.unsqueeze(-2)
    before = (other > mine) | ((other == mine) & (adapter_numbers < adapter_numbers.unsqueeze(-1)))
    return F.softmax(torch.where(before.sum(-1) < counts[1], scores, lowest), dim=-1)


def top_right_singular_vector(a: Tensor, b: Tensor) -> Tensor:
    """Return the first right singular vector of ``b @ a``, for ``a`` (r, in) and ``b`` (out, r).

    The result is (in,) in float64, of length one and either sign, and zero where the matmul is zero. Only matrices of
    size r are decomposed. G and C are the Gram matrices of ``a`` and ``b``, and w is the first eigenvector of
    G^(1/2) C G^(1/2); then the vector is a' C G^(1/2) w.
    """
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(a @ a.T)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    gram = b.T @ b
    w = torch.linalg.eigh(root @ gram @ root).eigenvectors[:, -1]
    v = a.T @ (gram @ (root @ w))
    return v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)
