"""LoRA: W' = W + s B A, s = alpha / r or alpha / sqrt(r) (Hu et al., arXiv 2106.09685; Kalajdzievski, 2312.03732).

Slots, in PEFT's shapes: ``lora_A.weight`` (r, in[, *kernel]) and ``lora_B.weight`` (out, r/groups[, 1...]); at
embeddings ``lora_embedding_A`` (r, vocab) and ``lora_embedding_B`` (width, r). For E stacked experts A is (r*E, in),
expert-major, and B is (out, r*E), rank-major. With ``lora_bias`` there is ``lora_B.bias`` (out,).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError, TargetError
from adaptc.methods._shared.option_checks import check_matrix, prepare_adapter_input
from adaptc.methods.lora_family.loftq import LOFTQ_SCHEMES, LoftQConfig
from adaptc.methods.lora_family.lora_init import DATA_SCHEMES, init_lora, rest_of_weight
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.low_rank_rows import low_rank_rows, multiply_or_zero
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.bank_form import BankForm
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.kernel_form import KernelForm
from adaptc.passes.protocol.parts.low_rank import LowRank
from adaptc.passes.protocol.parts.method_part import SiteDescription
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.passes.protocol.parts.size_rule import SizeRule

#: the names of LoRA's tensors in files, after the path of the site
LORA_NAMES = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_B.bias")


class LoraFiles(FileFormat):
    method: Lora

    def low_rank(self, found: Slots) -> LowRank | None:
        (a, A), (b, B) = self._factor_pair(found)
        if A.ndim > 2:  # a convolution, whose rank is divided among its groups
            ranks, block_rank = A.shape[0], B.shape[1]
            blocks = ranks // block_rank if block_rank else 0
            fits = blocks > 0 and blocks * block_rank == ranks and B.shape[0] % blocks == 0
        else:  # or experts, each of the whole rank
            blocks, block_rank = A.shape[0] // self.method.r, self.method.r
            ranks, fits = (
                block_rank if blocks > 0 and blocks * block_rank == A.shape[0] else A.shape[0],
                B.shape[1] == A.shape[0],
            )
        if ranks != self.method.r:
            raise CheckpointError(f"{a!r} has shape {tuple(A.shape)}; by the config its rank is {self.method.r}")
        if not fits:
            raise CheckpointError(f"{a!r} {tuple(A.shape)} and {b!r} {tuple(B.shape)} are not of one rank")
        # Experts are the slowest index of A's rows, and the fastest of B's columns.
        up = (
            B.reshape(blocks, -1, block_rank)
            if A.ndim > 2
            else B.reshape(B.shape[0], block_rank, blocks).permute(2, 0, 1)
        )
        return LowRank(A.reshape(blocks, block_rank, -1), up, self.method.scale(None), found.get("lora_B.bias"))  # type: ignore[arg-type]

    def with_low_rank(self, change: LowRank, like: Slots) -> dict[str, Tensor]:
        (a, A), (b, B) = self._factor_pair(like)
        blocks, rows, _ = change.shape
        if change.bias is not None and (a != "lora_A.weight" or (A.ndim == 2 and blocks > 1)):
            raise ConfigError(
                f"there is a bias in what the adapters do together (lora_bias=True), and the layer with {a!r} "
                f"{tuple(A.shape)} takes none; combine adapters with a bias apart from those of embeddings and experts"
            )
        if A.ndim > 2:
            up = change.up.reshape(blocks * rows, change.rank, *B.shape[2:])
        else:
            up = change.up.permute(1, 2, 0).reshape(rows, -1)
        out = {a: change.down.reshape(-1, *A.shape[1:]), b: up}
        return out if change.bias is None else {**out, "lora_B.bias": change.bias}

    @staticmethod
    def _factor_pair(found: Slots) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
        names = ("lora_A.weight", "lora_B.weight") if "lora_embedding_A" not in found else LORA_NAMES[2:4]
        if missing := [n for n in names if n not in found]:
            raise CheckpointError(f"there is no {missing[0]!r}, only {sorted(found)}")
        if flat := next((n for n in names if found[n].ndim < 2), None):
            raise CheckpointError(f"{flat!r} has shape {tuple(found[flat].shape)}, and is no matrix")
        a, b = names
        return (a, found[a]), (b, found[b])


class LoraSizes(SizeRule):
    method: Lora

    def minimal(self, op: Op) -> Lora:
        return dataclasses.replace(self.method, r=2 * op.groups)

    def with_sizes_of(self, op: Op, slots: Slots) -> Lora:
        A = next((t for n, t in slots.items() if n.startswith(("lora_A", "lora_embedding_A"))), None)
        return (
            self.method
            if A is None or not A.ndim
            else dataclasses.replace(self.method, r=A.shape[0] // max(op.experts, 1))
        )


class LoraBank(BankForm):
    method: Lora

    def apply(
        self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale, mix: Tensor
    ) -> Tensor | None:
        if op.experts or op.groups > 1:
            return None
        A, B = slots[next(iter(slots))], list(slots.values())[1]
        wide = A.dtype
        mix = cast(mix, wide if wide.itemsize >= 4 else torch.float32) * scale
        down, up = A.flatten(0, 1), B.transpose(0, 1).flatten(1, 2)
        # The weight of each rank: multiplied by ones in the shape of A, so that the graph has neither the number of
        # adapters nor a rank as a constant.
        each = (mix.unsqueeze(-1) * torch.ones_like(A.flatten(2).select(2, 0), dtype=mix.dtype)).flatten(-2)
        if op.is_conv:
            h = op.down(self.method.adapter_input(op, x, wide), down)
            delta = op.up(cast(multiply_or_zero(h, each.movedim(-1, 1).squeeze(-1)), wide), up.flatten(1))
        else:
            down = op.with_max_norm(down) if op.kind == "embedding" else down
            h = op.down(self.method.adapter_input(op, x, wide), down)
            delta = torch.nn.functional.linear(cast(multiply_or_zero(h, each.squeeze(-2)), wide), up)
        if self.method.with_bias:
            biases = mix @ cast(slots["lora_B.bias"], mix.dtype)
            delta = delta + (biases.movedim(-1, 1).squeeze(-1) if op.is_conv else biases.squeeze(-2))
        return cast(y + delta, y.dtype)

    def apply_fused(self, op: Op, x: Tensor, y: Tensor, slots: Slots, scale: Scale, c: Tensor) -> Tensor | None:
        if op.kind not in ("linear", "addmm") or self.method.with_bias:
            return None
        A, B, *_ = slots.values()
        return low_rank_rows(x, y, A, B, scale, c)

    def expert_factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor] | None:
        A, B, *_ = slots.values()
        return by_expert(op, A, B)

    def has_kernel(self, op: Op) -> bool:
        return op.kind in ("linear", "addmm") and op.callable and not self.method.with_bias and not self.method.training

    def apply_kernel(
        self, op: Op, x: Tensor, y: Tensor, slots: Slots, scale: Scale, starts: Tensor, c: Tensor
    ) -> Tensor:
        from adaptc.kernels import grouped_rows

        A, B, *_ = slots.values()
        assert isinstance(scale, Tensor)
        return grouped_rows(x, y, A, B, starts, scale, c)


class LoraKernels(KernelForm):
    method: Lora

    def why_missing(self, op: Op) -> str:
        if op.kind not in ("linear", "addmm") or not op.callable:
            return f"there are no kernels for a consumer of kind {op.kind!r}"
        if self.method.training and self.method.dropout:
            return "its dropout acts between the layer's input and the adapter"
        return "its adapter has a bias" if self.method.with_bias else super().why_missing(op)

    def apply(self, op: Op, x: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        from adaptc.kernels import lora_linear

        A, B, *_ = slots.values()
        return lora_linear(x, W, b, A, B, scale)


class LoraSharing(SharedSlots):
    method: Lora

    def tied_to(self, home: str) -> Method | None:
        return LoraTied(**{f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method)}, home=home)


@dataclass(frozen=True)
class Lora(Method):
    """LoRA at one site. ``dropout`` acts on the input of the down projection, in training only.

    ``repeat``: how often PEFT adds B A. At the ``out_proj`` of a MultiheadAttention it is 2: PEFT's wrapper adds B A,
    and the wrapped layer adds it again. Adapters are trained that way, so it is what their files mean.
    ``loftq_bits`` and ``loftq_iter`` are those of the scheme "loftq". With the scheme "mica", A alone is trained.
    """

    name: ClassVar[str] = "lora"
    slot_family: ClassVar[str] = "lora"
    stacks: ClassVar[bool] = True
    swappable: ClassVar[frozenset[str]] = Method.swappable | {
        "rslora",
        "with_bias",
        "repeat",
        "loftq_bits",
        "loftq_iter",
    }
    files = LoraFiles(names=LORA_NAMES)
    sizes = LoraSizes()
    bank = LoraBank()
    kernels = LoraKernels()
    sharing = LoraSharing()

    r: int = 8
    alpha: float = 8
    rslora: bool = False
    dropout: float = 0.0
    with_bias: bool = False
    scheme: bool | str = True
    training: bool = False
    repeat: int = 1
    loftq_bits: int = 4
    loftq_iter: int = 1

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("LoRA", op)
        r, e = self.r, max(op.experts, 1)
        if r % op.groups:
            raise TargetError(
                f"LoRA on a convolution with groups={op.groups} needs a rank divisible by {op.groups}, got r={r}; "
                f"r={-(-r // op.groups) * op.groups} fits"
            )
        if self.with_bias and (not op.callable or op.kind == "embedding"):
            raise TargetError(f"lora_bias=True has no meaning for a consumer of kind {op.kind!r}, which takes no bias")
        if op.kind == "embedding":
            return {
                "lora_embedding_A": Slot((r, op.in_features), free=(0,)),
                "lora_embedding_B": Slot((op.out_features, r), free=(1,), trainable=self._trains_up()),
            }
        ones = (1,) * len(op.kernel) if op.is_conv else ()
        a = (r * e, op.in_features, *op.kernel) if op.is_conv or op.experts else (r, prod(op.shape[1:]))
        slots = {
            "lora_A.weight": Slot(a, free=(0,)),
            "lora_B.weight": Slot((op.out_features, r * e // op.groups, *ones), free=(1,), trainable=self._trains_up()),
        }
        if self.with_bias:
            slots["lora_B.bias"] = Slot((op.out_features,))
        return slots

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        slots = Lora.slots(self, op)
        (a, a_slot), (b, b_slot), *rest = slots.items()
        kind = op.kind if op.is_conv or op.kind == "embedding" else "linear"
        A, B, base = init_lora(
            self.scheme,
            W,
            self.r,
            self.scale(op),
            kind=kind,
            a_shape=a_slot.shape,
            b_shape=b_slot.shape,
            dtype=dtype,
            generator=generator,
            loftq=LoftQConfig(self.loftq_bits, self.loftq_iter),
        )
        values = {a: A, b: B}
        for name, slot in rest:
            bound = 0.0 if self.scheme is True else 1 / sqrt(self.r)
            values[name] = torch.empty(slot.shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
        return self.with_other_slots(op, W, InitialValues(values, base))

    def with_other_slots(self, op: Op, W: Tensor, first: InitialValues) -> InitialValues:
        """Return the first values of A and B, ``first``, with those of the slots that a variant has beside them."""
        return first

    def data_scheme(self) -> str | None:
        """Return the scheme whose first values are made of data; None for a scheme that takes none."""
        scheme = self.scheme.lower() if isinstance(self.scheme, str) else ""
        return scheme if scheme in DATA_SCHEMES else None

    def init_from(self, op: Op, W: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> InitialValues:
        """Return the first values with these A (r, in) and B (out, r), which were made of data.

        The weight loses their product where the scheme says so.
        """
        A, B = (t.to(device=W.device, dtype=dtype).contiguous() for t in (A, B))
        base = rest_of_weight(W, A, B, self.scale(op)) if self.changes_base_at_init() else None
        slots = dict(zip(Lora.slots(self, op), (A, B), strict=True))
        return self.with_other_slots(op, W, InitialValues(slots, base))

    def rebind(self, config: Any, place: SiteDescription) -> Method:
        new = super().rebind(config, place)
        return dataclasses.replace(new, repeat=self.repeat) if isinstance(new, Lora) else new

    def _trains_up(self) -> bool:
        return not (isinstance(self.scheme, str) and self.scheme.lower() == "mica")

    def changes_base_at_init(self) -> bool:
        return isinstance(self.scheme, str) and self.scheme.lower().startswith(
            ("pissa", "olora", "loftq", "corda", "lora_ga")
        )

    def base_needs_data(self) -> bool:
        return self.changes_base_at_init() and self.data_scheme() is not None

    def base_scheme(self) -> Any:
        is_loftq = isinstance(self.scheme, str) and self.scheme.lower() == "loftq"
        return LOFTQ_SCHEMES[self.loftq_bits] if is_loftq else None

    def inside_multihead_attention(self) -> Lora:
        if self.with_bias:
            raise TargetError("lora_bias=True has no meaning in MultiheadAttention, whose weights alone are adapted")
        return dataclasses.replace(self, repeat=2)

    def scale(self, op: Op) -> float:
        return self.repeat * self.alpha / (sqrt(self.r) if self.rslora else self.r)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        A, B = self.weight_factors(op, slots)
        return cast(op.add_low_rank(W, A, B, scale), W.dtype)

    def has_bias(self) -> bool:
        return self.with_bias

    def bias(self, op: Op, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor | None:
        if not self.with_bias:
            return b
        delta = slots["lora_B.bias"] * scale
        return delta if b is None else b + delta

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        A, B = self._factors(op, slots)
        delta = op.down_up(self.adapter_input(op, x, A.dtype), A, B)
        if self.with_bias:
            delta = delta + op.along_out(slots["lora_B.bias"], delta)
        return cast(y + delta * scale, y.dtype)

    def adapter_input(self, op: Op, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what A multiplies: the layer's input in ``dtype``, with dropout in training."""
        return prepare_adapter_input(self, op, x, dtype)

    def weight_factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        """Return A and B as the weight adds them, which reads the layer's input as it is."""
        return self._factors(op, slots)

    def _factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        A, B, *_ = slots.values()
        A, B = by_expert(op, A, B)
        return op.with_max_norm(A) if op.kind == "embedding" else A, B

    def constrained(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        # PEFT looks rows of A up with the embedding's max_norm, which shortens them in place.
        bound = {"lora_embedding_A"} if op.max_norm and op.kind == "embedding" else ()
        return {n: op.with_max_norm(slots[n]) for n in bound}


def by_expert(op: Op, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors in LoRA's layout with the experts of ``op`` as an axis of their own; unchanged where it has none.

    The factors may have further axes in front, such as that of adapters.
    """
    if not op.experts:
        return A, B
    down = A.reshape(*A.shape[:-2], op.experts, -1, A.shape[-1])
    return down, B.reshape(*B.shape[:-1], -1, op.experts).permute(*range(B.ndim - 2), -1, -3, -2)


class LoraTiedFiles(LoraFiles):
    method: LoraTied

    def keys(self, op: Op) -> list[str]:
        return ["lora_A.weight", "lora_B.weight"]

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {"lora_embedding_A": "lora_B.weight", "lora_embedding_B": "lora_A.weight"}
        return {n: found[k].mT.contiguous() for n, k in names.items() if k in found and found[k].ndim == 2}

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        names = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
        return {k: slots[n].mT.contiguous() for k, n in names.items()}

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        return super().fqn(self.method.home, slot, adapter)


class LoraTiedKernels(KernelForm):
    method: LoraTied

    def why_missing(self, op: Op) -> str:
        return "there are no kernels for a layer that changes with an embedding"


class LoraTiedSharing(SharedSlots):
    method: LoraTied

    def tied_to(self, home: str) -> Method | None:
        return dataclasses.replace(self.method, home=home)


@dataclass(frozen=True)
class LoraTied(Lora):
    """LoRA at a linear layer that is tied to the embedding ``home`` and changes with it.

    A is the transpose of the embedding's B, and B that of its A. Files have both once more, as for any linear layer.
    """

    name: ClassVar[str] = "lora_tied"
    files = LoraTiedFiles(names=LORA_NAMES)
    bank = BankForm()
    kernels = LoraTiedKernels()
    sharing = LoraTiedSharing()

    home: str = ""

    def slots(self, op: Op) -> dict[str, Slot]:
        return {
            "lora_embedding_A": Slot((self.r, op.out_features), free=(0,)),
            "lora_embedding_B": Slot((op.in_features, self.r), free=(1,)),
        }

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        plain = Lora(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Lora)})
        first = plain.init(op, W, dtype, generator)
        return InitialValues(self.files.read(op, first.slots), first.base)

    def rebind(self, config: Any, place: SiteDescription) -> Method:
        new = super().rebind(config, place)
        tied = type(new) is Lora and config.ensure_weight_tying
        return new.sharing.tied_to(self.home) if tied else new  # type: ignore[return-value]

    def _factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        return slots["lora_embedding_B"].mT, slots["lora_embedding_A"].mT
