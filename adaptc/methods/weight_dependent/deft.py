"""DEFT: a few directions of the outputs are removed from the weight and written anew (Kumar et al., arXiv 2509.22793).

    W' = W - Q V^T W + s Q R        s = alpha / r, or 1 without alpha
    decomposition_method="relu": Q = P, V = relu(P)         "qr": Q = V, the orthonormal factor of P = Q T
    para=True: W' = W - Q V^T W

W is the weight as a matrix: kernels in its columns, embeddings (width, vocabulary). Where other adapters changed the
weight before, V^T W is that of the base weight, as in PEFT. The rank is at most the number of outputs.

Slots: ``deft_P`` (out, r) and, without ``para``, ``deft_R`` (r, in). Slot ``injection_scale`` (1,), which is in no
file, holds s: it is the factor of a part of the change, so no factor on the whole takes its place. A column of P that
is zero has no direction and does nothing. PEFT's "qr" removes a direction for it that depends on rounding.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import (
    applies_dropout,
    check_integers,
    check_matrix,
    check_probability,
    prepare_adapter_input,
)
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.size_rule import SizeRule

P, R, INJECTION = "deft_P", "deft_R", "injection_scale"
DECOMPOSITIONS = ("relu", "qr")


@dataclass
class DeftConfig(TargetedConfig):
    """PEFT's ``DeftConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        r: the number of directions; a layer with fewer outputs has one for each output.
        decomposition_method: how directions follow from P, "relu" or "qr".
        init_scale: the standard deviation of the first R over 0.02, where ``init_weights`` is False.
        alpha: r times the factor on the new content; None for a factor of 1.
        para: whether directions are removed and nothing takes their place. Such an adapter changes the layer from the
            start.
        deft_dropout: the dropout probability of the input that R reads.

    Example:
        >>> config = adaptc.DeftConfig(r=8, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "DEFT"
    dropout_field: ClassVar[str] = "deft_dropout"

    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: int | float | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r})
        check_probability(self, "deft_dropout")
        if self.decomposition_method not in DECOMPOSITIONS:
            raise ConfigError(
                f"DeftConfig.decomposition_method must be 'relu' or 'qr', got {self.decomposition_method!r}"
            )
        if self.init_scale < 0:
            raise ConfigError(f"DeftConfig.init_scale must be at least 0, got {self.init_scale!r}")

    def method(self, name: str, kind: str) -> Deft:
        return Deft(
            self.r,
            self.decomposition_method,
            self.alpha or None,  # PEFT takes 0 for None
            self.para,
            self.deft_dropout,
            scheme=self.init_weights,
            init_scale=self.init_scale,
        )


class DeftFiles(FileFormat):
    method: Deft

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return self.method.injection_scale(op, W, dtype)


class DeftSizes(SizeRule):
    method: Deft

    def with_rank(self, op: Op, rank: int) -> Deft:
        return dataclasses.replace(self.method, r=rank)

    def minimal(self, op: Op) -> Deft:
        return dataclasses.replace(self.method, r=2)


@dataclass(frozen=True)
class Deft(Method):
    """DEFT at one site. ``scheme`` False: R is random at first, too.

    ``dropout`` acts on the input of R, in training only; what is removed reads the layer's whole input.
    """

    name: ClassVar[str] = "deft"
    takes_complex: ClassVar[bool] = False  # relu has no meaning for complex numbers
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"init_scale"}
    files = DeftFiles(names=(P, R))
    sizes = DeftSizes(rank_axes={P: 1})

    r: int = 8
    decomposition: str = "relu"
    alpha: float | None = None
    para: bool = False
    dropout: float = 0.0
    scheme: bool = True
    init_scale: float = 1.0
    training: bool = False

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("DEFT", op)
        rows, columns = op.matrix_shape
        r = self._rank(op)
        slots = {P: Slot((rows, r), free=(1,))}
        if not self.para:
            slots[R] = Slot((r, columns), free=(0,))
            slots[INJECTION] = Slot((1,), fill=1.0, trainable=False, saved=False)
        return slots

    def _rank(self, op: Op) -> int:
        return min(self.r, op.matrix_shape[0])

    def injection_scale(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the unsaved slot, the factor on the new content; none with ``para``."""
        if self.para:
            return {}
        factor = 1.0 if self.alpha is None else self.alpha / self._rank(op)
        return {INJECTION: torch.full((1,), factor, dtype=dtype, device=W.device)}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        source = torch.device("cpu") if generator is None else generator.device
        (rows, columns), r = op.matrix_shape, self._rank(op)
        p = torch.empty(rows, r, device=source).normal_(0, 0.02, generator=generator).to(W.device)
        values = {P: p.to(dtype), **self.injection_scale(op, W, dtype)}
        if self.para:
            return InitialValues(values)
        if self.scheme:
            factor = 1.0 if self.alpha is None else self.alpha / r
            content = self._removed(op, W, self._directions(values[P])[1]) / factor
        else:
            content = torch.empty(r, columns, device=source).normal_(0, 0.02 * self.init_scale, generator=generator)
        return InitialValues({P: values[P], R: content.to(W.device, dtype), INJECTION: values[INJECTION]})

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return self.weight_over(op, W, W, slots, scale)

    def weight_over(self, op: Op, base: Tensor, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        q, v = self._directions(slots[P])
        return cast(W + op.unmatrix(q @ self._rewritten(op, base, v, slots)), W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        q, v = self._directions(slots[P])
        if self.para or not applies_dropout(self, op):
            delta = op.low_rank(op.cast_input(x, q.dtype), self._rewritten(op, W, v, slots), q)
            return cast(y + delta, y.dtype)
        delta = op.low_rank(cast(x, q.dtype), -self._removed(op, W, v), q)
        read = prepare_adapter_input(self, op, x, q.dtype)
        return cast(y + delta + op.low_rank(read, self._injected(slots), q), y.dtype)

    def _directions(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q and V (out, r), in float32 or wider."""
        p = cast(p, torch.promote_types(p.dtype, torch.float32))
        if self.decomposition == "relu":
            return p, torch.relu(p)
        # Columns of zeros pad a smaller rank. They go behind the others, which then are orthogonal to each other alone,
        # and unit vectors take their place, since qr has no gradient at zeros.
        used = (p != 0).any(0)
        order = torch.argsort(used, descending=True, stable=True)
        ones = torch.ones_like(p)
        units = cast(ones.cumsum(0) == ones.cumsum(1), p.dtype)  # no size may be a constant of the graph
        q = torch.linalg.qr(torch.where(used[order], p[:, order], units))[0]
        q = torch.where(used, q[:, torch.argsort(order)], 0.0)
        return q, q

    def _removed(self, op: Op, W: Tensor, v: Tensor) -> Tensor:
        """Return V^T W (r, in), in the wider dtype of the two."""
        wide = torch.promote_types(W.dtype, v.dtype)
        return cast(v, wide).t() @ cast(op.matrix(W), wide)

    def _injected(self, slots: Slots) -> Tensor:
        """Return s R (r, in), in float32 or wider."""
        content = slots[R] * slots[INJECTION]
        return cast(content, torch.promote_types(content.dtype, torch.float32))

    def _rewritten(self, op: Op, W: Tensor, v: Tensor, slots: Slots) -> Tensor:
        """Return what Q multiplies (r, in): the new content, without what is removed, in the dtype of V."""
        removed = self._removed(op, W, v)
        return cast(-removed if self.para else self._injected(slots) - removed, v.dtype)

    def structure(self) -> dict[str, Any]:
        # With an alpha or without one, the factor is a slot.
        return {k: value for k, value in super().structure().items() if k != "alpha"}
