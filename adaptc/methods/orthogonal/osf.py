"""OSF: W' = W + U S V - U0 S0 V0, the last ones the smallest singular terms of W (Nayak et al., arXiv 2504.07097).

There are t = min(out, in) - ``effective_rank`` of these terms. Slots, in PEFT's shapes:
``osf_svd_params.U_low`` (out, t), ``osf_svd_params.S_low`` (t,) and ``osf_svd_params.V_low`` (t, in), whose first
values are U0, S0 and V0. These, and the other singular vectors of the longer side, are in no file: they are made of the
weight when an adapter is bound. A file therefore means something only together with the weight it was trained on.

In training the gradients of U and V are projected to the complement of the largest singular vectors, as by the hooks of
PEFT's layers. Here the projection is the derivative of what the program computes. PEFT adapts linear layers alone; here
W is any weight as a matrix, kernels in its columns. PEFT computes with the first of several active adapters, and merges
all of them; here all act in either form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptc.errors import ConfigError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.option_checks import check_matrix, warn_unused
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.method_part import SiteDescription
from adaptc.passes.protocol.parts.size_rule import SizeRule
from adaptc.patterns import compile_pattern
from adaptc.torch_modes import outside_modes
from adaptc.torch_typing import reduced_svd

U_LOW, S_LOW, V_LOW = "osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low"
#: the slots of the frozen terms
U_INIT, S_INIT, V_INIT = "osf_U_init", "osf_S_init", "osf_V_init"
#: the slot, in training, with all singular vectors of the longer side. They have one size for every rank, where the
#: largest ones alone have not.
VECTORS = "osf_vectors"


@dataclass
class OSFConfig(TargetedConfig):
    """PEFT's ``OSFConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    A number of singular terms is an integer, or a float of at most 1 for a share of the weight's smaller side.

    Attributes:
        effective_rank: how many of the largest singular terms stay as they are; None for half of them.
        rank_pattern: expression -> the ``effective_rank`` of modules whose name it is found in.
        target_svd_config: has no effect, in PEFT neither.

    Example:
        >>> config = adaptc.OSFConfig(effective_rank=0.75, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "OSF"

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        named = {f"rank_pattern[{k!r}]": v for k, v in (self.rank_pattern or {}).items()}
        for name, value in {"effective_rank": self.effective_rank, **named}.items():
            if value is not None and not 0 < value < 1e15:
                raise ConfigError(
                    f"OSFConfig.{name} must be a positive number of singular terms, or a share of them in (0, 1], "
                    f"got {value!r}"
                )
        warn_unused(self, ["target_svd_config"], "in PEFT neither: rank_pattern chooses the terms of a layer")

    def with_model_defaults(self, facts: ModelFacts) -> Self:
        new = super().with_model_defaults(facts)
        return new.with_missing_filled({} if self.target_parameters else {"target_modules": "all-linear"})

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        return {"rank_pattern": self.rank_pattern or {}}

    def pattern_matches(self, key: str, name: str) -> bool:
        return _compile_key(key).search(name) is not None

    def method(self, name: str, kind: str) -> Osf:
        own = (v for k, v in (self.rank_pattern or {}).items() if self.pattern_matches(k, name))
        return Osf(kept=next(own, self.effective_rank), scheme=self.init_weights is not False)


@lru_cache(maxsize=4096)
def _compile_key(key: str) -> Any:
    return compile_pattern("OSFConfig.rank_pattern", key)


class OsfFiles(FileFormat):
    method: Osf

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        frozen = self.method.frozen_terms(op, W, dtype)
        first = {U_LOW: frozen[U_INIT], S_LOW: frozen[S_INIT], V_LOW: frozen[V_INIT]}
        return {**{name: t.clone() for name, t in first.items()}, **frozen}


class OsfSizes(SizeRule):
    method: Osf

    def specialized_for(self, op: Op) -> Osf:
        return replace(self.method, r=self.method.terms_at(op))


@dataclass(frozen=True)
class Osf(Method):
    """OSF at one site. ``kept``: the singular terms that stay, as in the config. ``scheme`` False: random first values.

    ``r``: the number of the other terms, 0 before the site is known.
    """

    name: ClassVar[str] = "osf"
    takes_complex: ClassVar[bool] = False
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"kept"}
    files = OsfFiles(names=(U_LOW, S_LOW, V_LOW))
    sizes = OsfSizes()

    kept: int | float | None = None
    r: int = 0
    scheme: bool = True
    training: bool = False

    def rebind(self, config: Any, place: SiteDescription) -> Any:
        # What is bound to a program that trains needs the slot that only training reads.
        new = super().rebind(config, place)
        return replace(new, training=self.training) if isinstance(new, Osf) else new

    def terms_at(self, op: Op) -> int:
        """Return how many singular terms are trained; raise TargetError where all of them stay, or none."""
        small = min(op.matrix_shape)
        if self.r:
            return self.r
        if self.kept is None:
            kept = small // 2
        else:
            kept = int(small * self.kept) if isinstance(self.kept, float) and self.kept <= 1 else int(self.kept)
        if not 0 < kept < small:
            fits = f"1 to {small - 1} fit" if small > 1 else "none fits: leave this layer out"
            raise TargetError(
                f"OSF keeps some of the singular terms of a weight and trains the others, and effective_rank="
                f"{self.kept!r} keeps {min(kept, small)} of the {small} that a matrix of shape {op.matrix_shape} has; "
                f"{fits}"
            )
        return small - kept

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("OSF", op)
        (rows, columns), t = op.matrix_shape, self.terms_at(op)
        frozen: Any = {"trainable": False, "saved": False}
        slots = {
            U_LOW: Slot((rows, t), free=(1,)),
            S_LOW: Slot((t,), free=(0,)),
            V_LOW: Slot((t, columns), free=(0,)),
            U_INIT: Slot((rows, t), free=(1,), **frozen),
            S_INIT: Slot((t,), free=(0,), **frozen),
            V_INIT: Slot((t, columns), free=(0,), **frozen),
        }
        # Along the shorter side, the smallest singular vectors span the complement of the largest.
        if self.training and rows != columns:
            slots[VECTORS] = Slot((rows, columns), **frozen)
        return slots

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        values = self.files.derived(op, W, dtype, {})
        if not self.scheme:
            source = torch.device("cpu") if generator is None else generator.device
            for name in (U_LOW, S_LOW, V_LOW):
                # In the dtype of the weight, as in PEFT: another dtype draws other numbers.
                drawn = torch.randn(values[name].shape, dtype=W.dtype, device=source, generator=generator)
                values[name] = drawn.to(W.device, dtype)
        return InitialValues(values)

    @torch.no_grad()
    def frozen_terms(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the slots that follow from the weight."""
        (rows, columns), t = op.matrix_shape, self.terms_at(op)
        M = op.matrix(W).detach().float()  # as in PEFT, whatever the dtype
        if not bool(torch.isfinite(M).all()):
            raise ConfigError(f"OSF decomposes the weight, and this one of shape {op.shape} is not finite")
        with outside_modes():
            U, S, V = reduced_svd(M)
        k = S.shape[0] - t
        frozen = {U_INIT: U[:, k:], S_INIT: S[k:], V_INIT: V[k:]}
        if self.training and rows != columns:
            frozen[VECTORS] = U if rows > columns else V
        # PEFT holds them in the base weight's dtype before it casts them, which rounds them.
        return {name: value.to(W.dtype).to(dtype).contiguous() for name, value in frozen.items()}

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        U, V = self._trained_factors(op, slots)
        delta = (U * slots[S_LOW]) @ V - (slots[U_INIT] * slots[S_INIT]) @ slots[V_INIT]
        return cast(W + op.unmatrix(delta), W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        U, V = self._trained_factors(op, slots)
        x = op.cast_input(x, U.dtype)
        up = torch.cat([U * slots[S_LOW], -slots[U_INIT] * slots[S_INIT]], 1)
        down = torch.cat([V, slots[V_INIT]])
        return cast(y + op.low_rank(x, down, up), y.dtype)

    def _trained_factors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor]:
        """Return U (rows, t) and V (t, columns), in training with projected gradients."""
        U, V = slots[U_LOW], slots[V_LOW]
        if not self.training:
            return U, V
        rows, columns = op.matrix_shape
        left, right = (slots[VECTORS] if longer else None for longer in (rows > columns, columns > rows))
        right = None if right is None else right.t()
        own = _project(U, slots[U_INIT], left), _project(V.t(), slots[V_INIT].t(), right).t()
        return _with_derivative_of(U, own[0]), _with_derivative_of(V, own[1])


def _project(factor: Tensor, smallest: Tensor, vectors: Tensor | None) -> Tensor:
    """Return ``factor`` (n, t) projected to the complement of the largest singular vectors.

    ``smallest``: the other ones, (n, t). ``vectors``: all of them, (n, m), where there are less than n; else None.
    """
    kept = smallest @ (smallest.t() @ factor)
    return kept if vectors is None else factor - vectors @ (vectors.t() @ factor) + kept


def _with_derivative_of(value: Tensor, other: Tensor) -> Tensor:
    """Return a tensor with the exact value of ``value`` and the derivative of ``other``."""
    return value.detach() + (other - other.detach())
