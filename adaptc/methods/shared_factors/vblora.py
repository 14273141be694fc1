"""VB-LoRA: W' = W + B A, both made of vectors that all sites take from one bank (Li et al., arXiv 2405.15179).

Slots, in PEFT's shapes, with b = ``vector_length``: each site has ``vblora_logits_A`` (r, in/b, vectors) and
``vblora_logits_B`` (out/b, r, vectors); all sites share ``vblora_vector_bank`` (vectors, b), which is trained. Each
piece of length b is the mean of its ``topk`` vectors, weighted by the softmax of their logits. Beyond PEFT's linear
layers, W is the weight as a matrix, kernels in its columns.

Files with ``save_only_topk_weights`` have ``<logits>_topk_indices`` and ``<logits>_topk_weights`` in place of the
logits. The last weight is left out, since the weights add up to one. Such an adapter can be run and merged, but not
trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import CheckpointError, ConfigError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_integers, check_matrix, check_probability, prepare_adapter_input
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.method_part import SiteDescription
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.passes.protocol.parts.size_rule import SizeRule

A, B, BANK = "vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"
RANK_MASK = "vblora_ranks"
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"
#: the logit of a vector outside the top k: finite, and its softmax is zero in every dtype
UNSELECTED_LOGIT = -1e4


@dataclass
class VBLoRAConfig(TargetedConfig):
    """PEFT's ``VBLoRAConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        num_vectors: the number of vectors in the shared bank.
        vector_length: the length of a vector; it must divide the sizes of the layers.
        topk: how many vectors of the bank make one part of a factor.
        save_only_topk_weights: whether files hold only the chosen logits; such an adapter cannot be trained further.
        vblora_dropout: the dropout probability of the adapter's input.
        init_vector_bank_bound: the bound of the first values of the bank.
        init_logits_std: the standard deviation of the first logits.

    Example:
        >>> config = adaptc.VBLoRAConfig(r=4, num_vectors=256, vector_length=64, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "VBLORA"
    dropout_field: ClassVar[str] = "vblora_dropout"

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {n: getattr(self, n) for n in ("r", "num_vectors", "vector_length", "topk")})
        if self.topk > self.num_vectors:
            raise ConfigError(
                f"VBLoRAConfig.topk={self.topk} vectors cannot be chosen out of num_vectors={self.num_vectors}"
            )
        check_probability(self, "vblora_dropout")

    def method(self, name: str, kind: str) -> VBLoRA:
        return VBLoRA(
            r=self.r,
            vectors=self.num_vectors,
            length=self.vector_length,
            topk=self.topk,
            only_topk=self.save_only_topk_weights,
            dropout=self.vblora_dropout,
            bound=self.init_vector_bank_bound,
            std=self.init_logits_std,
        )


class VBLoRAFiles(FileFormat):
    method: VBLoRA

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return {RANK_MASK: torch.ones(self.method.r, dtype=dtype, device=W.device)}

    def keys(self, op: Op) -> list[str]:
        return [n + part for n in (A, B) for part in (INDICES, WEIGHTS)]

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {n: t for n, t in found.items() if n not in self.keys(op)}
        for name in (A, B):
            pair = found.get(name + INDICES), found.get(name + WEIGHTS)
            if name in found or pair == (None, None):
                continue
            out[name] = self._logits_from_topk(name, *pair)
        if self.method.training and out.keys() != found.keys():
            raise CheckpointError(
                "the adapter was saved with save_only_topk_weights=True, so all but its best vectors are lost and it "
                "cannot be trained further; compile with training=False, or take a checkpoint that has the logits"
            )
        return out

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        if not self.method.only_topk:
            return dict(slots)
        small = ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31))
        kind = next((d for d, limit in small if self.method.vectors < limit), torch.int64)
        out = {n: t for n, t in slots.items() if n not in (A, B)}
        for name in (A, B):
            best, index = slots[name].topk(self.method.topk, dim=-1)
            out[name + INDICES] = index.to(kind)
            out[name + WEIGHTS] = best.softmax(-1)[..., :-1].contiguous()
        return out

    def _logits_from_topk(self, name: str, indices: Tensor | None, weights: Tensor | None) -> Tensor:
        if indices is None or weights is None:
            missing = name + (INDICES if indices is None else WEIGHTS)
            raise CheckpointError(f"{missing!r} is missing, while its other half is there")
        k, shape = self.method.topk, tuple(indices.shape)
        if indices.is_floating_point() or not shape or shape[-1] != k or tuple(weights.shape) != (*shape[:-1], k - 1):
            raise CheckpointError(
                f"{name + INDICES!r} has shape {shape} and {name + WEIGHTS!r} {tuple(weights.shape)}; with "
                f"topk={k} their last sizes must be {k} and {k - 1}, and the others equal"
            )
        index = indices.to(torch.int64)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.method.vectors:
            raise CheckpointError(
                f"{name + INDICES!r} holds indices from {int(index.min())} to {int(index.max())}, and the bank has "
                f"{self.method.vectors} vectors"
            )
        # Rounding may make the last weight negative, whose log is NaN.
        last = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
        logits = torch.cat([weights, last], -1).log().clamp(min=UNSELECTED_LOGIT)
        return logits.new_full((*shape[:-1], self.method.vectors), UNSELECTED_LOGIT).scatter(-1, index, logits)

    # -- meaning -------------------------------------------------------------------------------------------------------


