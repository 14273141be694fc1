"""VeLoRA: LoRA whose gradient of A is made of compressed activations (Miles et al., arXiv 2405.17991).

The features of the input x are divided into ``num_groups`` groups of n, filled up with zeros. A group g is kept for the
backward as one number, c_g = x_g . v, where v (n,) has length one. The gradient of A is that of the input whose groups
are scale * c_g * v. All outputs, and the gradients of B and of x, are LoRA's, and so are inference and merged weights.

Slots: LoRA's, and ``lora_velora_embed`` (n,), which is v. With ``init_type`` "batch_average" v is the mean of all
groups of a batch, with "batch_average_once" that of the first batch, with "random" a drawn vector. Training writes v
into the slot, and files hold it. After a file was read PEFT takes the next batch for the first one; here training goes
on with the v of the file.

Sites are matrices that multiply features: linear layers, as in PEFT. In the evaluation mode of a module A has its exact
gradient, as in PEFT. A program that trains has the op ``adaptc::compressed_linear``, also where it was saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.methods._shared.option_checks import OptionGroup, is_in_training, refuse_unless_positive
from adaptc.methods.lora_family.lora import LORA_NAMES, LoraFiles
from adaptc.methods.lora_family.variants.training_variant import LoraTrainingVariant
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import Slot, Slots
from adaptc.passes.train.compressed_linear import compressed_linear, group_features

EMBED = "lora_velora_embed"
INIT_TYPES = ("batch_average", "batch_average_once", "random")


@dataclass
class VeloraConfig(OptionGroup):
    """PEFT's ``VeloraConfig``: same names, same defaults, for ``LoraConfig(velora_config=...)``.

    Raises ConfigError for values without a meaning.

    Attributes:
        num_groups: the number of groups of features, of which the backward keeps one number each. More groups make the
            gradient more exact, and need more memory.
        scale: the factor of the activations that the backward makes of these numbers.
        init_type: where the direction comes from that groups are projected on: from each batch ("batch_average"), from
            the first batch ("batch_average_once"), or drawn ("random").

    Example:
        >>> velora = adaptc.VeloraConfig(num_groups=32, init_type="batch_average_once")
        >>> config = adaptc.LoraConfig(velora_config=velora, target_modules=["q_proj", "v_proj"])
    """

    option: ClassVar[str] = "velora_config"

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_positive(self, "num_groups", "scale")
        if self.init_type not in INIT_TYPES:
            raise ConfigError(
                f"VeloraConfig.init_type must be one of {', '.join(map(repr, INIT_TYPES))}, got {self.init_type!r}"
            )


@dataclass(frozen=True)
class Velora(LoraTrainingVariant):
    """VeLoRA at one site. The fields are those of the config; ``gradient_scale`` is its ``scale``."""

    name: ClassVar[str] = "velora"
    title: ClassVar[str] = "VeLoRA"
    option: ClassVar[str] = "velora_config"
    training_options: ClassVar[frozenset[str]] = frozenset({"num_groups", "gradient_scale", "init_type"})
    files = LoraFiles(names=(*LORA_NAMES, EMBED))

    num_groups: int = 64
    gradient_scale: float = 1.0
    init_type: str = "batch_average"

    def training_slots(self, op: Op) -> dict[str, Slot]:
        size = -(-op.shape[-1] // self.num_groups)
        return {EMBED: Slot((size,), free=(0,), trainable=False, apart=("group",), fills_up=True)}

    def first_training_values(
        self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        (shape,) = (s.shape for s in self.training_slots(op).values())
        if self.init_type != "random":
            return {EMBED: torch.zeros(shape, dtype=dtype, device=W.device)}
        device = torch.device("cpu") if generator is None else generator.device
        # In the dtype of the weight, as in PEFT: another dtype draws other numbers.
        drawn = torch.randn(shape, dtype=W.dtype, device=device, generator=generator)
        return {EMBED: unit_vector(drawn).to(W.dtype).to(W.device, dtype)}

    def trains_at_layer(self) -> bool:
        return self.training

    def trained_delta(self, op: Op, x: Tensor, slots: Slots) -> Tensor:
        A, B = self._factors(op, slots)
        v = self._direction(x.detach(), slots[EMBED])
        return op.up(compressed_linear(x, A, v, self.gradient_scale, True), B)

    def _direction(self, x: Tensor, embed: Tensor) -> Tensor:
        """Return the vector that groups are projected on, and write it into the slot ``embed`` in training."""
        if self.init_type == "random":
            return embed
        size = embed.shape[0]
        v = cast(unit_vector(group_features(x, size).reshape(-1, size).mean(0)), embed.dtype)
        if self.init_type == "batch_average_once":
            v = torch.where((embed == 0).all(), v, embed)
        embed.copy_(torch.where(is_in_training(embed), v, embed))
        return v


def unit_vector(t: Tensor) -> Tensor:
    """Return ``t`` (n,) with length one, in float32 as in PEFT; equal elements where it is zero or has no length."""
    t = t.float()
    length = torch.linalg.vector_norm(t)
    ones = torch.ones_like(t)
    return torch.where(length > 0, t / length, ones / torch.linalg.vector_norm(ones))
