"""Uni-LoRA: W' = W + B A, where all sites take the entries of A and B from one trained vector (arXiv 2506.00799).

Entry i of all A and B of an adapter, in the order of the model's modules, is t[k_i] / sqrt(n_i). Here n_i is the number
of entries that take from the same place k_i as entry i does. All places are taken equally often, up to one. They are
shuffled by numpy's generator with ``proj_seed``, bit for bit as in PEFT.

Slots: all sites share ``unilora_theta_d`` (theta_d_length,), the one tensor that is trained. Each site has
``unilora_indices_A`` (r, in) and ``unilora_indices_B`` (out, r), int64, and ``unilora_scales_A`` and
``unilora_scales_B`` of the same shapes. Files hold these four with ``save_indices`` alone. Without it, a file has
nothing of a site, and the config says which sites the adapter has. Beyond PEFT's linear layers, W is the weight as a
matrix, kernels in its columns. Each matrix of stacked experts has indices of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_integers, check_matrix, check_probability, prepare_adapter_input
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.passes.protocol.parts.size_rule import SizeRule
from adaptc.torch_modes import outside_modes

THETA = "unilora_theta_d"
INDICES = ("unilora_indices_A", "unilora_indices_B")
SCALES = ("unilora_scales_A", "unilora_scales_B")


@dataclass
class UniLoraConfig(TargetedConfig):
    """PEFT's ``UniLoraConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        proj_seed: the seed of the places that entries take their values from.
        theta_d_length: the length of the trained vector.
        unilora_dropout: the dropout probability of the adapter's input.
        init_theta_d_bound: the bound of the first values of the vector.
        save_indices: whether files hold the places and the scales, which else follow from ``proj_seed``.
        init_weights: whether first values lie within the bound; False draws them from the normal distribution. The
            adapter changes the model in either case, as in PEFT.

    Example:
        >>> config = adaptc.UniLoraConfig(r=4, theta_d_length=256, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "UNILORA"
    dropout_field: ClassVar[str] = "unilora_dropout"

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r, "theta_d_length": self.theta_d_length})
        check_integers(self, {"proj_seed": self.proj_seed}, 0)  # numpy takes no other seeds
        check_probability(self, "unilora_dropout")
        if not self.init_theta_d_bound > 0:
            raise ConfigError(f"UniLoraConfig.init_theta_d_bound must be positive, got {self.init_theta_d_bound!r}")

    def method(self, name: str, kind: str) -> UniLora:
        return UniLora(
            r=self.r,
            length=self.theta_d_length,
            key=self.proj_seed,
            saved=self.save_indices,
            dropout=self.unilora_dropout,
            bound=self.init_theta_d_bound,
            scheme=self.init_weights,
        )


