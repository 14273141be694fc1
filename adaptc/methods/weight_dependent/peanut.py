"""PEANuT: W' = W + s B net(A W), where a small network of the weight makes the change (Zhong et al., arXiv 2410.01870).

With ``depth=0``, net(h) = f(h), where f is ``act_fn``. Otherwise f(h) goes through ``depth`` encoders h <- f(E_i h),
then through as many decoders h <- f(D_i h) + g. There g is what the encoder of the same level was given: the first
decoder takes that of the last encoder. Where other adapters changed W before, the network still reads the model's own
weight, as in PEFT: changes add up.

Slots, in PEFT's shapes: ``peanut_A.weight`` (r, out), ``peanut_B.weight`` (out, r), and (r, r) for each of
``peanut_encoders.i.weight`` and ``peanut_decoders.i.weight``. Beyond PEFT's linear layers, W is the weight as a matrix,
kernels in its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import ConfigError, nearest
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_integers, check_matrix
from adaptc.methods.lycoris.lycoris_config import detach_padding_row, fill_kaiming_uniform, supports_row_lookup
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.size_rule import SizeRule

A, B = "peanut_A.weight", "peanut_B.weight"
ENCODER, DECODER = "peanut_encoders.{}.weight", "peanut_decoders.{}.weight"
#: the largest depth: each level is two tensors at every site
MAX_DEPTH = 1000


@dataclass
class PeanutConfig(TargetedConfig):
    """PEFT's ``PeanutConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        r: the width of the network.
        depth: the number of encoders, and of decoders.
        act_fn: the activation, by its name in transformers' ``ACT2FN``. One with parameters of its own is refused,
            because files do not hold them.
        scaling: the factor on the change.

    Example:
        >>> config = adaptc.PeanutConfig(r=16, depth=1, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "PEANUT"

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r})
        check_integers(self, {"depth": self.depth}, minimum=0)
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"PeanutConfig.depth must be at most {MAX_DEPTH}, got {self.depth!r}")
        activation(self.act_fn)

    def method(self, name: str, kind: str) -> Peanut:
        return Peanut(self.r, self.depth, self.act_fn, self.scaling, self.init_weights)


@cache
def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation that transformers has under this name.

    Raises ConfigError where there is none, or where it has parameters.
    """
    from transformers.activations import ACT2FN

    names = sorted(ACT2FN)
    if name not in names:
        close = nearest(name, names, 1)
        hint = f" (nearest: {close[0]!r})" if close else ""
        raise ConfigError(f"PeanutConfig.act_fn must be one of {', '.join(names)}, got {name!r}{hint}")
    found: Any = ACT2FN[name]
    if any(True for _ in found.parameters()):
        raise ConfigError(
            f"PeanutConfig.act_fn={name!r} is not supported: it has parameters of its own, which PEFT makes anew in "
            "each call and no file holds. Choose an activation without parameters, such as 'leaky_relu' or 'silu'"
        )
    return found


@dataclass(frozen=True)
class Peanut(Method):
    """PEANuT at one site. ``activation``: the name of f. ``scaling``: s, which does not follow from the rank."""

    name: ClassVar[str] = "peanut"
    takes_complex: ClassVar[bool] = False
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"scaling"}
    sizes = SizeRule(rank_axes={A: 0})

    r: int = 32
    depth: int = 0
    activation: str = "relu"
    scaling: float = 1.0
    scheme: bool = True

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("PEANuT", op)
        rows, r = op.matrix_shape[0], self.r
        inner = [t.format(i) for t in (ENCODER, DECODER) for i in range(self.depth)]
        return {
            A: Slot((r, rows), free=(0,)),
            B: Slot((rows, r), free=(1,)),
            **{n: Slot((r, r), free=(0, 1)) for n in inner},
        }

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        source = torch.device("cpu") if generator is None else generator.device
        specs = self.slots(op)
        values = {n: torch.empty(s.shape, device=source) for n, s in specs.items()}
        order = [n for n in specs if n != B] + [B]
        # PEFT's layers draw values of their own first, which it overwrites: the second ones count.
        for drawn in (order, order if not self.scheme else order[:-1]):
            for name in drawn:
                fill_kaiming_uniform(values[name], generator)
        if self.scheme:
            values[B].zero_()
        return InitialValues({n: t.to(W.device, dtype) for n, t in values.items()})

    def scale(self, op: Op) -> float:
        return self.scaling

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return self.weight_over(op, W, W, slots, scale)

    def weight_over(self, op: Op, base: Tensor, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        change = slots[B] @ self._down(op, base, slots)
        return cast(W + op.unmatrix(change * scale), W.dtype)

    def has_apply(self, op: Op) -> bool:
        return supports_row_lookup(op) if op.kind == "embedding" else op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        up = slots[B]
        if op.kind == "embedding":
            # Each token's column goes through the network alone, so only those of the input do.
            hidden = self._network(F.linear(cast(op(x, W), up.dtype), slots[A]), slots)
            return cast(y + detach_padding_row(op, x, F.linear(hidden, up) * scale), y.dtype)
        delta = op.low_rank(op.cast_input(x, up.dtype), self._down(op, W, slots), up)
        return cast(y + delta * scale, y.dtype)

    def _down(self, op: Op, base: Tensor, slots: Slots) -> Tensor:
        """Return net(A W), (r, columns), in the adapter's dtype."""
        columns = cast(op.matrix(base), slots[A].dtype).t()
        return self._network(F.linear(columns, slots[A]), slots).t()

    def _network(self, h: Tensor, slots: Slots) -> Tensor:
        """Return net(h) for columns (..., r)."""
        f = activation(self.activation)
        h, given = f(h), list[Tensor]()
        for i in range(self.depth):
            given.append(h)
            h = f(F.linear(h, slots[ENCODER.format(i)]))
        for i in range(self.depth):
            h = f(F.linear(h, slots[DECODER.format(i)])) + given.pop()
        return h