class VBLoRASizes(SizeRule):
    method: VBLoRA

    def minimal(self, op: Op) -> VBLoRA:
        return replace(self.method, r=2)


@dataclass(frozen=True)
class VBLoRA(Method):
    """VB-LoRA at one site. ``dropout`` acts on the input of the adapter, in training only.

    No logits give zero, so the slot ``vblora_ranks``, which is not in files, masks the ranks: zeros at a site that the
    adapter lacks.
    """

    name: ClassVar[str] = "vblora"
    takes_complex: ClassVar[bool] = False
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"only_topk", "bound", "std"}
    files = VBLoRAFiles()
    sizes = VBLoRASizes(rank_axes={A: 0, A + INDICES: 0})
    sharing = SharedSlots(shares=True)

    r: int = 4
    vectors: int = 256
    length: int = 256
    topk: int = 2
    only_topk: bool = False
    dropout: float = 0.0
    bound: float = 0.02
    std: float = 0.1
    training: bool = False

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("VB-LoRA", op)
        rows, columns = op.matrix_shape
        if rows % self.length or columns % self.length:
            common = gcd(rows, columns)
            fits = [n for n in range(1, common + 1) if common % n == 0]
            near = sorted(fits, key=lambda n: (abs(n - self.length), n))[:4]
            raise TargetError(
                f"VB-LoRA needs a vector_length that divides both sizes of the weight, {rows} outputs and {columns} "
                f"inputs; vector_length={self.length} does not. Of those that do, {sorted(near)} are nearest."
            )
        return {
            A: Slot((self.r, columns // self.length, self.vectors), free=(0,)),
            B: Slot((rows // self.length, self.r, self.vectors), free=(1,)),
            BANK: Slot((self.vectors, self.length), shared=True),
            RANK_MASK: Slot((self.r,), free=(0,), trainable=False, saved=False),
        }

    def rebind(self, config: Any, place: SiteDescription) -> Method:
        new = super().rebind(config, place)
        return replace(new, training=self.training) if isinstance(new, VBLoRA) else new

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        shapes = {n: s.shape for n, s in self.slots(op).items()}
        bank = torch.empty(shapes[BANK]).uniform_(-self.bound, self.bound, generator=generator)
        a, b = (torch.empty(shapes[n]).normal_(0, self.std, generator=generator) for n in (A, B))
        return InitialValues(
            {A: a.to(dtype), B: b.to(dtype), BANK: bank.to(dtype), RANK_MASK: torch.ones(self.r, dtype=dtype)}
        )

    # -- files ---------------------------------------------------------------------------------------------------------

    def _factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        """Return A (r, columns) and B (rows, r), made of the bank's vectors."""

        def mix_vectors(logits: Tensor) -> Tensor:
            best, index = logits.topk(self.topk, dim=-1)
            vectors = F.embedding(index, cast(slots[BANK], logits.dtype))
            return (best.softmax(-1).unsqueeze(-1) * vectors).sum(-2)

        down = mix_vectors(slots[A]).flatten(1) * slots[RANK_MASK].unsqueeze(-1)
        return down, mix_vectors(slots[B]).transpose(1, 2).reshape(op.matrix_shape[0], -1)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        down, up = self._factors(op, slots)
        return cast(W + op.unmatrix(up @ down), W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        down, up = self._factors(op, slots)
        x = prepare_adapter_input(self, op, x, down.dtype)
        delta = op.up(op(x, down.reshape(-1, *op.shape[1:])), up)
        return cast(y + delta, y.dtype)