@lru_cache(maxsize=2)
def draw_places(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the place of each of ``count`` entries, int64 (count,), and the scale of each place, float32 (length,).

    Both are on the CPU and cached: copy them, never write to them.
    """
    with outside_modes(), torch.no_grad():
        generator = np.random.default_rng(seed)
        places = np.repeat(np.arange(length), count // length)
        if rest := count % length:
            places = np.concatenate([places, generator.choice(length, size=rest, replace=False)])
        generator.shuffle(places)
        found = torch.as_tensor(places, dtype=torch.int64)
        taken = torch.bincount(found, minlength=length).float()
        return found, torch.where(taken > 0, taken.rsqrt(), 0.0)


class UniLoraFiles(FileFormat):
    method: UniLora

    def keys(self, op: Op) -> list[str]:
        return [*INDICES, *SCALES]  # a file may hold what could be drawn again

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name in INDICES:
            if name not in found or not found[name].numel() or found[name].is_floating_point():
                continue
            low, high = int(found[name].min()), int(found[name].max())
            if not 0 <= low <= high < self.method.length:
                raise CheckpointError(
                    f"{name!r} holds places from {low} to {high}, and {THETA!r} has {self.method.length} of them"
                )
        return dict(found)

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return {**self.method.identity(op, W, dtype), **self.method.places_and_scales(op, W, dtype)}


class UniLoraSharing(SharedSlots):
    method: UniLora

    def settle_shared_sizes(self, sites: Sequence[tuple[Method, Op]]) -> list[Method]:
        counts = [method.count_entries(op) for method, op in sites if isinstance(method, UniLora)]
        return [
            replace(method, before=sum(counts[:i]), total=sum(counts))  # type: ignore[call-arg]
            for i, (method, _) in enumerate(sites)
        ]


@dataclass(frozen=True)
class UniLora(Method):
    """Uni-LoRA at one site. ``before``: the number of entries of the sites before it; ``total``: of all sites.

    ``total`` is 0 for an adapter of this site alone. ``dropout`` acts on the input of the adapter, in training only.
    """

    name: ClassVar[str] = "unilora"
    stacks: ClassVar[bool] = True
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"key", "saved", "bound", "before", "total"}
    files = UniLoraFiles()
    sizes = SizeRule(rank_axes={INDICES[0]: -2})
    sharing = UniLoraSharing(shares=True)

    r: int = 4
    length: int = 256
    key: int = 42
    saved: bool = False
    dropout: float = 0.0
    bound: float = 0.02
    scheme: bool = True
    training: bool = False
    before: int = 0
    total: int = 0

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("Uni-LoRA", op)
        a, b = self._factor_shapes(op)
        axes = {INDICES[0]: len(a) - 2, INDICES[1]: len(b) - 1, SCALES[0]: len(a) - 2, SCALES[1]: len(b) - 1}
        out = {THETA: Slot((self.length,), shared=True)}
        for names, kind in ((INDICES, torch.int64), (SCALES, None)):
            for name, shape in zip(names, (a, b), strict=True):
                out[name] = Slot(shape, free=(axes[name],), dtype=kind, trainable=False, saved=self.saved)
        return out

    def _factor_shapes(self, op: Op) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B: (r, columns) and (rows, r), for stacked experts with an axis of experts."""
        rows, columns = op.shape[1:] if op.experts else op.matrix_shape
        stack = (op.experts,) if op.experts else ()
        return (*stack, self.r, columns), (*stack, rows, self.r)

    def count_entries(self, op: Op) -> int:
        """Return the number of entries of A and B at a site."""
        return sum(torch.Size(shape).numel() for shape in self._factor_shapes(op))

    # -- values --------------------------------------------------------------------------------------------------------

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        theta = torch.empty(self.length)
        if self.scheme:
            theta.uniform_(-self.bound, self.bound, generator=generator)
        else:
            theta.normal_(generator=generator)
        return InitialValues({THETA: theta.to(dtype), **self.places_and_scales(op, W, dtype)})

    def places_and_scales(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the indices and scales of a site, as PEFT draws them for all sites at once."""
        places, scale = draw_places(self.total or self.count_entries(op), self.length, self.key)
        out: dict[str, Tensor] = {}
        first = self.before
        for indices, scales, shape in zip(INDICES, SCALES, self._factor_shapes(op), strict=True):
            count = torch.Size(shape).numel()
            own = places[first : first + count].reshape(shape)
            first += count
            out[indices] = own.to(W.device, copy=True)
            # PEFT holds scales in the base weight's dtype, which rounds them.
            out[scales] = scale[own].to(W.dtype).to(W.device, dtype)
        return out

    # -- meaning -------------------------------------------------------------------------------------------------------

    def _factors(self, slots: Slots) -> tuple[Tensor, Tensor]:
        theta = slots[THETA]
        a, b = (theta[slots[i]] * cast(slots[s], theta.dtype) for i, s in zip(INDICES, SCALES, strict=True))
        return a, b

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        down, up = self._factors(slots)
        return cast(W + op.unmatrix(up @ down), W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        down, up = self._factors(slots)
        x = prepare_adapter_input(self, op, x, down.dtype)
        delta = op.up(op(x, down.reshape(-1, *op.shape[1:])), up)
        return cast(y + delta, y.dtype)
