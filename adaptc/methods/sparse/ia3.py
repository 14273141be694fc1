"""IA3: one learned factor per output of a layer or, at feed-forward layers, per input (Liu et al., arXiv 2205.05638).

    W' = diag(l) W,  b' = l b        feed-forward:  W' = W diag(l),  b' = b

Slot ``ia3_l``, in PEFT's shapes: (out, 1), feed-forward (1, in); for convolutions (1, channels, 1...), with the
channels of all groups. At an embedding there is one factor per column of the vectors or, feed-forward, one per token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError, nearest
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.option_checks import check_matrix
from adaptc.methods._shared.union_configs import exact_names_regex
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.patterns import compile_pattern

SLOT = "ia3_l"


@dataclass
class IA3Config(TargetedConfig):
    """PEFT's ``IA3Config``: same names, same defaults.

    Attributes:
        feedforward_modules: the targets whose inputs are scaled, as endings of module names or an expression for whole
            names; [] for none.
        init_ia3_weights: whether the factors start at one.

    Example:
        >>> config = adaptc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    """

    peft_type: ClassVar[str] = "IA3"
    samples: ClassVar[Sequence[Mapping[str, Any]]] = ({"feedforward_modules": []},)

    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        targets, inner = self.target_modules, self.feedforward_modules
        if isinstance(inner, str):
            compile_pattern("IA3Config.feedforward_modules", inner)
        elif inner is not None and isinstance(targets, (list, set, frozenset)):
            strange = sorted(set(inner) - set(targets))
            if strange:
                raise ConfigError(
                    f"IA3Config.feedforward_modules must be entries of target_modules={sorted(targets)}; {strange} are "
                    f"not (nearest: {nearest(strange[0], targets) or 'none'}). Add them there, or leave them out here."
                )

    def with_model_defaults(self, facts: ModelFacts) -> IA3Config:
        new = super().with_model_defaults(facts)
        inner, targets = new.feedforward_modules, new.target_modules
        if inner is None or isinstance(inner, str):
            return new
        if self.feedforward_modules is None and not isinstance(targets, (str, NoneType)) and set(inner) - set(targets):
            # The model's default names need not be among the user's targets. As a list, they would be refused when the
            # config is read from its file; as an expression they are not.
            return new.replace(feedforward_modules=f".*({'|'.join(map(re.escape, inner))})")
        return new

    def name_endings(self) -> dict[str, Collection[str]]:
        inner = self.feedforward_modules
        return {} if inner is None or isinstance(inner, str) else {"feedforward_modules": inner}

    def with_all_targets(self, configs: Sequence[Any], names: Sequence[Sequence[str]]) -> IA3Config:
        new = super().with_all_targets(configs, names)
        pairs = [(c.method(n, "linear").feedforward, n) for c, own in zip(configs, names, strict=True) for n in own]
        inner = [c.feedforward_modules for c in configs]
        if all(i == inner[0] for i in inner):
            return new
        if not any(i is None or isinstance(i, str) for i in inner):
            new.feedforward_modules = sorted({e for i in inner for e in i})
            if isinstance(new.target_modules, list) and all(
                new.method(n, "linear").feedforward is own for own, n in pairs
            ):
                return new
        new.feedforward_modules = exact_names_regex([n for own, n in pairs if own]) or []
        return new

    def method(self, name: str, kind: str) -> IA3:
        feedforward_modules = self.feedforward_modules
        if feedforward_modules is None:
            raise ConfigError(
                "IA3Config.feedforward_modules is None, and there is no default for this model: name the targets whose "
                "inputs are to be scaled (the second layers of feed-forward blocks), or say [] for none"
            )
        if isinstance(feedforward_modules, str):
            feedforward = (
                compile_pattern("IA3Config.feedforward_modules", feedforward_modules).fullmatch(name) is not None
            )
        else:
            feedforward = name.endswith(tuple(feedforward_modules))
        return IA3(feedforward, self.init_ia3_weights)


@dataclass(frozen=True)
class IA3(Method):
    """IA3 at one site. ``feedforward``: scales its inputs. ``scheme`` False: first values are normal random numbers."""

    name: ClassVar[str] = "ia3"
    files = FileFormat(names=(SLOT,), summed=SLOT)

    feedforward: bool = False
    scheme: bool = True

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("IA3", op)
        n = op.in_features if self.feedforward else op.out_features
        if op.kernel:
            return {SLOT: Slot((1, n, *(1 for _ in op.kernel)), fill=1.0)}
        return {SLOT: Slot((1, n) if self.feedforward else (n, 1), fill=1.0)}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        source = torch.device("cpu") if generator is None else generator.device
        # PEFT draws even where ones follow, so that later layers see the same generator.
        drawn = torch.randn(self.slots(op)[SLOT].shape, generator=generator, device=source)
        value = torch.ones_like(drawn) if self.scheme else drawn
        return InitialValues({SLOT: value.to(W.device, dtype)})

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        factors = slots[SLOT].reshape(-1)
        ones = [1] * len(op.kernel)
        if not self.feedforward:
            return cast(W * factors.reshape(-1, 1, *ones), W.dtype)
        # Each group of outputs has input channels of its own.
        factors = factors.reshape(op.groups, -1).repeat_interleave(W.shape[0] // op.groups, 0)
        return cast(W * factors.reshape(*factors.shape, *ones), W.dtype)

    def bias(self, op: Op, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor | None:
        if b is None or self.feedforward:
            return b
        return cast(b * slots[SLOT].reshape(-1), b.dtype)

    def has_input(self, op: Op) -> bool:
        return op.callable and self.feedforward and op.kind != "embedding"

    def input(self, op: Op, x: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return cast(x * op.along_in(slots[SLOT].reshape(-1), x), x.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and not self.has_input(op)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        if self.feedforward:  # an embedding: the factor of each token
            factors = op(x, slots[SLOT])
        else:
            factors = op.along_out(slots[SLOT].reshape(-1), y)
        return cast(y * factors, y.dtype)
