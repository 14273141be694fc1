"""PVeRA: W' = W + diag(b) B diag(d) A, where training adds noise of a learned size between A and B (arXiv 2512.07703).

The projection down gives two values per rank. The first is a mean, m = d_0 * (A_0 x). The second is the logarithm of a
variance, v = d_1 * (A_1 x). In training the adapter adds b * B (m + e exp(v / 2)) to the output, where e is drawn from
the normal distribution. In inference it adds b * B m, unless ``sample_at_inference`` is set. The weight form, and so a
merge, is that of the mean, as in PEFT.

Slots: each site has ``pvera_lambda_b`` (out,) and ``pvera_lambda_d`` (2, r). All sites share the frozen ``pvera_A`` (2,
r, largest in of any site) and ``pvera_B`` (largest out, r). A site reads their first columns and rows. In files, the
first two sizes of ``pvera_lambda_d`` and ``pvera_A`` are one, 2 r. With ``save_projection`` files hold A and B.
Without, they follow from ``projection_prng_key``, bit for bit as PEFT draws them. Beyond PEFT's linear layers, W is the
weight as a matrix, kernels in its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import (
    check_integers,
    check_matrix,
    check_probability,
    is_in_training,
    prepare_adapter_input,
)
from adaptc.methods.shared_factors.projections import LargestSites, ProjectionFiles, draw_projections
from adaptc.methods.shared_factors.vera import VeraSizes
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.method_part import SiteDescription

OUT, RANKS, A, B = "pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B"
_SEED_REFUSAL = (
    "PveraConfig.generator_seed={seed} is not supported where noise is drawn{where}: a program draws it from torch's "
    "global generator. Set generator_seed=None, and call torch.manual_seed for numbers that can be drawn again"
)


@dataclass
class PveraConfig(TargetedConfig):
    """PEFT's ``PveraConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        projection_prng_key: the seed of the shared projections.
        save_projection: whether files hold the shared projections.
        pvera_dropout: the dropout probability of the adapter's input.
        d_initial: the first value of the vector d.
        sample_at_inference: whether noise is added in inference too.
        generator_seed: the seed of the noise in PEFT. It is refused where noise is drawn: in training, and with
            ``sample_at_inference``. An adapter for inference alone may have it.

    Example:
        >>> config = adaptc.PveraConfig(r=64, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "PVERA"
    dropout_field: ClassVar[str] = "pvera_dropout"

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r})
        check_probability(self, "pvera_dropout")
        if self.sample_at_inference and self.generator_seed is not None:
            raise ConfigError(_SEED_REFUSAL.format(seed=self.generator_seed, where=", as with sample_at_inference"))

    def method(self, name: str, kind: str) -> Pvera:
        return Pvera(
            r=self.r,
            key=self.projection_prng_key,
            saved=self.save_projection,
            dropout=self.pvera_dropout,
            d_initial=self.d_initial,
            scheme=self.init_weights,
            sample=self.sample_at_inference,
            seed=self.generator_seed,
        )


class PveraFiles(ProjectionFiles):
    method: Pvera

    def keys(self, op: Op) -> list[str]:
        return [A, B]  # a file may hold what could be drawn again

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = dict(found)
        for name in (RANKS, A):
            if name in values:
                t = values[name]
                if not t.ndim or t.shape[0] % 2:
                    raise CheckpointError(
                        f"{name!r} has shape {tuple(t.shape)}; its first size must be even: a half for means and one "
                        "for variances"
                    )
                values[name] = t.unflatten(0, (2, -1)) if t.shape[0] else t.reshape(2, 0, *t.shape[1:])
        return values

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        return {n: t.flatten(0, 1) if n in (RANKS, A) else t for n, t in slots.items()}


