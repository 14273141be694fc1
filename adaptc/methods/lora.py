"""LoRA: W' = W + s B A, s = alpha / r or alpha / sqrt(r) (Hu et al., arXiv 2106.09685; Kalajdzievski, 2312.03732).

Slots, in PEFT's shapes: ``lora_A.weight`` (r, in[, *kernel]) and ``lora_B.weight`` (out, r/groups[, 1...]); embeddings
``lora_embedding_A`` (r, vocab) and ``lora_embedding_B`` (width, r); stacked experts (r*E, in), expert-major, and
(out, r*E), rank-major; ``lora_B.bias`` (out,) with ``lora_bias``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import ConfigError, TargetError
from adaptc.methods._base import TargetedConfig
from adaptc.passes._kinds import Op, cast
from adaptc.passes._method import Attachment, Initial, Method, Scale, Slot, Slots
from adaptc.rules import pattern_value

NOT_YET = "this LoRA variant is not implemented"

#: fields that each ask for another computation than LoRA's
VARIANTS = (
    "use_dora",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
)


@dataclass
class LoraConfig(TargetedConfig):
    """PEFT's ``LoraConfig``: same names, same defaults. Unsupported fields raise ConfigError when set."""

    peft_type: ClassVar[str] = "LORA"
    samples: ClassVar[Sequence[Mapping[str, Any]]] = ({}, {"use_dora": True})
    dropout_field: ClassVar[str] = "lora_dropout"
    refused: ClassVar[Mapping[str, str]] = {
        "loftq_config": "LoftQ quantises the base, and programs hold unquantised weights",
        "eva_config": "initialisation from activations is not implemented",
        "corda_config": "initialisation from activations is not implemented",
        "lora_ga_config": "initialisation from gradients is not implemented",
        "megatron_config": "programs are captured from plain modules, not from Megatron's parallel layers",
        "velora_config": NOT_YET,
        "alora_invocation_tokens": NOT_YET,
        "use_qalora": "it needs GPTQ layers, which torch.export does not capture",
        "monteclora_config": NOT_YET,
        "use_bdlora": NOT_YET,
        "arrow_config": NOT_YET,
        "kasa_config": NOT_YET,
        "ensure_weight_tying": "adapters of tied layers stay separate, so that one cannot change the other",
        "runtime_config": "there is no ephemeral offload: frozen weights stay where the program has them",
    }

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: dict[str, Any] | None = None
    lora_bias: bool = False
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, r in ranks.items():
            if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
                raise ConfigError(f"LoraConfig.{name} must be a positive integer, got {r!r}")
        self._check_common()
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError(f"lora_bias=True needs init_lora_weights True or False, got {self.init_lora_weights!r}")
        if self.lora_bias and self.use_dora:
            raise ConfigError(
                "lora_bias=True has no meaning for DoRA, which scales weights alone; unset one of the two"
            )
        variants = [name for name in VARIANTS if getattr(self, name)]
        if len(variants) > 1:
            raise ConfigError(f"{' and '.join(variants)} are variants of LoRA that do not combine; keep one of them")

    def _check_common(self) -> None:
        me = type(self).__name__
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"{me}.lora_dropout must lie in [0, 1), got {self.lora_dropout!r}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"{me}.bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    def method(self, name: str, kind: str) -> Lora:
        return self._variant()(
            r=pattern_value(self.rank_pattern, name, self.r),
            alpha=pattern_value(self.alpha_pattern, name, self.lora_alpha),
            rslora=self.use_rslora,
            dropout=self.lora_dropout,
            with_bias=self.lora_bias,
            scheme=self.init_lora_weights,
        )

    def _variant(self) -> type[Lora]:
        if self.use_dora:
            from adaptc.methods.dora import Dora

            return Dora
        return Lora


