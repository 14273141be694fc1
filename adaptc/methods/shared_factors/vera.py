"""VeRA: W' = W + diag(b) B diag(d) A, with one frozen random pair A, B for all sites (Kopiczko et al., 2310.11454).

Slots, in PEFT's shapes: each site has ``vera_lambda_b`` (out,) and ``vera_lambda_d`` (r,). All sites share ``vera_A``
(r, largest in of any site) and ``vera_B`` (largest out, r); a site reads their first columns and rows. With
``save_projection`` both are in files. Without, they follow from ``projection_prng_key``, bit for bit as PEFT draws
them. Beyond PEFT's linear layers, W is the weight as a matrix, kernels in its columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_integers, check_matrix, check_probability, prepare_adapter_input
from adaptc.methods.shared_factors.projections import LargestSites, ProjectionFiles, draw_projections
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.size_rule import SizeRule


@dataclass
class VeraConfig(TargetedConfig):
    """PEFT's ``VeraConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        projection_prng_key: the seed of the shared projections.
        save_projection: whether files hold the shared projections.
        vera_dropout: the dropout probability of the adapter's input.
        d_initial: the first value of the vector d.

    Example:
        >>> config = adaptc.VeraConfig(r=64, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "VERA"
    dropout_field: ClassVar[str] = "vera_dropout"

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r})
        check_probability(self, "vera_dropout")

    def method(self, name: str, kind: str) -> Vera:
        return Vera(
            r=self.r,
            key=self.projection_prng_key,
            saved=self.save_projection,
            dropout=self.vera_dropout,
            d_initial=self.d_initial,
            scheme=self.init_weights,
        )


class VeraFiles(ProjectionFiles):
    method: Vera

    def keys(self, op: Op) -> list[str]:
        return ["vera_A", "vera_B"]  # a file may hold what could be drawn again


class VeraSizes(SizeRule):
    method: Vera

    def minimal(self, op: Op) -> Vera:
        return replace(self.method, r=2)


@dataclass(frozen=True)
class Vera(Method):
    """VeRA at one site. ``inputs`` and ``outputs``: the largest sizes among the adapter's sites, 0 for this site's.

    ``dropout`` acts on the input of the adapter, in training only. ``saved``: whether the projections are in files.
    """

    name: ClassVar[str] = "vera"
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"key", "saved", "d_initial", "inputs", "outputs"}
    files = VeraFiles()
    sizes = VeraSizes(rank_axes={"vera_lambda_d": -1})
    sharing = LargestSites(shares=True)

    r: int = 256
    key: int = 0
    saved: bool = True
    dropout: float = 0.0
    d_initial: float = 0.1
    scheme: bool = True
    training: bool = False
    inputs: int = 0
    outputs: int = 0

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("VeRA", op)
        rows, columns = op.matrix_shape
        a, b = (self.r, max(self.inputs, columns)), (max(self.outputs, rows), self.r)
        return {
            "vera_lambda_b": Slot((rows,)),
            "vera_lambda_d": Slot((self.r,), free=(0,)),
            "vera_A": Slot(a, free=(0,), shared_axes_cut=(1,), trainable=False, saved=self.saved, shared=True),
            "vera_B": Slot(b, free=(1,), shared_axes_cut=(0,), trainable=False, saved=self.saved, shared=True),
        }

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        rows = op.matrix_shape[0]
        if self.scheme:
            b, d = torch.zeros(rows, dtype=dtype), torch.full((self.r,), self.d_initial, dtype=dtype)
        else:
            b, d = torch.ones(rows, dtype=dtype), torch.randn(self.r, generator=generator).to(dtype)
        return InitialValues({"vera_lambda_b": b, "vera_lambda_d": d, **self.shared_projections(op, W, dtype)})

    def shared_projections(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        specs = self.slots(op)
        a, b = draw_projections(self.key, *(specs[n].shape for n in ("vera_A", "vera_B")))
        # PEFT holds them in the base weight's dtype before it casts them, which rounds them.
        return {"vera_A": a.to(W.dtype).to(dtype), "vera_B": b.to(W.dtype).to(dtype)}

    def _site_tensors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, columns = op.matrix_shape
        b, d = slots["vera_lambda_b"], slots["vera_lambda_d"]
        A, B = slots["vera_A"].narrow(1, 0, columns), slots["vera_B"].narrow(0, 0, rows)
        return b, cast(B, b.dtype), d, cast(A, d.dtype)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        b, B, d, A = self._site_tensors(op, slots)
        delta = (b.unsqueeze(-1) * B) @ (d.unsqueeze(-1) * A)
        return cast(W + op.unmatrix(delta), W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        # The vectors scale activations, not A and B: each site would need scaled copies of the shared projections.
        out, B, d, A = self._site_tensors(op, slots)
        x = prepare_adapter_input(self, op, x, d.dtype)
        h = op(x, A.reshape(-1, *op.shape[1:]))
        h = op.up(h * op.along_out(d, h), B)
        return cast(y + h * op.along_out(out, h), y.dtype)