class PveraSizes(VeraSizes):
    method: Pvera  # type: ignore[assignment]

    def with_sizes_of(self, op: Op, slots: Slots) -> Pvera:
        d = slots.get(RANKS)
        return self.method if d is None or not d.ndim else replace(self.method, r=d.shape[-1] // 2)


@dataclass(frozen=True)
class Pvera(Method):
    """PVeRA at one site. ``inputs`` and ``outputs``: the largest sizes among the adapter's sites, 0 for this site's.

    ``dropout`` acts on the input of the adapter, in training only. ``saved``: whether the projections are in files.
    ``sample``: whether noise is drawn in inference. ``seed``: PEFT's seed of the noise, refused where noise is drawn.
    """

    name: ClassVar[str] = "pvera"
    takes_complex: ClassVar[bool] = False  # a variance is real
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"key", "saved", "d_initial", "inputs", "outputs", "seed"}
    files = PveraFiles()
    sizes = PveraSizes()
    sharing = LargestSites(shares=True)

    r: int = 256
    key: int = 0
    saved: bool = True
    dropout: float = 0.0
    d_initial: float = 0.1
    scheme: bool = True
    sample: bool = False
    seed: int | None = None
    training: bool = False
    inputs: int = 0
    outputs: int = 0

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("PVeRA", op)
        if not op.callable:
            raise TargetError(
                "PVeRA adds noise to what a layer computes, and this weight, of kind "
                f"{op.kind!r}, is read by no op that is known as a layer; leave it out"
            )
        rows, columns = op.matrix_shape
        a, b = (2, self.r, max(self.inputs, columns)), (max(self.outputs, rows), self.r)
        return {
            OUT: Slot((rows,)),
            RANKS: Slot((2, self.r), free=(1,)),
            A: Slot(a, free=(1,), shared_axes_cut=(2,), trainable=False, saved=self.saved, shared=True),
            B: Slot(b, free=(1,), shared_axes_cut=(0,), trainable=False, saved=self.saved, shared=True),
        }

    # -- randomness ----------------------------------------------------------------------------------------------------

    def is_random(self) -> bool:
        return self.training or self.sample

    def noiseless(self) -> Self:
        return replace(self, training=False, sample=False)

    def trained(self) -> Self:
        self.check_seed()
        return super().trained()

    def rebind(self, config: Any, place: SiteDescription) -> Method:
        new = super().rebind(config, place)
        if self.training and isinstance(new, Pvera):
            new.check_seed()
        return new

    def check_seed(self) -> None:
        """Raise ConfigError where the adapter has a seed of its own for the noise that it draws."""
        if self.seed is not None:
            raise ConfigError(_SEED_REFUSAL.format(seed=self.seed, where=", as in training"))

    # -- values --------------------------------------------------------------------------------------------------------

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        rows = op.matrix_shape[0]
        if self.scheme:
            b, d = torch.zeros(rows, dtype=dtype), torch.full((2, self.r), self.d_initial, dtype=dtype)
        else:
            drawn = torch.randn(2 * self.r, generator=generator)
            b, d = torch.ones(rows, dtype=dtype), drawn.to(dtype).unflatten(0, (2, self.r))
        return InitialValues({OUT: b, RANKS: d, **self.shared_projections(op, W, dtype)})

    def shared_projections(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        specs = self.slots(op)
        # PEFT draws the two halves of A as one matrix.
        a, b = draw_projections(self.key, (2 * self.r, specs[A].shape[2]), specs[B].shape)
        # PEFT holds them in the base weight's dtype before it casts them, which rounds them.
        return {A: a.unflatten(0, (2, -1)).to(W.dtype).to(dtype), B: b.to(W.dtype).to(dtype)}

    # -- meaning -------------------------------------------------------------------------------------------------------

    def _site_tensors(self, op: Op, slots: Slots) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, columns = op.matrix_shape
        b, d = slots[OUT], slots[RANKS]
        down, up = slots[A].narrow(2, 0, columns), slots[B].narrow(0, 0, rows)
        return b, cast(up, b.dtype), d, cast(down, d.dtype)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        b, up, d, down = self._site_tensors(op, slots)
        delta = (b.unsqueeze(-1) * up) @ (d[0].unsqueeze(-1) * down[0])
        return cast(W + op.unmatrix(delta), W.dtype)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        # The vectors scale activations, not A and B: each site would need scaled copies of the shared projections.
        out, up, d, down = self._site_tensors(op, slots)
        x = prepare_adapter_input(self, op, x, d.dtype)

        def project(half: int) -> Tensor:
            h = op(x, per_group(down[half]).reshape(-1, *op.shape[1:]))
            return h * op.along_out(per_group(d[half]), h)

        def per_group(t: Tensor) -> Tensor:
            return t if op.groups == 1 else t.repeat(op.groups, *[1] * (t.ndim - 1))

        h = project(0)
        if self.is_random():
            h = h + self._noise(project(1))
        h = op.up(h, up)
        return cast(y + h * op.along_out(out, h), y.dtype)

    def _noise(self, logvar: Tensor) -> Tensor:
        """Return noise of this logarithm of its variance; zeros once a program trained with it is in inference."""
        if self.sample:
            return torch.randn_like(logvar) * torch.exp(0.5 * logvar)
        # A factor of the exponent too, since infinity times 0 is NaN.
        is_on = cast(is_in_training(logvar), logvar.dtype)
        return torch.randn_like(logvar) * torch.exp(0.5 * is_on * logvar) * is_on