@dataclass(frozen=True)
class Lora(Method):
    """LoRA at one site. ``dropout`` acts on the input of the down projection, while training only.

    ``repeat`` is how often PEFT adds B A: twice at the ``out_proj`` of a MultiheadAttention, whose wrapper adds it and
    then has the inner layer add it again. Adapters are trained that way, so it is what their files mean.
    """

    name: ClassVar[str] = "lora"
    kin: ClassVar[str] = "lora"
    stacks: ClassVar[bool] = True
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"rslora", "with_bias", "repeat"}

    r: int = 8
    alpha: float = 8
    rslora: bool = False
    dropout: float = 0.0
    with_bias: bool = False
    scheme: bool | str = True
    training: bool = False
    repeat: int = 1

    def slots(self, op: Op) -> dict[str, Slot]:
        if len(op.shape) < 2:
            raise TargetError(f"LoRA needs a weight with two axes or more, and this one has shape {op.shape}")
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
                "lora_embedding_B": Slot((op.out_features, r), free=(1,)),
            }
        ones = (1,) * len(op.kernel) if op.is_conv else ()
        a = (r * e, op.in_features, *op.kernel) if op.is_conv or op.experts else (r, prod(op.shape[1:]))
        slots = {
            "lora_A.weight": Slot(a, free=(0,)),
            "lora_B.weight": Slot((op.out_features, r * e // op.groups, *ones), free=(1,)),
        }
        if self.with_bias:
            slots["lora_B.bias"] = Slot((op.out_features,))
        return slots

    def minimal(self, op: Op) -> Lora:
        return dataclasses.replace(self, r=2 * op.groups)

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Initial:
        from adaptc.methods._lora_init import init_lora

        slots = self.slots(op)
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
        )
        values = {a: A, b: B}
        for name, slot in rest:
            bound = 0.0 if self.scheme is True else 1 / sqrt(self.r)
            values[name] = torch.empty(slot.shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
        return Initial(values, base)

    def rebind(self, config: Any, attachment: Attachment) -> Method:
        new = super().rebind(config, attachment)
        return dataclasses.replace(new, repeat=self.repeat) if isinstance(new, Lora) else new

    def nested(self) -> Lora:
        if self.with_bias:
            raise TargetError("lora_bias=True has no meaning in MultiheadAttention, whose weights alone are adapted")
        return dataclasses.replace(self, repeat=2)

    def fit(self, op: Op, slots: Slots) -> Lora:
        A = next((t for n, t in slots.items() if n.startswith(("lora_A", "lora_embedding_A"))), None)
        return self if A is None or not A.ndim else dataclasses.replace(self, r=A.shape[0] // max(op.experts, 1))

    def scale(self, op: Op) -> float:
        return self.repeat * self.alpha / (sqrt(self.r) if self.rslora else self.r)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        A, B = self._factors(op, slots)
        return cast(op.plus(W, A, B, scale), W.dtype)

    def has_bias(self) -> bool:
        return self.with_bias

    def bias(self, op: Op, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor | None:
        if not self.with_bias:
            return b
        delta = slots["lora_B.bias"] * scale
        return delta if b is None else b + delta

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        A, B = self._factors(op, slots)
        x = op.as_input(x, A.dtype)
        if self.training and self.dropout and op.kind != "embedding":
            x = F.dropout(x, self.dropout, training=True)
        delta = op.down_up(x, A, B)
        if self.with_bias:
            delta = delta + op.along_out(slots["lora_B.bias"], delta)
        return cast(y + delta * scale, y.dtype)

    def unfused(self, op: Op) -> str:
        if op.kind not in ("linear", "addmm") or not op.callable:
            return f"there are no kernels for a consumer of kind {op.kind!r}"
        if self.training and self.dropout:
            return "its dropout acts between the layer's input and the adapter"
        return "its adapter has a bias" if self.with_bias else super().unfused(op)

    def fused(self, op: Op, x: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        from adaptc.kernels.lora_linear import lora_linear

        A, B = slots.values()
        return lora_linear(x, W, b, A, B, scale)

    def _factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        A, B, *_ = slots.values()
        if op.experts:
            A = A.reshape(op.experts, -1, A.shape[-1])
            B = B.reshape(B.shape[0], -1, op.experts).permute(2, 0, 1)
        return A, B
